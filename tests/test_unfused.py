"""A Phi-3 becomes a Mistral that computes the same, and is pruned as one."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import compresso
from compresso import plan as plans
from compresso.config import PruneConfig
from compresso.estimate import estimate
from compresso.export import shapes_at
from compresso.shape import count_prunable
from compresso.streamed import extract_files
from test_extract import logits
from tiny import QUICK, random_plan, tiny_model


@pytest.fixture
def finished_plan(tmp_path):
    """A folder with some plan."""
    folder = tmp_path / "plan"
    folder.mkdir()
    plans.save(random_plan(tiny_model("llama")), folder, {})
    return folder


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [2.0] * 4}


def phi3(**settings):
    torch.manual_seed(0)
    values = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model("phi3", **values, eos_token_id=2, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sliding_window": 4},
        {"tie_word_embeddings": True},
        {"rope_parameters": LONG, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
    ],
)
@pytest.mark.parametrize("tokens", [9, 30])
def test_it_computes_the_same(settings, tokens, tokenizer, tmp_path):
    model = phi3(**settings)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = compresso.load(tmp_path)
    assert loaded.config.model_type == "mistral"
    ids = torch.randint(3, 300, (2, tokens), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_heads_that_rotate_in_part_are_refused(tokenizer, tmp_path):
    phi3(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"rotates only 0.5 of each head"):
        compresso.load(tmp_path)


def test_reading_it_from_file_to_file_is_refused(tokenizer, finished_plan, tmp_path):
    phi3().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="taken apart when it is loaded whole"):
        extract_files(str(tmp_path / "dense"), finished_plan, tmp_path / "out")


def test_it_is_estimated_as_the_mistral(tokenizer, tmp_path):
    phi3().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = compresso.load(tmp_path)
    found = estimate(PruneConfig(model=str(tmp_path)))
    assert (found.parameters, found.prunable) == (sum(p.numel() for p in loaded.parameters()), count_prunable(loaded))
    with pytest.raises(ValueError, match="taken apart when it is loaded whole"):
        estimate(PruneConfig(model=str(tmp_path), precision="4bit"))


def test_what_loads_it_is_told_from_its_config(tokenizer, tmp_path):
    phi3().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shapes = shapes_at(str(tmp_path))
    loaded, _ = compresso.load(tmp_path)
    assert {name: p.shape for name, p in shapes.named_parameters()} == {
        name: p.shape for name, p in loaded.named_parameters()
    }


def test_it_is_pruned_into_a_mistral(tokenizer, data, tmp_path):
    phi3(max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    settings = {**QUICK, "model": str(tmp_path / "dense"), "data": str(data), "output": str(tmp_path / "run")}
    summary = compresso.prune(**{**settings, "distill": 0.3}, target_sparsity=0.3, shape="uniform")
    assert summary["max_logit_difference"] < 1e-3
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model_type"] == "mistral"
