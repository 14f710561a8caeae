"""From scores to a Plan: how much goes where.

`uniform` takes the same share from every layer, as most published methods do; `standardised` makes scores of different
layers and kinds comparable, so that one threshold serves for all.
"""

import itertools
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from compresso import hard_concrete
from compresso.masks import is_closed
from compresso.plan import Plan, select
from compresso.shape import ModelShape
from compresso.widths import Widths

FAR = 0.05  # from the target: further away, equal widths are refused
MOST_SHARED = 0.9  # of the parameters of layers that also give what whole ones do not
UNEVEN = 0.005  # of the parameters: by how much a number of groups may miss the target, for the gates' sake


def uniform(
    shape: ModelShape,
    scores: dict[str, Tensor],
    target_sparsity: float,
    round_to: int = 1,
    groups_kept: Callable[[int, int], int] | None = None,
    experts_kept: int | None = None,
    hidden_kept: int | None = None,
    whole: Collection[int] = (),
) -> Plan:
    """Keep the best of every layer, the same share in all of them.

    With hidden channels, width and hidden size shrink by the same factor; without FFN channels or experts hidden
    channels give all. Groups are coarse: only those go that the share covers whole (as in FLAP's Wanda-sp), and FFN
    channels make up for the rest. So are experts; with channels, both shrink by the same factor. `groups_kept` may
    change the number of groups that this rule keeps, given it and how many there are; `experts_kept` is a number of
    experts, `hidden_kept` one of hidden channels, instead of the rule's. Layers that stay `whole`, by number, leave
    their share to the others.
    """
    rows_of = [*map(shape.rows, shape.layers)]
    shared = target_sparsity * sum(rows_of) / sum(rows for i, rows in enumerate(rows_of) if i not in whole)
    whole, left = (whole, 1 - shared) if shared < MOST_SHARED else ((), 1 - target_sparsity)
    gates = shape.open_gates()
    if "hidden" in scores:
        share = left**0.5 if {"intermediate", "expert"} & scores.keys() else left
        wanted = shape.hidden_size * share if hidden_kept is None else hidden_kept
        kept = _whole(wanted, shape.hidden_size, round_to)
        gates["hidden"] = best(scores["hidden"], kept)
        left *= shape.hidden_size / kept
    parts: dict[str, list[Tensor]] = {unit: [] for unit in shape.inner_units}
    before = {unit: gates[unit].split(shape.sizes(unit)) for unit in parts}
    of = {unit: scores[unit].split(shape.sizes(unit)) for unit in parts if unit in scores}
    for i, layer in enumerate(shape.layers):
        if i in whole:
            for unit, own in parts.items():
                own.append(before[unit][i])
            continue
        groups, channels, experts = layer.num_key_value_heads, layer.intermediate_size, layer.experts
        rows = left * shape.rows(layer)
        if "kv_group" in of and groups:
            narrows = of.keys() & {"intermediate", "expert"}
            share = left if narrows else (rows - layer.channels * shape.mlp_matrices) / layer.attention_rows
            kept = min(groups, max(1, math.ceil(groups * share - 1e-9)))
            groups = groups_kept(kept, groups) if groups_kept else kept
            parts["kv_group"].append(best(of["kv_group"][i], groups))
        else:
            parts["kv_group"].append(before["kv_group"][i])
        wanted = (rows - groups * layer.rows_per_group) / shape.mlp_matrices  # channels, of all experts
        if "expert" in of and experts:
            share = max(0.0, wanted / layer.channels)
            fewest = math.ceil(experts * share**0.5 - 1e-9) if "intermediate" in of else round(experts * share)
            experts = min(experts, max(shape.experts_per_token, experts_kept or fewest))
            parts["expert"].append(best(of["expert"][i], experts))
        elif "expert" in parts:
            parts["expert"].append(before["expert"][i])
        if "intermediate" in of and channels:
            wanted /= experts
            parts["intermediate"].append(best(of["intermediate"][i], _whole(wanted, channels, round_to)))
        else:
            parts["intermediate"].append(before["intermediate"][i])
    return Plan(shape, gates | {unit: torch.cat(values) for unit, values in parts.items()})


def decide(shape: ModelShape, log_alpha: dict[str, Tensor], target_sparsity: float, rules: Widths) -> Plan:
    """What goes, of learned gates."""
    if rules.uniform:
        probability = {unit: hard_concrete.prob_open(a) for unit, a in log_alpha.items()}
        closed = {unit: is_closed(a) for unit, a in log_alpha.items()}
        return equally_wide(shape, probability, target_sparsity, rules, closed)
    return select(shape, log_alpha, target_sparsity, rules.round_to)


