"""Cutting closed units out of a model in training changes its cost, and nothing that it computes."""

import pytest
import torch

import compresso
from compresso import PruneConfig, tuning
from compresso.adapters import inside, merge
from compresso.exact_adamw import ExactAdamW
from compresso.lagrangian import shift
from compresso.masks import CLOSED, Gates, Masks
from compresso.plan import select
from compresso.shape import count_prunable, describe
from compresso.shrink import Shrinking
from tiny import tiny_model

CONFIG = PruneConfig(target_sparsity=0.4)


def trained(model_type: str, shrink: bool, token_ids: torch.Tensor, round_to: int = 1, tune: str = "lora"):
    """Six steps with a quarter of the gates closed for good; the losses, the plan, and the merged model."""
    model = tiny_model(model_type)
    shape = describe(model)
    wrapped = tuning.start(model, tune, CONFIG, seed=0)
    masks = Masks(shape, {"kv_group": 4.0, "intermediate": 4.0})
    torch.manual_seed(3)
    with torch.no_grad():
        for a in masks.log_alpha.values():
            a.copy_(torch.where(torch.rand(len(a)) < 0.25, CLOSED, 7.0))
    for unit, a in masks.log_alpha.items():
        masks.pin_closed(unit, a.detach() == CLOSED)  # those too that widths in few values spare
    gates = Gates(inside(wrapped), shape)
    shrinking = Shrinking(inside(wrapped), gates, masks, 0.4, round_to)
    optimizer = ExactAdamW((p for p in wrapped.parameters() if p.requires_grad), 1e-2 if tune == "lora" else 1e-3)
    noise = torch.Generator().manual_seed(0)
    losses, sizes = [], []
    for step in range(6):
        if shrink and step in (2, 3):
            shrinking.cut(optimizer)
        gates.set(masks.sample(noise))
        loss = inside(wrapped)(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        sizes.append(count_prunable(inside(wrapped)))
    plan = select(shape, {u: a.detach() for u, a in masks.log_alpha.items()}, 0.4, round_to)
    gates.remove()
    merged = merge(wrapped)
    if shrink:
        shrinking.restore()
    return losses, plan, merged, sizes


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "opt", "gpt_neox"])
def test_a_model_that_shrinks_learns_the_same_at_a_lower_cost(model_type, tune, token_ids):
    losses, plan, model, sizes = trained(model_type, False, token_ids, tune=tune)
    shrunk_losses, shrunk_plan, shrunk, shrunk_sizes = trained(model_type, True, token_ids, tune=tune)
    assert shrunk_losses == pytest.approx(losses, rel=1e-4)
    assert shrunk_sizes[0] == sizes[0] == sizes[-1]
    assert shrunk_sizes[-1] < 0.9 * sizes[-1]
    for unit, gate in plan.gates.items():
        assert torch.equal(gate, shrunk_plan.gates[unit])
    assert describe(shrunk) == describe(model)
    with torch.no_grad():
        expected = compresso.extract(model, plan)(token_ids).logits
        torch.testing.assert_close(compresso.extract(shrunk, plan)(token_ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_cut_unit_stays_closed_whatever_moves_the_gates():
    shape = describe(tiny_model("llama"))
    masks = Masks(shape, {"kv_group": 2.0, "intermediate": 2.0})
    gone = torch.zeros(len(masks.log_alpha["intermediate"]), dtype=torch.bool)
    gone[5:20] = True
    masks.pin_closed("intermediate", gone)
    shift(masks, 0.05)
    masks.clamp()
    drawn = masks.sample(torch.Generator().manual_seed(0))["intermediate"]
    assert (drawn[gone] == 0).all()
    assert (drawn[~gone] > 0).any()
    assert float(masks.prob_open()["intermediate"][gone].detach().max()) < 1e-5
    plan = select(shape, {u: a.detach() for u, a in masks.log_alpha.items()}, 0.3)
    assert (plan.gates["intermediate"][gone] == 0).all()


@pytest.mark.parametrize("round_to", [1, 8, 16, 40])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.6])
def test_what_is_cut_is_never_more_than_a_plan_removes(target, round_to, monkeypatch):
    monkeypatch.setattr("compresso.shrink.RARELY_OPEN", 1.0)
    for seed in range(5):
        model = tiny_model("llama", num_key_value_heads=4, intermediate_size=84).requires_grad_(False)
        shape = describe(model)
        masks = Masks(shape, {"kv_group": 0.0, "intermediate": 0.0})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for a in masks.log_alpha.values():
                a.copy_(4 * torch.randn(len(a), generator=generator))
        shrinking = Shrinking(model, Gates(model, shape), masks, target, round_to)
        cut = shrinking.cut(ExactAdamW([torch.nn.Parameter(torch.zeros(1))], 1e-3))
        try:
            plan = select(shape, {u: a.detach() for u, a in masks.log_alpha.items()}, target, round_to)
        except ValueError:  # such multiples cannot meet the target
            continue
        assert cut == sum(int(pinned.sum()) for pinned in masks.pinned.values())
        for unit, pinned in masks.pinned.items():
            assert not plan.gates[unit][pinned].any(), unit
        if round_to == 1:
            assert 1 - count_prunable(model) / count_prunable(
                tiny_model("llama", num_key_value_heads=4, intermediate_size=84)
            ) == pytest.approx(target, abs=0.08)


def test_a_run_that_shrinks_checks_and_reloads_like_any_other(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr("compresso.shrink.RARELY_OPEN", 1.0)  # a run this short has no settled gates
    cut = []
    original = Shrinking.cut
    monkeypatch.setattr(Shrinking, "cut", lambda self, optimizer: cut.append(original(self, optimizer)) or cut[-1])
    settings = {"steps": 12, "recover_steps": 2, "max_length": 48, "prompt": "short", "target_sparsity": 0.3}
    summary = compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / "run"), **settings)
    assert sum(cut) > 0
    assert summary["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert summary["max_logit_difference"] < 1e-3
