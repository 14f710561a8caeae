"""The weights that a Plan leaves, one after the other: rows and columns of what stays, soft gates folded in.

Kept soft gates go into the matrices behind them, and RMSNorm is corrected for the hidden channels that it no longer
averages over.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.families import Family, family_of
from compresso.float64 import in_float64
from compresso.plan import Plan
from compresso.shape import rows_of, rows_of_channels, rows_per_group

Weights = Iterator[tuple[str, Tensor]]
"""Name and value."""


def cut_weights(old: Mapping[str, Tensor], model_type: str, plan: Plan) -> Weights:
    """Name and value of every weight of the smaller model, one after the other.

    `old` is the state dict, or reads from files: each of its tensors is asked for once, and
    none is kept. A tied head may be missing from it.
    """
    return _Cut(old, family_of(model_type), plan).all()


def kept_layers(plan: Plan) -> list[int]:
    """Layers that keep a sub-layer; of a model of one layer that one in any case."""
    return [
        i
        for i, width in enumerate(plan.widths())
        if width["num_key_value_heads"] or width["intermediate_size"] or len(plan.shape.layers) == 1
    ]


@dataclass(frozen=True)
class _Cut:
    old: Mapping[str, Tensor]
    family: Family
    plan: Plan

    @property
    def hidden(self) -> Tensor:
        """The hidden channels that stay."""
        return self.plan.keep["hidden"][0]

    @property
    def norm_scale(self) -> float:
        """What a norm must be multiplied by that averages over fewer channels, those that are gone having been 0."""
        return (self.plan.shape.hidden_size / len(self.hidden)) ** 0.5

    def all(self) -> Weights:
        family = self.family
        # where the embedding is scaled by the root of the hidden size, it makes up for that, a tied head with it
        embedded = self.norm_scale if family.scaled_embedding else 1.0
        yield from self._take(family.embedding, family.embedding, None, self.hidden, embedded)
        if family.positions:
            yield from self._take(family.positions, family.positions, None, self.hidden)
        yield from self._norms("", "", (family.final_norm,), self.norm_scale / embedded)
        yield from self._take(family.head, family.head, None, self.hidden, embedded)
        for j, i in enumerate(kept_layers(self.plan)):
            source, target = f"{family.layers}.{i}.", f"{family.layers}.{j}."
            if len(self.plan.keep["kv_group"][i]):
                yield from self._attention(i, source, target)
            if len(self.plan.keep["intermediate"][i]):
                yield from self._mlp(i, source, target)

    def _attention(self, i: int, source: str, target: str) -> Weights:
        family, groups, layer = self.family, self.plan.keep["kv_group"][i], self.plan.shape.layers[i]
        # q/k norms share an eps that grows with norm_scale squared: so must what they divide
        into_norm = self.norm_scale if family.query_key_norms else 1.0
        for path, each in rows_per_group(family, layer).items():
            by = 1.0 if path == family.value else into_norm
            yield from self._take(source + path, target + path, rows_of(groups, each), self.hidden, by, by)
        yield from self._norms(source, target, family.attention_norms, self.norm_scale)
        whole, each = float(self._gates("attention", i)), layer.columns("kv_group")
        by_column, output = self._gates("kv_group", i)[groups].repeat_interleave(each), family.attention_output
        yield from self._take(
            source + output, target + output, self.hidden, rows_of(groups, each), by_column * whole, whole
        )
        known = (*family.attention_inputs, output)
        for name in sorted(self.old):  # what belongs to a head dimension and stays: q and k norms
            if name.startswith(source + family.attention + "."):
                path = name.removeprefix(source)
                if path.rpartition(".")[0] not in known:
                    yield target + path, self.old[name].clone()

    def _mlp(self, i: int, source: str, target: str) -> Weights:
        family, channels = self.family, self.plan.keep["intermediate"][i]
        experts = self.plan.keep["expert"][i] if family.router else None
        rows = rows_of_channels(family, channels, self.plan.shape.layers[i].intermediate_size)
        for path in family.mlp_inputs:
            yield from self._take(source + path, target + path, rows, self.hidden, stack=experts)
        if family.router:
            yield from self._take(source + family.router, target + family.router, experts, self.hidden)
        yield from self._norms(source, target, family.mlp_norms, self.norm_scale)
        whole, output = float(self._gates("mlp", i)), family.mlp_output
        by_column = self._gates("intermediate", i)[channels] * whole
        yield from self._take(source + output, target + output, self.hidden, channels, by_column, whole, stack=experts)

    def _gates(self, unit: str, layer: int) -> Tensor:
        """Values of a layer's gates of a kind of unit."""
        return self.plan.gates[unit].split(self.plan.shape.sizes(unit))[layer]

    def _norms(self, source: str, target: str, paths: tuple[str, ...], by: float) -> Weights:
        for path in paths:
            yield from self._take(source + path, target + path, self.hidden, None, by, offset=self.family.norm_offset)

    def _take(
        self,
        name: str,
        target: str,
        rows: Tensor | None,
        columns: Tensor | None,
        by: Tensor | float = 1.0,
        bias_by: float = 1.0,
        offset: float = 0.0,
        stack: Tensor | None = None,
    ) -> Weights:
        """Keep rows and columns of a weight times `by` (a number, or one a column), and the rows of its bias.

        Of stacked ones those in `stack` stay. What multiplies is the weight and `offset`.
        """
        for kind, scale in ((".weight", by), (".bias", bias_by), ("", by)):
            if name + kind not in self.old:
                continue
            tensor = self.old[name + kind]
            device, row = tensor.device, max(0, tensor.ndim - 2)
            if stack is not None and len(stack) < tensor.shape[0]:
                tensor = tensor.index_select(0, stack.to(device))
            if rows is not None and len(rows) < tensor.shape[row]:
                tensor = tensor.index_select(row, rows.to(device))
            if kind != ".bias" and columns is not None and len(columns) < tensor.shape[-1]:
                tensor = tensor.index_select(-1, columns.to(device))
            if bool((torch.as_tensor(scale) != 1).any()):
                more = offset if kind == ".weight" else 0.0
                exact = in_float64(tensor) + more
                factor = scale.to(exact.device) if isinstance(scale, Tensor) else scale
                tensor = (exact * factor - more).to(tensor.dtype).to(device)
            yield target + kind, tensor.clone()
