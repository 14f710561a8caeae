"""Training beside 4-bit weights gives a model cut from the checkpoint's own numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compresso
from compresso import quantised
from compresso.cli import main
from compresso.train import operations
from tiny import tiny_model

QUICK = {"steps": 6, "max_length": 48, "prompt": "short", "precision": "4bit", "target_sparsity": 0.3, "device": "cpu"}


@pytest.fixture
def wide(tmp_path, tokenizer):
    """bitsandbytes rounds blocks of 64 numbers, and a matrix must be a multiple of that."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16, max_position_embeddings=512)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_the_result_has_the_numbers_of_the_checkpoint_and_the_adapters(wide, data, tmp_path):
    run = tmp_path / "run"
    summary = compresso.prune(model=str(wide), data=str(data), output=str(run), recover_steps=0, **QUICK)
    assert summary["parameters"]["before"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(wide).parameters()
    )
    assert summary["sparsity"] == pytest.approx(0.3, abs=0.03)
    config = json.loads((run / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    dense, cut = load_file(wide / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert torch.equal(cut["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    kept = summary["widths"][0]["num_key_value_heads"]
    values = cut["model.layers.0.self_attn.v_proj.weight"]
    assert values.dtype == torch.bfloat16
    assert values.shape == (kept * 16, 64)
    heads = dense["model.layers.0.self_attn.v_proj.weight"].view(2, 16, 64)
    nearest = min(float((values.view(kept, 16, 64)[0] - head).abs().max()) for head in heads)
    assert 0 < nearest < 0.1, "the adapters' small change, not rounding to four bits"
    loaded = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=False)
    assert sum(p.numel() for p in loaded.parameters()) == summary["parameters"]["after"]


def test_operations_count_weights_and_not_the_bytes_that_hold_them(wide):
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(wide).parameters())
    assert operations(quantised.load(wide, torch.device("cpu"))[0], 1, 1) == 2 * whole


def test_recovery_beside_four_bits_changes_the_saved_model(wide, data, tmp_path):
    run = tmp_path / "run"
    compresso.prune(model=str(wide), data=str(data), output=str(run), recover_steps=3, **QUICK)
    cut, model = (load_file(run / name / "model.safetensors") for name in ("cut", "model"))
    changed = [name for name in cut if not torch.equal(cut[name], model[name])]
    assert changed
    assert all("proj" in name for name in changed)


def test_what_cannot_be_read_in_four_bits_is_refused_with_a_reason(tmp_path, tokenizer, data, capsys, monkeypatch):
    settings = ["--data", str(data), "--output", str(tmp_path / "run"), "--precision", "4bit", "--device", "cpu"]
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert main(["prune", "--model", str(file), *settings]) == 2
    assert "is no folder with safetensors" in capsys.readouterr().err
    monkeypatch.setattr("compresso.quantised.find_spec", lambda name: None)
    tokenizer.save_pretrained(tmp_path / "dense")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    assert main(["prune", "--model", str(tmp_path / "dense"), *settings]) == 2
    assert "pip install 'compresso-llm[4bit]'" in capsys.readouterr().err
