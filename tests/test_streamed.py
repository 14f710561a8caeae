"""Extraction from files to files writes what extraction in memory gives, without holding the model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compresso import Plan, describe, extract, streamed
from compresso import plan as plans
from compresso.chat import open_model
from compresso.cli import main
from compresso.families import FAMILIES
from compresso.mixtures import sort_channels
from compresso.streamed import StoredWeights, extract_files
from tiny import random_plan, tiny_model


def stored(model_type, tokenizer, folder, shard="1GB", **settings):
    model = tiny_model(model_type, **settings)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return model


def saved(plan, folder):
    folder.mkdir()
    plans.save(plan, folder, {})
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_hold_what_extraction_in_memory_gives(model_type, tied, tokenizer, tmp_path):
    model = stored(model_type, tokenizer, tmp_path / "old", "40KB", tie_word_embeddings=tied)
    plan = random_plan(model)
    extract_files(str(tmp_path / "old"), saved(plan, tmp_path / "run"), tmp_path / "new")
    expected = extract(sort_channels(model), plan)
    actual, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(actual) is type(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, actual.state_dict()[name]), name


def test_files_with_other_names_and_more_in_them(tokenizer, tmp_path):
    """As Pythia's: the head by another name, masks and rotary frequencies of old versions among the weights."""
    model = stored("gpt_neox", tokenizer, tmp_path / "old")
    names = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    more = {"embed_out.weight": model.lm_head.weight.detach()}
    for i in range(3):
        more[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        more[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        more[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(2, dtype=torch.float64)
    save_file({**names, **more}, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    for name, plan in {
        "stock": Plan(describe(model), {"intermediate": (torch.arange(3 * 48) % 2).double()}),
        "unequal": random_plan(model),
    }.items():
        extract_files(str(tmp_path / "old"), saved(plan, tmp_path / f"{name} run"), tmp_path / name)
        expected, actual = extract(model, plan), AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert expected.state_dict().keys() == actual.state_dict().keys()
        assert all(torch.equal(value, actual.state_dict()[key]) for key, value in expected.state_dict().items())
        expected.save_pretrained(tmp_path / f"{name} in memory")
        written, told = (load_file(tmp_path / f / "model.safetensors") for f in (name, f"{name} in memory"))
        assert written.keys() == told.keys()


def test_norms_in_another_number_format_get_that_of_the_weights(tokenizer, tmp_path):
    model = stored("llama", tokenizer, tmp_path / "old").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    mixed = {name: value.float() if value.ndim == 1 else value for name, value in load_file(path).items()}
    save_file(mixed, path, {"format": "pt"})
    extract_files(str(tmp_path / "old"), saved(random_plan(model), tmp_path / "run"), tmp_path / "new")
    assert {value.dtype for value in load_file(tmp_path / "new/model.safetensors").values()} == {torch.bfloat16}


def test_a_chat_model_stays_one(tokenizer, tmp_path):
    model = stored("llama", tokenizer, tmp_path / "old")
    extract_files(str(tmp_path / "old"), saved(random_plan(model), tmp_path / "run"), tmp_path / "new")
    asked = [open_model(str(tmp_path / name)) for name in ("old", "new")]
    assert asked[0].encoder.question("say", asked[0].prompt) == asked[1].encoder.question("say", asked[1].prompt)


def test_many_shards_and_an_index(tokenizer, tmp_path, monkeypatch):
    model = stored("llama", tokenizer, tmp_path / "old")
    plan = Plan(describe(model), {})
    monkeypatch.setattr(streamed, "SHARD_BYTES", 30_000)
    extract_files(str(tmp_path / "old"), saved(plan, tmp_path / "run"), tmp_path / "new")
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    for file in files:
        for name, value in load_file(file).items():
            assert index["weight_map"][name] == file.name
            assert torch.equal(value, model.state_dict()[name]), name


def test_what_cannot_be_extracted_is_said_and_nothing_is_left(checkpoint, tokenizer, tmp_path, capsys):
    other = saved(random_plan(tiny_model("llama", num_hidden_layers=2)), tmp_path / "other")
    assert main(["extract", str(checkpoint), str(other), "--output", str(tmp_path / "new")]) == 2
    assert "a plan fits only the model" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["extract", str(checkpoint), str(other), "--output", str(tmp_path / "full")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["extract", str(checkpoint), str(tmp_path / "no run"), "--output", str(tmp_path / "new")]) == 2
    assert "no plan.json" in capsys.readouterr().err
    model = stored("llama", tokenizer, tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    run = saved(random_plan(model), tmp_path / "run")
    assert main(["extract", str(tmp_path / "torn"), str(run), "--output", str(tmp_path / "new")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_tensor_is_read_when_it_is_asked_for(tokenizer, tmp_path):
    model = stored("llama", tokenizer, tmp_path / "old", "40KB")
    weights = StoredWeights(tmp_path / "old")
    assert set(weights) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)
