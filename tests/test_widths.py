"""Kept widths obey `--shape`: in every layer, at the target, with the units that the gates would keep."""

import json

import pytest
import torch
from transformers import AutoConfig

import compresso
from compresso.allocation import decide, equally_wide
from compresso.config import PruneConfig
from compresso.hard_concrete import prob_open
from compresso.masks import CLOSED, Masks
from compresso.shape import LayerShape, ModelShape
from compresso.widths import Widths, parse
from tiny import QUICK

SHAPE = ModelShape(64, 3, (LayerShape(8, 2, 8, 256),) * 4)
UNITS = ("kv_group", "intermediate")


def log_alpha(seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return {unit: spread * torch.randn(sum(SHAPE.sizes(unit)), generator=generator) for unit in UNITS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("free", Widths()),
        ("uniform", Widths(uniform=True)),
        ("vllm", Widths(uniform=True, round_to=128)),
        ("llama.cpp", Widths(round_to=256)),
        ("tp:8", Widths(uniform=True, round_to=128, groups=8)),
        ("multiple:96", Widths(round_to=96)),
    ],
)
def test_shapes_are_read(text, expected):
    assert parse(text) == expected
    assert parse(text, 7).round_to == 7 * expected.round_to


@pytest.mark.parametrize("text", ["", "unifrom", "tp", "tp:", "tp:0", "tp:x", "uniform:2", "multiple:-1", "free:1"])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match=r"unknown --shape .*tp:N, vllm"):
        PruneConfig(shape=text)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("rules", [Widths(uniform=True), Widths(uniform=True, round_to=8), Widths(True, 8, 4)])
def test_layers_are_equally_wide_and_meet_the_target(target, rules):
    plan = equally_wide(SHAPE, {u: prob_open(a) for u, a in log_alpha().items()}, target, rules)
    width = plan.widths()[0]
    assert all(other == width for other in plan.widths())
    assert rules.allows(width["num_key_value_heads"], width["num_attention_heads"] // width["num_key_value_heads"])
    assert width["intermediate_size"] % rules.round_to == 0
    assert plan.sparsity == pytest.approx(target, abs=0.02 if rules.round_to > 1 else 0.003)


def test_each_layer_keeps_its_best_units():
    scores = log_alpha()
    plan = equally_wide(SHAPE, {u: prob_open(a) for u, a in scores.items()}, 0.3, Widths(uniform=True))
    for unit in UNITS:
        for values, gates in zip(
            scores[unit].split(SHAPE.sizes(unit)), plan.gates[unit].split(SHAPE.sizes(unit)), strict=True
        ):
            kept = gates > 0
            assert kept.all() or values[kept].min() > values[~kept].max()


def test_groups_go_where_the_gates_close_groups():
    closed = {"kv_group": torch.full((32,), 5.0), "intermediate": torch.full((1024,), 5.0)}
    closed["kv_group"].view(4, 8)[:, :4] = -5
    plan = equally_wide(SHAPE, {u: prob_open(a) for u, a in closed.items()}, 0.18, Widths(uniform=True))
    assert [width["num_key_value_heads"] for width in plan.widths()] == [4] * 4


def test_levelled_gates_close_as_many_units_in_each_layer_and_keep_their_order():
    masks = Masks(SHAPE, dict.fromkeys(UNITS, 0.0))
    for i, (unit, values) in enumerate(log_alpha(spread=1.0).items()):
        uneven = torch.cat([part + 2 * j for j, part in enumerate(values.split(SHAPE.sizes(unit)))])
        masks.log_alpha[unit].data = uneven - i
    before = {unit: a.detach().clone() for unit, a in masks.log_alpha.items()}
    masks.level()
    for unit, a in masks.log_alpha.items():
        parts = a.detach().split(SHAPE.sizes(unit))
        bound = torch.cat(parts).quantile(1 - float(prob_open(before[unit]).mean()))
        counts = [int((part < bound).sum()) for part in parts]
        assert max(counts) - min(counts) <= max(1, 0.1 * len(parts[0]))
        for old, new in zip(before[unit].split(SHAPE.sizes(unit)), parts, strict=True):
            assert torch.equal(old.argsort(), new.argsort())


@pytest.mark.parametrize("rules", [Widths(True), Widths(True, 128), Widths(True, 32, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_what_was_closed_for_good_does_not_come_back(rules, seed):
    """As `--also` closes it, where widths are coarse and another number of groups lies nearer to the target."""
    scores = log_alpha(seed)
    for target in (0.08, 0.12, 0.19, 0.28, 0.4):
        plan = decide(SHAPE, scores, target, rules)
        for unit, gates in plan.gates.items():
            if unit in scores:
                assert not (gates[scores[unit] == CLOSED] > 0).any()
                scores[unit] = scores[unit].masked_fill(gates == 0, CLOSED)


def test_equal_widths_cut_as_many_hidden_channels_as_the_gates_closed():
    scores = {**log_alpha(), "hidden": torch.full((64,), 8.0)}
    assert len(decide(SHAPE, scores, 0.3, Widths(True)).keep["hidden"][0]) == 64
    scores["hidden"][:10] = -8
    plan = decide(SHAPE, scores, 0.3, Widths(True))
    assert plan.keep["hidden"][0].tolist() == list(range(10, 64))
    assert plan.sparsity == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(("ranks", "allowed"), [(2, [2, 4]), (4, [4]), (8, [8])])
def test_query_heads_can_be_split_too(ranks, allowed):
    """Of one group with three query heads no half can be given to each of two processes."""
    rules = parse(f"tp:{ranks}")
    assert [n for n in range(1, 9) if rules.allows(n, 3)] == [n for n in range(1, 9) if n % ranks == 0]
    assert rules.allows(1, 8)
    assert all(rules.allows(n, 1) for n in allowed)


def test_what_equal_widths_cannot_reach_is_said():
    with pytest.raises(ValueError, match=r"remove .* of the prunable parameters, and 0.1 was asked for"):
        equally_wide(SHAPE, {"kv_group": torch.ones(32)}, 0.1, Widths(uniform=True, groups=8))
    with pytest.raises(ValueError, match=r"multiples of 512 do not fit a width of 256"):
        equally_wide(SHAPE, {"intermediate": torch.ones(1024)}, 0.3, Widths(uniform=True, round_to=512))


@pytest.mark.parametrize("method", ["l0", "wanda"])
def test_a_run_with_equal_widths_ends_as_a_stock_model(method, checkpoint, data, tmp_path):
    config = {**QUICK, "model": str(checkpoint), "data": str(data), "shape": "uniform", "target_sparsity": 0.3}
    also = {"also": (0.15,)} if method == "l0" else {}
    summary = compresso.prune(**config, **also, method=method, output=str(tmp_path / "run"))
    assert summary["sparsity"] == pytest.approx(0.3, abs=0.01)
    for folder in (tmp_path / "run", *((tmp_path / "run/also").glob("*"))):
        widths = json.loads((folder / "plan.json").read_text())["widths"]
        assert all(width == widths[0] for width in widths)
        assert AutoConfig.from_pretrained(folder / "model").model_type in ("llama", "mistral")
