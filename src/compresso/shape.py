"""What a model is made of, read off its weights, and the one count of its prunable parameters.

Gates are passed as a dict from unit to one flat tensor, layer after layer;
`ModelShape.sizes` tells how to split it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.families import UNITS, Family, family_of

BINARY = ("hidden", "expert")
"""Units that a plan keeps or removes, and does not scale."""


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. A removed sub-layer has width 0."""

    num_key_value_heads: int
    queries_per_group: int
    head_dim: int
    intermediate_size: int
    """Of a mixture, that of each expert."""
    num_experts: int | None = None
    """None where the FFN is no mixture."""

    @property
    def experts(self) -> int:
        """How many FFNs of this width there are."""
        return 1 if self.num_experts is None else self.num_experts

    @property
    def channels(self) -> int:
        """FFN channels of all experts."""
        return self.experts * self.intermediate_size

    @property
    def rows_per_group(self) -> int:
        """Rows of q, k, v and columns of o that one group owns."""
        return (2 * self.queries_per_group + 2) * self.head_dim

    @property
    def attention_rows(self) -> int:
        """Those of all groups."""
        return self.num_key_value_heads * self.rows_per_group

    @property
    def widths(self) -> dict[str, int]:
        """As configs name them."""
        return {
            "num_key_value_heads": self.num_key_value_heads,
            "num_attention_heads": self.num_key_value_heads * self.queries_per_group,
            "intermediate_size": self.intermediate_size,
            **({} if self.num_experts is None else {"num_experts": self.num_experts}),
        }

    def columns(self, unit: str) -> int:
        """Columns of the matrix behind it that one group or one FFN channel owns."""
        return self.head_dim * self.queries_per_group if unit == "kv_group" else 1


@dataclass(frozen=True)
class ModelShape:
    hidden_size: int
    mlp_matrices: int
    """3 with a gated FFN (gate, up, down), else 2."""
    layers: tuple[LayerShape, ...]
    experts_per_token: int = 1
    """How many experts each token of a mixture goes to: no layer keeps fewer."""

    @property
    def units(self) -> tuple[str, ...]:
        """The kinds of units that it has."""
        return tuple(u for u in UNITS if u != "expert" or self.layers[0].num_experts is not None)

    @property
    def inner_units(self) -> tuple[str, ...]:
        """Those of them that a sub-layer consists of."""
        return tuple(u for u in ("kv_group", "intermediate", "expert") if u in self.units)

    def rows(self, layer: LayerShape) -> int:
        """Rows of the prunable matrices of a layer: for each hidden channel so many parameters."""
        return layer.attention_rows + layer.channels * self.mlp_matrices

    def price(self, unit: str) -> list[int]:
        """Rows that go with one group, FFN channel or expert, one entry a layer."""
        match unit:
            case "kv_group":
                return [layer.rows_per_group for layer in self.layers]
            case "intermediate":
                return [layer.experts * self.mlp_matrices for layer in self.layers]
            case _:
                return [layer.intermediate_size * self.mlp_matrices for layer in self.layers]

    def sizes(self, unit: str) -> list[int]:
        """Number of units of this kind: one entry a layer, for `hidden` a single one."""
        match unit:
            case "kv_group":
                return [layer.num_key_value_heads for layer in self.layers]
            case "intermediate":
                return [layer.intermediate_size for layer in self.layers]
            case "expert":
                return [layer.experts for layer in self.layers]
            case "hidden":
                return [self.hidden_size]
            case _:
                return [1] * len(self.layers)

    def open_gates(self) -> dict[str, Tensor]:
        """Every gate of every unit at 1."""
        return {unit: torch.ones(sum(self.sizes(unit)), dtype=torch.float64) for unit in self.units}


