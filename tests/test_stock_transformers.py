"""What was written loads where compresso is not installed: in the oldest transformers that we take, and in this one."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compresso import extract
from compresso.export import export
from compresso.families import FAMILIES
from test_extract import gates_of, logits
from tiny import tiny_model

WIDTHS = {
    "equal": {"kv_group": [1, 1, 1], "intermediate": [30, 30, 30]},
    "unequal": {"kv_group": [2, 1, 1], "intermediate": [40, 17, 33]},
    "dropped": {"kv_group": [0, 1, 2], "intermediate": [40, 0, 33]},
}
STRANGER = """
import json, sys
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM

assert "compresso" not in sys.modules
ids = torch.tensor(json.loads(sys.argv[1]))
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    said = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()(ids)
        found[folder] = model(ids).logits.tolist(), said.tolist(), list(base.last_hidden_state.shape)
print(json.dumps([transformers.__version__, found]))
"""


def ask(folders, ids, where: Path, path: str) -> tuple[str, dict]:
    """What a process without compresso finds in these folders."""
    environment = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(where)}
    command = [sys.executable, "-c", STRANGER, json.dumps(ids.tolist()), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=where, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def positions(name: str) -> dict:
    """Rotary frequencies that are no reader's default."""
    rope: dict = {"rope_type": "default", "rope_theta": 5e5}
    if name == "opt":
        return {}
    if name == "llama":
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 16}
    if name == "gpt_neox":
        rope |= {"partial_rotary_factor": 0.5}
    if name == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 3e4}}
    return {"rope_parameters": rope}


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """Folders of every family and form, and the model of each."""
    place, models = tmp_path_factory.mktemp("forms"), {}
    for name, (kind, widths) in itertools.product(FAMILIES, WIDTHS.items()):
        model = tiny_model(name, vocab_size=320, **positions(name))
        smaller = extract(model, gates_of(model, {**widths, "hidden": [24]}))
        source = place / f"{name}-{kind}"
        smaller.save_pretrained(source)
        tokenizer.save_pretrained(source)
        forms = ["hf"] if kind == "equal" else ["hf", "padded"]
        for form in (*forms, *(["nemotron-nas"] if FAMILIES[name].gguf_per_layer == "deci" else [])):
            export(str(source), form, str(place / f"{name}-{kind}-{form}"))
            models[place / f"{name}-{kind}-{form}"] = smaller
    return models


@pytest.mark.parametrize("version", ["5.16", "installed"])
def test_every_form_loads_without_compresso(version, written, token_ids, tmp_path):
    oldest = Path(sys.prefix) / "oldest"
    assert (oldest / "transformers").is_dir(), f"no transformers 5.16 in {oldest}; `make setup` puts it there"
    found_version, found = ask(written, token_ids, tmp_path, str(oldest) if version == "5.16" else "")
    assert found_version.startswith(version) or version == "installed"
    for folder, smaller in written.items():
        values, said, base = found[str(folder)]
        torch.testing.assert_close(torch.tensor(values), logits(smaller, token_ids), rtol=0, atol=1e-4)
        greedy = smaller.generate(token_ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert said == greedy.tolist(), folder
        assert base == [*token_ids.shape, smaller.config.hidden_size]


def test_positions_are_told_by_the_names_that_older_readers_look_for(written):
    """MLX takes 10000 where a Llama's config names no rope_theta, and computes something else without a word."""
    for folder, smaller in written.items():
        told = json.loads((folder / "config.json").read_text())
        rope = getattr(smaller.config, "rope_parameters", None)
        if not rope:
            assert "rope_theta" not in told
            continue
        assert told["rope_theta"] == 5e5
        assert ("rope_scaling" in told) == (smaller.config.model_type.endswith("llama"))
        if "full_attention" in rope:
            assert told["rope_local_base_freq"] == 3e4
        if smaller.config.model_type.endswith("gpt_neox"):
            assert (told["rotary_emb_base"], told["rotary_pct"]) == (5e5, 0.5)
