"""Every form of a model computes what the model does, or is refused with what works instead."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresso import extract
from compresso.export import FORMATS, export
from compresso.families import FAMILIES
from compresso.gguf_file import architecture_of
from compresso.onnx_file import Onnx
from compresso.shape import describe
from test_extract import VARIANTS, gates_of, logits
from tiny import tiny_model

EQUAL = {"kv_group": [1, 1, 1], "intermediate": [30, 30, 30]}
UNEQUAL = {"kv_group": [2, 1, 1], "intermediate": [40, 17, 33]}
DROPPED = {"kv_group": [0, 1, 2], "intermediate": [40, 0, 33]}


@pytest.fixture
def run(tmp_path, tokenizer):
    """A function that saves a cut model of some widths and gives its folder and itself."""

    def make(model_type, widths, **settings):
        model = tiny_model(model_type, vocab_size=320, **settings)  # more rows than tokens, as many real ones
        groups = describe(model).layers[0].num_key_value_heads
        widths = {**widths, "kv_group": [min(n, groups) for n in widths["kv_group"]]}
        smaller = extract(model, gates_of(model, {**widths, "hidden": [24]}))
        smaller.save_pretrained(tmp_path / "run")
        tokenizer.save_pretrained(tmp_path / "run")
        return str(tmp_path / "run"), smaller

    return make


def not_in_llama_cpp(model):
    try:
        architecture_of(model)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(("model_type", "settings"), VARIANTS)
@pytest.mark.parametrize("widths", [EQUAL, UNEQUAL, DROPPED])
@pytest.mark.parametrize("form", [name for name in FORMATS if name != "onnx"])
def test_every_form_computes_the_same_or_is_refused(form, widths, model_type, settings, run, tmp_path, token_ids):
    folder, model = run(model_type, widths, **settings)
    out = tmp_path / "out"
    unequal = model.config.model_type.startswith("compresso_")
    refused = {
        "stock": unequal,
        "nemotron-nas": FAMILIES[model_type].gguf_per_layer != "deci",
        "gguf": not_in_llama_cpp(model),
    }
    if refused.get(form):
        with pytest.raises(ValueError, match="--to "):
            export(folder, form, str(out), "f32")
        assert not out.exists()
        assert not list(tmp_path.glob("*out*"))
        return
    facts = export(folder, form, str(out), "f32")
    assert facts["checked"]
    rounded = form == "gguf" and model_type.startswith(
        ("gemma", "gpt_neox")
    )  # its GELU is looked up in half precision there
    assert facts["log_probability_difference"] < (1e-3 if rounded else 1e-4)
    assert json.loads((out / "export.json").read_text()) == facts
    if form in ("stock", "padded", "hf", "nemotron-nas"):
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(logits(loaded, token_ids), logits(model, token_ids), rtol=0, atol=1e-4)
        assert AutoTokenizer.from_pretrained(out)("say fox").input_ids
    if form in ("stock", "padded"):
        assert loaded.config.model_type in (model_type, "mistral")
        assert len(set(describe(loaded).layers)) == 1


def test_a_large_model_is_compared_in_its_own_numbers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[export.__module__], "EXACT_UP_TO", 0)
    folder, _ = run("llama", UNEQUAL)
    assert export(folder, "padded", str(tmp_path / "out"))["checked"]


def test_what_computes_something_else_is_not_left_behind(run, tmp_path, monkeypatch):
    folder, _ = run("llama", UNEQUAL)
    other = tiny_model("llama", vocab_size=320)
    monkeypatch.setattr(sys.modules[export.__module__], "pad", lambda model, layers: other)
    with pytest.raises(RuntimeError, match="a bug of compresso"):
        export(folder, "padded", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_damaged_weights_are_told(run, tmp_path):
    folder, model = run("llama", EQUAL)
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="weights may be damaged"):
        export(folder, "stock", str(tmp_path / "out"))


def test_positions_that_no_graph_can_hold_are_refused(run, tmp_path):
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope |= {"original_max_position_embeddings": 16, "factor": 16.0}
    folder, _ = run("llama", EQUAL, rope_parameters=longrope)
    with pytest.raises(ValueError, match=r"rope_type longrope.*an ONNX graph cannot hold"):
        export(folder, "onnx", str(tmp_path / "out"))


@pytest.mark.parametrize("form", ["stock", "padded"])
def test_a_number_of_heads_that_no_stock_class_takes_is_refused(form, tmp_path, tokenizer):
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    smaller = extract(model, gates_of(model, {"kv_group": [1, 1, 1], "hidden": [23]}))
    smaller.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"takes no 2 heads at a hidden size of 23.*--to hf"):
        export(str(tmp_path / "run"), form, str(tmp_path / "out"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "opt", "gpt_neox"])  # an export takes seconds
def test_onnx_generates_with_its_cache_what_transformers_does(model_type, run, tmp_path, token_ids):
    folder, model = run(model_type, DROPPED)
    assert export(folder, "onnx", str(tmp_path / "out"))["log_probability_difference"] < 1e-4
    runtime = Onnx(tmp_path / "out" / "model.onnx")
    said, given = [], token_ids[0]
    for _ in range(12):
        given = runtime.logits(given)[-1].argmax()[None]
        said.append(int(given))
    expected = model.generate(token_ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert said == expected[0, token_ids.shape[1] :].tolist()