def equally_wide(
    shape: ModelShape,
    open_probability: dict[str, Tensor],
    target_sparsity: float,
    rules: Widths,
    closed: dict[str, Tensor] | None = None,
) -> Plan:
    """The plan whose layers are equally wide that contradicts learned gates least.

    `open_probability` maps each kind of unit to the probability that each is open. Of every number of groups that the
    rules allow, with the FFN width that then meets the target, the one is taken that has the fewest parameters in units
    that it keeps and the gates would close, or the other way round. Hidden channels stay as many as are expected to be
    open. Units that are `closed` for good do not come back, as far as widths allow. Raises ValueError if the model's
    layers differ, or no widths that the rules allow come near the target.
    """
    if len(set(shape.layers)) > 1:
        raise ValueError("--shape uniform needs a model whose layers are equally wide; this one was pruned unequally")
    narrowest = min(shape.layers[0].intermediate_size, shape.hidden_size if "hidden" in open_probability else 10**9)
    if rules.round_to > narrowest:
        raise ValueError(f"widths in multiples of {rules.round_to} do not fit a width of {narrowest}")
    most = shape.layers[0].num_key_value_heads
    queries = shape.layers[0].queries_per_group
    allowed = [n for n in range(1, most + 1) if rules.allows(n, queries)] if "kv_group" in open_probability else [most]
    hidden = round(float(open_probability["hidden"].double().sum())) if "hidden" in open_probability else None
    experts: list[int | None] = [None]
    if "expert" in open_probability:
        experts = list(range(shape.experts_per_token, shape.layers[0].experts + 1))
    plans = [
        uniform(shape, open_probability, target_sparsity, rules.round_to, lambda *_, n=n: n, e, hidden)
        for n, e in itertools.product(allowed, experts)
    ]
    gone = {unit: which.cpu() for unit, which in (closed or {}).items()}
    nested = [plan for plan in plans if not any((plan.gates[unit][which] > 0).any() for unit, which in gone.items())]
    plans = nested or plans  # hidden channels that went since may leave FFNs wider than before
    nearest = min((abs(plan.sparsity - target_sparsity) for plan in plans), default=1.0)
    if nearest > FAR and not any(which.any() for which in gone.values()):  # else it is what `--also` has left
        found = ", ".join(f"{sparsity:.3f}" for sparsity in sorted({plan.sparsity for plan in plans})) or "nothing"
        raise ValueError(
            f"equal widths by these rules remove {found} of the prunable parameters, and {target_sparsity} was asked "
            "for; choose one of these, or another --shape or --units"
        )
    plans = [plan for plan in plans if abs(plan.sparsity - target_sparsity) <= max(nearest, UNEVEN)]
    return min(plans, key=lambda plan: _contradiction(shape, open_probability, plan))


def _contradiction(shape: ModelShape, open_probability: dict[str, Tensor], plan: Plan) -> float:
    """Expected parameters in units whose gates differ from the plan, in rows of a hidden channel each."""
    return sum(
        shape.price(unit)[0] * float((plan.gates[unit] - p.double().cpu()).abs().sum())
        for unit, p in open_probability.items()
        if unit in shape.inner_units
    )


def standardised(shape: ModelShape, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores less their mean over their standard deviation, for each kind in each layer."""
    found = {}
    for unit, values in scores.items():
        parts = [part.double() for part in values.split(shape.sizes(unit)) if len(part)]
        found[unit] = torch.cat([(p - p.mean()) / p.std(correction=0).clamp(min=1e-12) for p in parts])
    return found


def whole_layers(shape: ModelShape, scores: Tensor, target_sparsity: float) -> Plan:
    """Without the layers of lowest score (L,), as many as come nearest to the target; at least one stays."""
    sizes = torch.tensor([*map(shape.rows, shape.layers)])
    order = scores.argsort(stable=True)
    removed = torch.cat([sizes.new_zeros(1), sizes[order[:-1]].cumsum(0)])  # by the first 0, 1, 2, ... of them
    count = int((removed - target_sparsity * float(sizes.sum())).abs().argmin())
    stays = torch.ones(len(scores), dtype=torch.float64)
    stays[order[:count]] = 0
    return Plan(shape, {"attention": stays, "mlp": stays})


def best(scores: Tensor, kept: int) -> Tensor:
    """1 for the `kept` units of highest score, 0 for the others; of equal ones the first."""
    gates = torch.zeros(len(scores), dtype=torch.float64)
    gates[scores.double().argsort(descending=True, stable=True)[:kept]] = 1
    return gates


def _whole(wanted: float, of: int, grain: int) -> int:
    """The multiple of `grain` nearest to `wanted`, at least one and no more than there are."""
    return min(of - of % grain, max(grain, round(wanted / grain) * grain))