def describe(model: PreTrainedModel) -> ModelShape:
    """Read the shape of a causal language model off its matrices.

    Only `head_dim` cannot be seen in a matrix; it is the config's. Raises ValueError
    for a model_type that is not in FAMILIES, and as `check_config`.
    """
    family: Family = family_of(model.config.model_type)
    check_config(model.config)
    head_dim = head_dim_of(model.config)
    layers = []
    for layer in model.get_submodule(family.layers):
        groups, queries, width, experts = 0, 0, 0, 0
        if has(layer, family.attention_output):
            heads = _sizes(layer, family.attention_output)[1] // head_dim
            rows = sum(_sizes(layer, path)[0] for path in family.attention_inputs)
            groups = (rows // head_dim - heads) // 2  # all have queries, and each group a key and a value
            queries = heads // groups
        if has(layer, family.mlp_output):
            *stacked, _, width = _sizes(layer, family.mlp_output)
            experts = stacked[0] if stacked else 1
        layers.append(LayerShape(groups, queries, head_dim, width, experts if family.router else None))
    hidden_size = model.get_submodule(family.embedding).weight.shape[1]
    each = model.config.num_experts_per_tok if family.router else 1
    return ModelShape(hidden_size, family.mlp_matrices, tuple(layers), each)


def check_config(config: PreTrainedConfig) -> None:
    """Raise ValueError for a model of a known family that differs from it where it matters."""
    for name, wanted in family_of(config.model_type).needs:
        found, wanted = getattr(config, name), getattr(config, wanted) if isinstance(wanted, str) else wanted
        if found != wanted:
            raise ValueError(
                f"this {config.model_type} has {name} = {found!r}; only one with {wanted!r} can be pruned exactly"
            )


def head_dim_of(config: PreTrainedConfig) -> int:
    """The config's head_dim, or the usual quotient where it names none (as Qwen2's)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def main_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary settings, those of full attention where sliding attention has its own; empty without any."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def rows_per_group(family: Family, layer: LayerShape) -> dict[str, int]:
    """Matrices whose rows groups own, one group after the other, and how many of them each group has."""
    queries = layer.head_dim * layer.queries_per_group
    if family.query_key_value:
        return {family.query_key_value: queries + 2 * layer.head_dim}
    return {family.query: queries, family.key: layer.head_dim, family.value: layer.head_dim}


def rows_of(units: Tensor, each: int) -> Tensor:
    """Indices of the rows that these units own, `each` to a unit, one unit after the other."""
    return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


def rows_of_channels(family: Family, channels: Tensor, width: int) -> Tensor:
    """Indices of the rows of `mlp_inputs` that these FFN channels of so many own; in experts, those of gate and up."""
    return torch.cat([channels, channels + width]) if family.router else channels


def along(matrix: Any, dim: int) -> list[str]:
    """Parameters of a linear module that have this dimension of its weight."""
    return ["weight"] if dim == 1 or matrix.bias is None else ["weight", "bias"]


def has(layer: nn.Module, path: str) -> bool:
    """Whether a matrix is there, or was removed by an earlier plan."""
    owner, _, name = path.rpartition(".")
    try:
        found = getattr(layer.get_submodule(owner), name)
    except AttributeError:
        return False
    return isinstance(found, Tensor) or hasattr(found, "weight")


def prunable_parameters(shape: ModelShape, gates: dict[str, Tensor]) -> Tensor:
    """Number of parameters left in the decoder layers' matrices: a scalar, differentiable.

    `gates` holds the probability that each unit stays open; units that are left out
    are open. With 0/1 entries in float64 the result is the exact count of the extracted
    model. Biases, norms, routers, embedding and head are not prunable and not counted.

    Compresso (arXiv 2310.05015), section 3.3: the double sum over hidden channels and
    the units of a layer is the product of two sums.
    """
    some = next(iter(gates.values()), torch.ones(1, dtype=torch.float64))

    def per_layer(unit: str) -> Tensor:
        sizes = shape.sizes(unit)
        if unit not in gates:
            return some.new_tensor(sizes)
        return torch.stack([part.sum() for part in gates[unit].split(sizes)])

    rows_per_group = some.new_tensor([layer.rows_per_group for layer in shape.layers])
    attention_rows = per_layer("attention") * per_layer("kv_group") * rows_per_group
    mlp_rows = per_layer("mlp") * per_layer("expert") * per_layer("intermediate") * shape.mlp_matrices
    return per_layer("hidden").squeeze() * (attention_rows.sum() + mlp_rows.sum())


def sparsity(shape: ModelShape, gates: dict[str, Tensor]) -> Tensor:
    """Share of the prunable parameters that is removed: a scalar in [0, 1], differentiable."""
    return 1 - prunable_parameters(shape, gates) / prunable_parameters(shape, {})


def count_prunable(model: PreTrainedModel) -> int:
    """Prunable parameters by counting the model's own matrices."""
    family = family_of(model.config.model_type)
    paths = (*family.attention_inputs, family.attention_output, *family.mlp_inputs, family.mlp_output)
    layers = model.get_submodule(family.layers)
    return sum(math.prod(_sizes(layer, path)) for layer in layers for path in paths if has(layer, path))


def _sizes(layer: nn.Module, path: str) -> tuple[int, ...]:
    """Rows and columns of a matrix, those of the numbers that it stands for, however they are stored; experts first."""
    owner, _, name = path.rpartition(".")
    found: Any = getattr(layer.get_submodule(owner), name)
    return tuple(found.shape) if isinstance(found, Tensor) else (found.out_features, found.in_features)
