"""What others measure to tell which units matter: for each unit that may go a number, higher is better.

Every function takes the workbench and gives, for each kind of unit that it knows, one flat tensor, layer after layer
(`ModelShape.sizes`), in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.calibration import (
    Moments,
    calibration_batches,
    input_moments,
    output_norms,
    output_paths,
    weight_gradients,
)
from compresso.families import Family, family_of
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
    """Fluctuation: variance of an input times the squared norm of its column (WIFV, arXiv 2312.11983, equation 5)."""

    def score(weight: Tensor, moments: Moments) -> Tensor:
        return weight.square().sum(0) * moments.variance

    return _of_columns(bench, score, moments)


def taylor(bench: Workbench) -> Scores:
    """First order: the sum over a unit's weights of |w dL/dw| (LLM-Pruner's `param_first`, arXiv 2305.11627, eq. 5)."""
    first, _ = weight_gradients(bench.model, calibration_batches(bench, backward=True), _matrices(bench.model))
    return _over_unit(bench.model, lambda name, w: (w.float() * first[name]).abs())


def taylor_second(bench: Workbench) -> Scores:
    """Second order: |w dL/dw - w^2 h / 2|, h the mean square of the gradient (LLM-Pruner's `param_mix`, eq. 5)."""
    first, second = weight_gradients(bench.model, calibration_batches(bench, backward=True), _matrices(bench.model))

    def score(name: str, w: Tensor) -> Tensor:
        return (w.float() * first[name] - w.float().square() * second[name] / 2).abs()

    return _over_unit(bench.model, score)


def minitron(bench: Workbench) -> Scores:
    """Activations of a head, of an FFN channel, of a hidden channel after the norms (arXiv 2407.14679, section 2.2)."""
    model = bench.model
    family, shape = family_of(model.config.model_type), describe(model)
    norms = [
        f"{family.layers}.{i}.{path}"
        for i, layer in enumerate(model.get_submodule(family.layers))
        for path in (family.attention_norms[0], family.mlp_norms[0])
        if has(layer, path)
    ]
    given = calibration_batches(bench)
    hidden = torch.stack([*output_norms(model, given, [*norms, family.final_norm]).values()]).sum(0)
    moments = input_moments(model, calibration_batches(bench))  # another pass, which the account shows
    parts: dict[str, list[Tensor]] = {"kv_group": [], "intermediate": []}
    for i, unit, path in output_paths(model):
        found = moments[path]
        if unit == "kv_group":  # the norm of a group's outputs
            parts[unit].append(found.squares.view(shape.layers[i].num_key_value_heads, -1).sum(1).sqrt())
        else:
            parts[unit].append(found.absolute / found.tokens)
    return {**{unit: torch.cat(values).cpu() for unit, values in parts.items()}, "hidden": hidden.cpu()}


def _of_columns(
    bench: Workbench, score: Callable[[Tensor, Moments], Tensor], moments: dict[str, Moments] | None = None
) -> Scores:
    """Scores of the columns of the output matrices, summed over those of a group; moments are measured if need be."""
    model = bench.model
    shape = describe(model)
    moments = moments or input_moments(model, calibration_batches(bench))
    parts: dict[str, list[Tensor]] = {"kv_group": [], "intermediate": []}
    for i, unit, path in output_paths(model):
        columns = score(model.get_submodule(path).weight.detach().float(), moments[path])
        if unit == "kv_group":
            columns = columns.view(shape.layers[i].num_key_value_heads, -1).sum(1)
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
