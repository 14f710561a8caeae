"""Attention by products is the attention of transformers: values and gradients, with groups, windows and prefixes."""

import pytest
import torch

from compresso.batches import Batch, before_targets
from compresso.cpu_attention import NAME, products
from compresso.train import recomputed, target_loss
from tiny import tiny_model

IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, implementation: str, prompt: int, again: bool = False):
    model.config._attn_implementation = implementation
    model.zero_grad()
    batch = Batch(torch.arange(3, 3 + prompt), IDS, IDS, (IDS.shape[1],) * len(IDS), before_targets(IDS))
    with recomputed(model, again):
        loss = target_loss(model, batch)
        loss.backward()
    attention = [p for name, p in model.named_parameters() if "self_attn" in name and p.ndim > 1]
    return [loss.detach(), *(p.grad for p in attention)]


@pytest.mark.parametrize("prompt", [0, 30])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 12}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("opt", {"dropout": 0.0}),
    ],
)
def test_values_and_gradients_are_those_of_the_fused_kernel(model_type, settings, prompt):
    model = tiny_model(model_type, **settings).train()
    model.lm_head.requires_grad_(False)
    expected = loss_and_gradients(model, "sdpa", prompt)
    for again in (False, True):
        torch.testing.assert_close(loss_and_gradients(model, NAME, prompt, again), expected, rtol=1e-4, atol=1e-4)


def test_long_rows_keep_the_fused_kernel(monkeypatch):
    model = tiny_model("llama").train()
    model.lm_head.requires_grad_(False)
    expected = loss_and_gradients(model, "sdpa", 30)
    monkeypatch.setattr("compresso.cpu_attention.LONGEST", 10)
    monkeypatch.setattr("compresso.cpu_attention._Products", None)
    torch.testing.assert_close(loss_and_gradients(model, NAME, 30), expected, rtol=1e-4, atol=1e-4)


def test_it_is_used_in_half_precision_on_a_cpu_and_nowhere_else():
    for dtype, cpu, name in (
        (torch.bfloat16, True, NAME),
        (torch.float32, True, "sdpa"),
        (torch.bfloat16, False, "sdpa"),
    ):
        model = tiny_model("llama").to(dtype)
        with products(model, cpu):
            assert model.config._attn_implementation == name
        assert model.config._attn_implementation == "sdpa"
    torch.manual_seed(0)
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad(), products(model, True):
        ours = model(IDS).logits.float()
    with torch.no_grad():
        theirs = model(IDS).logits.float()
    assert (ours - theirs).norm() / theirs.norm() < 0.03
