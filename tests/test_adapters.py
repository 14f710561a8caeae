"""Adapters computed our way are peft's: values, gradients, merged weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from compresso import PruneConfig
from compresso.adapters import add_lora, inside, merge
from tiny import tiny_model


def randomized(wrapped):
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_adapters_give_pefts_values_and_gradients(token_ids, model_type, dtype):
    model = tiny_model(model_type).to(dtype)
    config = PruneConfig(lora_rank=4, lora_alpha=12)
    theirs = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ours = add_lora(model, config, seed=0)
    theirs.load_state_dict(randomized(ours).state_dict())
    results = []
    for wrapped in (theirs, ours):
        logits = wrapped(token_ids).logits
        logits.float().square().mean().backward()
        gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
        results.append((logits.detach(), gradients))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # processors add halves up in their own ways
    for name, gradient in results[0][1].items():
        assert gradient.dtype == results[1][1][name].dtype == torch.float32
        error = (results[1][1][name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error}"
    assert (results[1][0] - results[0][0]).norm() / results[0][0].norm() < tolerance


def test_merging_leaves_the_stock_model_with_the_same_logits(token_ids):
    wrapped = randomized(add_lora(tiny_model("qwen2"), PruneConfig(), seed=0))
    with torch.no_grad():
        before = inside(wrapped)(token_ids).logits
        merged = merge(wrapped)
        torch.testing.assert_close(merged(token_ids).logits, before, rtol=1e-4, atol=1e-4)
    assert all("lora" not in name for name, _ in merged.named_modules())


def test_dropout_is_still_applied(token_ids):
    wrapped = randomized(add_lora(tiny_model("llama"), PruneConfig(lora_dropout=0.5), seed=0)).train()
    with torch.no_grad():
        assert not torch.equal(inside(wrapped)(token_ids).logits, inside(wrapped)(token_ids).logits)
