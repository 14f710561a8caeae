"""What others measure to tell which units matter: for each unit that may go a number, higher is better.

Every function takes the workbench and gives, for each kind of unit that it knows, one flat tensor, layer after layer
(`ModelShape.sizes`), in float32.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.calibration import (
    Moments,
    calibration_batches,
    check_inputs,
    input_moments,
    output_paths,
    record_norms,
    weight_gradients,
)
from compresso.families import UNITS, Family, family_of
from compresso.float64 import in_float64
from compresso.shape import describe, has
from compresso.workbench import Workbench

Scores = dict[str, Tensor]


def random(bench: Workbench) -> Scores:
    """No knowledge: what any method must beat."""
    generator = torch.Generator().manual_seed(bench.config.seed)
    shape = describe(bench.model)
    return {unit: torch.rand(sum(shape.sizes(unit)), generator=generator) for unit in shape.inner_units}


def magnitude(bench: Workbench) -> Scores:
    """L2 norm of a unit's own weights, in all matrices that it is part of (LLM-Pruner's `l2`, arXiv 2305.11627)."""
    return {unit: value.sqrt() for unit, value in _over_unit(bench.model, lambda _, w: w.float().square()).items()}


def wanda(bench: Workbench) -> Scores:
    """Wanda-sp: mean over a column of |W| times the norm of its input (arXiv 2306.11695; FLAP, 2312.11983)."""

    def score(weight: Tensor, moments: Moments) -> Tensor:
        return weight.abs().mean(0) * moments.squares.sqrt()

    return _of_columns(bench, score)


def flap(bench: Workbench, moments: dict[str, Moments] | None = None) -> Scores:
    """Fluctuation: variance of an input times the squared norm of its column (WIFV, arXiv 2312.11983, equation 5).

    As in the published code that of attention is squared, all are standardised over the columns of their layer, and a
    group has the mean of its columns. So scores compare between layers and kinds (section 3.3).
    """

    def score(weight: Tensor, moments: Moments) -> Tensor:
        return weight.square().sum(0) * moments.variance

    def standardised(unit: str, columns: Tensor) -> Tensor:
        columns = in_float64(columns)
        values = columns.square() if unit == "kv_group" else columns
        return ((values - values.mean()) / values.std().clamp(min=torch.finfo().tiny)).float()

    return _of_columns(bench, score, moments, standardised)


def taylor(bench: Workbench) -> Scores:
    """First order: the sum over a unit's weights of |w dL/dw| (LLM-Pruner's `param_first`, arXiv 2305.11627, eq. 5)."""
    first, _ = weight_gradients(bench.model, calibration_batches(bench, backward=True), _matrices(bench.model))
    return _over_unit(bench.model, lambda name, w: (w.float() * first[name]).abs())


def taylor_second(bench: Workbench) -> Scores:
    """Second order: |w dL/dw - w^2 h / 2|, h the mean square of a record's gradient (LLM-Pruner's `param_mix`,
    eq. 5)."""
    given = calibration_batches(bench, backward=True, single=True)
    first, second = weight_gradients(bench.model, given, _matrices(bench.model), squares=True)

    def score(name: str, w: Tensor) -> Tensor:
        return (w.float() * first[name] - w.float().square() * second[name] / 2).abs()

    return _over_unit(bench.model, score)


def minitron(bench: Workbench) -> Scores:
    """Norm of a group's outputs, size of an FFN channel, of a hidden channel after the norms (arXiv 2407.14679, section
    2.2)."""
    model = bench.model
    family, shape = family_of(model.config.model_type), describe(model)
    check_inputs(model.config.model_type)
    norms = [
        f"{family.layers}.{i}.{path}"
        for i, layer in enumerate(model.get_submodule(family.layers))
        for path in (family.attention_norms[0], family.mlp_norms[0])
        if has(layer, path)
    ]
    places = [*output_paths(model)]

    def group_norms(groups: int, x: Tensor, _: Tensor) -> Tensor:
        return x.view(len(x), groups, -1).norm(dim=-1)

    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        path: partial(group_norms, shape.layers[i].num_key_value_heads) if unit == "kv_group" else lambda x, _: x.abs()
        for i, unit, path in places
    }
    measures |= dict.fromkeys([*norms, family.final_norm], lambda _, out: out.abs())
    found = record_norms(model, calibration_batches(bench, single=True), measures)
    hidden = torch.stack([found[path] for path in (*norms, family.final_norm)]).sum(0)
    parts = {of: torch.cat([found[path] for _, unit, path in places if unit == of]) for of in UNITS[:2]}
    return {unit: values.cpu() for unit, values in {**parts, "hidden": hidden}.items()}


def _of_columns(
    bench: Workbench,
    score: Callable[[Tensor, Moments], Tensor],
    moments: dict[str, Moments] | None = None,
    scaled: Callable[[str, Tensor], Tensor] = lambda unit, columns: columns,
) -> Scores:
    """Scores of the columns of the output matrices, `scaled` for their kind in each layer; of a group the mean of its
    columns. Moments are measured if need be."""
    model = bench.model
    shape = describe(model)
    moments = moments or input_moments(model, calibration_batches(bench))
    parts: dict[str, list[Tensor]] = {"kv_group": [], "intermediate": []}
    for i, unit, path in output_paths(model):
        columns = scaled(unit, score(model.get_submodule(path).weight.detach().float(), moments[path]))
        if unit == "kv_group":
            columns = columns.view(shape.layers[i].num_key_value_heads, -1).mean(1)
        parts[unit].append(columns.cpu())
    return {unit: torch.cat(values) for unit, values in parts.items()}


def _matrices(model: PreTrainedModel) -> list[str]:
    """Names of the weights that units are made of."""
    family = family_of(model.config.model_type)
    paths = (*family.attention_inputs, family.attention_output, *family.mlp_inputs, family.mlp_output)
    layers = model.get_submodule(family.layers)
    return [f"{family.layers}.{i}.{family.weight(p)}" for i, layer in enumerate(layers) for p in paths if has(layer, p)]


@torch.no_grad()
def _over_unit(model: PreTrainedModel, of_weight: Callable[[str, Tensor], Tensor]) -> Scores:
    """Sum of `of_weight` over all weights of each unit: rows of the matrices before it, columns of the one after, all
    of both for an expert."""
    family, shape = family_of(model.config.model_type), describe(model)
    parts: dict[str, list[Tensor]] = {unit: [] for unit in shape.inner_units}
    for unit, own in parts.items():
        for i, count in enumerate(shape.sizes(unit)):
            total = torch.zeros(count)
            for path, dim in _members(family, unit) if count else ():
                name = f"{family.layers}.{i}.{family.weight(path)}"
                each = of_weight(name, model.get_parameter(name).detach()).movedim(dim, 0).flatten(1).sum(1)
                if unit == "intermediate":  # of experts there are those of gate, then those of up
                    total += each.view(-1, count).sum(0).cpu()
                else:
                    total += each.view(count, -1).sum(1).cpu()
            own.append(total)
    return {unit: torch.cat(values) for unit, values in parts.items()}


def _members(family: Family, unit: str) -> list[tuple[str, int]]:
    """Matrices that units of a kind are part of, and the dimension along which each has its own."""
    if unit == "kv_group":
        return [*((path, -2) for path in family.attention_inputs), (family.attention_output, -1)]
    inputs, output = (0, 0) if unit == "expert" else (-2, -1)
    return [*((path, inputs) for path in family.mlp_inputs), (family.mlp_output, output)]
