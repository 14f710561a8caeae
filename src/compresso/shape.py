"""What a model is made of, read off its weights, and the one count of its prunable parameters.

Gates are passed as a dict from unit to one flat tensor, layer after layer;
`ModelShape.sizes` tells how to split it.
"""

import typing
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.families import Family, family_of

UNITS = ("kv_group", "intermediate", "hidden", "attention", "mlp")
"""kv_group: a key/value head with its query heads. intermediate: an FFN channel. hidden: a
channel of the residual stream. attention, mlp: a whole sub-layer."""


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. A removed sub-layer has width 0."""

    num_key_value_heads: int
    queries_per_group: int
    head_dim: int
    intermediate_size: int

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

    def sizes(self, unit: str) -> list[int]:
        """Number of units of this kind: one entry a layer, for `hidden` a single one."""
        match unit:
            case "kv_group":
                return [layer.num_key_value_heads for layer in self.layers]
            case "intermediate":
                return [layer.intermediate_size for layer in self.layers]
            case "hidden":
                return [self.hidden_size]
            case _:
                return [1] * len(self.layers)

    def open_gates(self) -> dict[str, Tensor]:
        """Every gate of every unit at 1."""
        return {unit: torch.ones(sum(self.sizes(unit)), dtype=torch.float64) for unit in UNITS}


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
        groups, queries, width = 0, 0, 0
        if has(layer, family.attention_output):
            heads = _linear(layer, family.attention_output).in_features // head_dim
            rows = sum(_linear(layer, path).out_features for path in family.attention_inputs)
            groups = (rows // head_dim - heads) // 2  # all have queries, and each group a key and a value
            queries = heads // groups
        if has(layer, family.mlp_output):
            width = _linear(layer, family.mlp_output).in_features
        layers.append(LayerShape(groups, queries, head_dim, width))
    hidden_size = model.get_submodule(family.embedding).weight.shape[1]
    return ModelShape(hidden_size, len(family.mlp_inputs) + 1, tuple(layers))


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


def rows_per_group(family: Family, layer: LayerShape) -> dict[str, int]:
    """Matrices whose rows groups own, one group after the other, and how many of them each group has."""
    queries = layer.head_dim * layer.queries_per_group
    if family.query_key_value:
        return {family.query_key_value: queries + 2 * layer.head_dim}
    return {family.query: queries, family.key: layer.head_dim, family.value: layer.head_dim}


def rows_of(units: Tensor, each: int) -> Tensor:
    """Indices of the rows that these units own, `each` to a unit, one unit after the other."""
    return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


def has(layer: nn.Module, path: str) -> bool:
    """Whether a module with weights is there, or was removed by an earlier plan."""
    try:
        return hasattr(layer.get_submodule(path), "weight")
    except AttributeError:
        return False


def prunable_parameters(shape: ModelShape, gates: dict[str, Tensor]) -> Tensor:
    """Number of parameters left in the decoder layers' matrices: a scalar, differentiable.

    `gates` holds the probability that each unit stays open; units that are left out
    are open. With 0/1 entries in float64 the result is the exact count of the extracted
    model. Biases, norms, embedding and head are not prunable and not counted.

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
    mlp_rows = per_layer("mlp") * per_layer("intermediate") * shape.mlp_matrices
    return per_layer("hidden").squeeze() * (attention_rows.sum() + mlp_rows.sum())


def sparsity(shape: ModelShape, gates: dict[str, Tensor]) -> Tensor:
    """Share of the prunable parameters that is removed: a scalar in [0, 1], differentiable."""
    return 1 - prunable_parameters(shape, gates) / prunable_parameters(shape, {})


def count_prunable(model: PreTrainedModel) -> int:
    """Prunable parameters by counting the model's own matrices."""
    family = family_of(model.config.model_type)
    paths = (*family.attention_inputs, family.attention_output, *family.mlp_inputs, family.mlp_output)
    layers = model.get_submodule(family.layers)
    matrices = [_linear(layer, path) for layer in layers for path in paths if has(layer, path)]
    return sum(matrix.in_features * matrix.out_features for matrix in matrices)


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    """A matrix; its features are those of the numbers that it stands for, however they are stored."""
    return typing.cast(nn.Linear, layer.get_submodule(path))
