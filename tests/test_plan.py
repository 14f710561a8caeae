"""A plan meets its target, keeps the best, and survives the disk."""

import pytest
import torch
from safetensors.torch import save_file

from compresso import plan as plans
from compresso.plan import Plan, largest_sparsity, select
from compresso.shape import LayerShape, ModelShape

SMOLLM2 = ModelShape(576, 3, (LayerShape(3, 3, 64, 1536),) * 30)
ALL = ("kv_group", "intermediate", "hidden", "attention", "mlp")


def scores_for(shape, units, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {unit: torch.randn(sum(shape.sizes(unit)), generator=generator) for unit in units}


@pytest.mark.parametrize("target", [0.01, 0.1, 0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("units", [ALL, ALL[:3], ("intermediate",), ("hidden", "kv_group")])
@pytest.mark.parametrize("round_to", [1, 32, 64])
def test_the_removed_share_is_within_a_tenth_of_a_point(target, units, round_to):
    largest = largest_sparsity(SMOLLM2, units, round_to)
    scores = scores_for(SMOLLM2, units)
    if target > largest:
        with pytest.raises(ValueError, match=f"at most {largest:.4f}"):
            select(SMOLLM2, scores, target, round_to)
        return
    plan = select(SMOLLM2, scores, target, round_to)
    finest = 0.001 if "intermediate" in units and round_to == 1 else 0.0015 * round_to + 0.001
    if "intermediate" in units:
        finest = 0.001
    assert plan.sparsity == pytest.approx(target, abs=finest)
    if "intermediate" in units:
        assert all(w["intermediate_size"] % round_to == 0 for w in plan.widths())
    if "hidden" in units:
        assert len(plan.keep["hidden"][0]) % round_to == 0


def test_groups_alone_come_as_close_as_a_group_is_wide():
    plan = select(SMOLLM2, scores_for(SMOLLM2, ("kv_group",)), 0.1)
    one_group = SMOLLM2.layers[0].rows_per_group * 576 / 106_168_320
    assert abs(plan.sparsity - 0.1) <= one_group / 2 + 1e-9


def test_the_lowest_scores_go_first():
    scores = scores_for(SMOLLM2, ("intermediate",), seed=3)
    plan = select(SMOLLM2, scores, 0.3)
    kept = plan.gates["intermediate"] > 0
    assert scores["intermediate"][kept].min() >= scores["intermediate"][~kept].max()


def test_target_zero_keeps_every_unit():
    plan = select(SMOLLM2, scores_for(SMOLLM2, ALL), 0.0)
    assert all(bool((g == 1).all()) for g in plan.gates.values())


def test_every_layer_keeps_a_group_and_a_channel_unless_sublayers_may_go():
    plan = select(SMOLLM2, scores_for(SMOLLM2, ALL[:2]), 0.9)
    assert all(w["num_key_value_heads"] and w["intermediate_size"] for w in plan.widths())
    without = select(SMOLLM2, scores_for(SMOLLM2, ("attention", "mlp")), 0.5)
    assert any(w["num_key_value_heads"] == 0 for w in without.widths())


def test_a_rounding_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match="--round-to 4096"):
        select(SMOLLM2, scores_for(SMOLLM2, ("intermediate",)), 0.2, 4096)
    with pytest.raises(ValueError, match="--round-to 1000 alone removes"):
        select(SMOLLM2, scores_for(SMOLLM2, ("intermediate",)), 0.1, 1000)


def test_a_sublayer_and_its_units_go_together():
    shape = ModelShape(4, 3, (LayerShape(2, 2, 2, 5),) * 2)
    plan = Plan(shape, {"kv_group": torch.tensor([0.0, 0, 1, 1]), "mlp": torch.tensor([1.0, 0])})
    assert plan.gates["attention"].tolist() == [0, 1]
    assert plan.gates["intermediate"].tolist() == [1] * 5 + [0] * 5


@pytest.mark.parametrize(
    "gates",
    [
        {"hidden": torch.tensor([0.5, 1, 1, 1])},
        {"hidden": torch.zeros(4)},
        {"kv_group": torch.tensor([1.0])},
        {"kv_group": torch.tensor([1.0, float("nan"), 1, 1])},
        {"mlp": torch.tensor([2.0, 1])},
        {"heads": torch.ones(4)},
    ],
)
def test_impossible_gates_are_refused(gates):
    with pytest.raises(ValueError, match=r"gates|plan"):
        Plan(ModelShape(4, 3, (LayerShape(2, 2, 2, 5),) * 2), gates)


def test_a_saved_plan_is_the_same_plan(tmp_path):
    plan = select(SMOLLM2, scores_for(SMOLLM2, ALL), 0.3)
    plans.save(plan, tmp_path, {"method": "random"})
    loaded = plans.load(tmp_path)
    assert loaded.shape == plan.shape
    assert all(torch.equal(loaded.gates[u], g) for u, g in plan.gates.items())


def test_a_damaged_plan_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan"):
        plans.load(tmp_path)
    plans.save(select(SMOLLM2, scores_for(SMOLLM2, ALL), 0.3), tmp_path, {})
    (tmp_path / "plan.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        plans.load(tmp_path)
    save_file({"hidden": torch.ones(2)}, tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match="units"):
        plans.load(tmp_path)
