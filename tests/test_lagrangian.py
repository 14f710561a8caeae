"""The constraint reaches its target in runs of any length, and asks nothing at target zero."""

import pytest
import torch
from constraint import SHAPE, toy_run

from compresso import hard_concrete
from compresso.lagrangian import Lagrangian, initial_log_alpha, make_schedule, shift
from compresso.masks import Masks


@pytest.mark.parametrize(
    ("steps", "target"), [*((s, t) for s in (20, 60, 300) for t in (0.05, 0.2, 0.5, 0.8)), (3000, 0.3)]
)
def test_the_target_is_reached_within_half_a_point(steps, target):
    rows, _ = toy_run(steps, target)
    assert rows[-1][1] == pytest.approx(target, abs=0.005)
    late = [reached for phase, reached, _ in rows if phase == "hold"][-max(2, len(rows) // 10) :]
    assert max(abs(reached - target) for reached in late) < 0.005


@pytest.mark.parametrize("units", [("kv_group",), ("intermediate",), ("hidden",), ("attention", "mlp")])
def test_every_kind_of_unit_alone_reaches_the_target(units):
    rows, _ = toy_run(60, 0.2, units)
    assert rows[-1][1] == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("form", ["linear", "cubic"])
def test_the_ramp_is_followed(form):
    rows, _ = toy_run(600, 0.4, form=form)
    assert max(abs(reached - target) for _, reached, target in rows) < 0.005
    targets = [target for *_, target in rows]
    assert targets == sorted(targets)
    middle = targets[len(targets) * 3 // 10]
    assert (middle > 0.25) == (form == "cubic")


def test_units_that_matter_more_are_more_open():
    _, masks = toy_run(600, 0.5)
    torch.manual_seed(0)
    worth = {unit: torch.rand(a.shape) ** 4 for unit, a in masks.log_alpha.items()}
    a, w = masks.log_alpha["intermediate"].detach(), worth["intermediate"]
    assert a[w > 0.5].mean() > a[w < 0.05].mean() + 1


def test_lambda_1_ascends_while_the_constraint_cannot_be_met():
    schedule = make_schedule(10, 0.0, 0.5, 0.9999, "linear")
    masks = Masks(SHAPE, {"intermediate": 2.0})  # FFN channels alone cannot give that much
    lagrangian = Lagrangian(schedule, masks)
    values = []
    for step in range(5, 9):
        reached, target = lagrangian.step(masks, step)
        assert reached < target - 0.1
        values.append(lagrangian.lambda_1)
    assert values == sorted(values, reverse=True)  # too dense: lambda_1 (s - t) rewards sparsity more and more
    assert values[-1] < values[0] < 0


def test_a_shift_keeps_the_order_of_units():
    masks = Masks(SHAPE, {"intermediate": 0.0})
    with torch.no_grad():
        masks.log_alpha["intermediate"].normal_(generator=torch.Generator().manual_seed(0))
    order = masks.log_alpha["intermediate"].argsort()
    shift(masks, 0.3)
    assert float(masks.expected_sparsity().detach()) == pytest.approx(0.3, abs=1e-6)
    assert torch.equal(masks.log_alpha["intermediate"].argsort(), order)


def ranked_masks():
    masks = Masks(SHAPE, {"intermediate": 0.0})
    with torch.no_grad():
        masks.log_alpha["intermediate"].normal_(2, 2, generator=torch.Generator().manual_seed(0))
    return masks


def test_gates_stay_where_they_are_if_more_is_closed_for_good_than_wanted():
    """As where a plan on the way closes more than its target, because widths are coarse."""
    masks = ranked_masks()
    values = masks.log_alpha["intermediate"]
    masks.pin_closed("intermediate", values.detach() < values.detach().quantile(0.4))
    before = values.detach().clone()
    shift(masks, 0.5 * float(masks.expected_sparsity().detach()))
    assert torch.equal(values.detach(), before)


def test_the_target_waits_for_units_that_are_closed_for_good():
    masks = ranked_masks()
    schedule = make_schedule(100, 0.0, 0.0, 0.6, "linear")
    lagrangian = Lagrangian(schedule, masks)
    lagrangian.start = 0.0
    reached = [lagrangian.step(masks, step)[0] for step in range(30)]
    values = masks.log_alpha["intermediate"]
    masks.pin_closed("intermediate", values.detach() < values.detach().quantile(0.3))
    lagrangian.wait_here(masks)
    closed, before = float(masks.expected_sparsity().detach()), values.detach().clone()
    assert closed > reached[-1] + 0.02, "what was half open has been closed"
    rows = [(*lagrangian.step(masks, step), values.detach().clone()) for step in range(30, 100)]
    loosest = min(float((after - before)[before > -9].max()) for *_, after in rows)
    assert loosest < 0.1, "nothing is opened to make up for it"
    for got, target, _ in rows:
        assert got == pytest.approx(max(target, closed), abs=0.005)
    restored = Lagrangian(schedule, masks)
    restored.restore(lagrangian.state())
    assert restored.floor == lagrangian.floor == pytest.approx(closed)


@pytest.mark.parametrize("target", [0.01, 0.1, 0.9])
def test_the_start_is_almost_open(target):
    a = torch.tensor(initial_log_alpha("intermediate", target))
    assert float(hard_concrete.prob_zero(a)) == pytest.approx(min(0.05, target / 4), abs=1e-5)


def test_phases_share_the_steps():
    schedule = make_schedule(60, 0.1, 0.35, 0.2, "linear")
    phases = [schedule.phase(step) for step in range(60)]
    assert [phases.count(p) for p in ("lora", "ramp", "hold")] == [6, 33, 21]
    assert schedule.target(38, 0.05) == pytest.approx(0.2)
    assert make_schedule(1, 0.1, 0.35, 0.2, "linear").ramp == 1
