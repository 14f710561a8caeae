"""The model shrinks while it learns: groups and channels that are closed for good are cut out of it during the run.

In the hold phase a unit goes when its gate is closed more often than not and it is among those of lowest log_alpha that
together are no more than the target, which any plan removes first. Matrices, adapters and the optimizer's moments lose
its rows and columns, so that the steps that follow cost what the smaller model costs. A unit that is cut stays closed:
its log_alpha is pinned, and the expected sparsity counts it as gone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso import hard_concrete
from compresso.adapters import ADAPTER
from compresso.exact_adamw import ExactAdamW
from compresso.families import family_of
from compresso.masks import Gates, Masks
from compresso.shape import ModelShape, along, rows_of, rows_per_group, sparsity

EVERY = 5  # steps of the hold phase between two cuts
RARELY_OPEN = 0.5  # P(gate > 0) below which a unit may be cut; LOG.md, 2026-11-25
FEW_WIDTHS = 12  # widths of a layer's FFN are rounded up to about this many values; LOG.md, 2026-11-25
UNITS = ("kv_group", "intermediate")
"""What is cut; in a mixture groups alone."""


class Shrinking:
    """Cuts closed units out of a model in training, adapters included, and puts its shape back at the end."""

    def __init__(self, model: PreTrainedModel, gates: Gates, masks: Masks, target_sparsity: float, round_to: int):
        self.shape: ModelShape = masks.shape
        self._gates, self._masks = gates, masks
        self._target, self._round_to = target_sparsity, round_to
        self._family = family_of(model.config.model_type)
        self._layers = model.get_submodule(self._family.layers)
        units = UNITS[:1] if self._family.router else UNITS
        self._kept = {unit: [torch.arange(n) for n in self.shape.sizes(unit)] for unit in units}

    @torch.no_grad()
    def cut(self, optimizer: ExactAdamW) -> int:
        """Take out what is closed for good; the number of units that went."""
        went = 0
        for unit, closed in self._closed().items():
            for i, gone in enumerate(closed.split(self.shape.sizes(unit))):
                stays = ~gone[self._kept[unit][i]]
                if not stays.all():
                    went += int((~stays).sum())
                    self._narrow(unit, i, stays.nonzero().squeeze(1), optimizer)
                    self._kept[unit][i] = self._kept[unit][i][stays]
            self._masks.pin_closed(unit, closed)
        self._gates.kept = self._kept
        return went

    def kept(self) -> dict[str, Tensor]:
        """Indices of the units that are left, by `kept/unit/layer`."""
        return {f"kept/{unit}/{i}": kept for unit, of in self._kept.items() for i, kept in enumerate(of)}

    @torch.no_grad()
    def narrow_to(self, kept: dict[str, Tensor], optimizer: ExactAdamW) -> None:
        """Take all but these units, named as `kept` names them, out of a whole model."""
        for unit, of in self._kept.items():
            for i, before in enumerate(of):
                stays = kept[f"kept/{unit}/{i}"]
                if len(stays) < len(before):
                    self._narrow(unit, i, stays, optimizer)
                    of[i] = stays
        self._gates.kept = self._kept

    def _closed(self) -> dict[str, Tensor]:
        """What has been cut or may be now: a boolean for each unit."""
        log_alpha = {u: a.detach().cpu() for u, a in self._masks.log_alpha.items() if u in self._kept}
        if not log_alpha:
            return {}
        rare = torch.cat([a[hard_concrete.prob_open(a) < RARELY_OPEN] for a in log_alpha.values()]).unique()

        def below(count: int) -> dict[str, Tensor]:
            bound = rare[count - 1] if count else -torch.inf
            return {unit: self._spared(unit, a, a <= bound) for unit, a in log_alpha.items()}

        least, most = 0, len(rare)
        while least < most:  # as many of the lowest as the target has room for
            middle = (least + most + 1) // 2
            gone = float(sparsity(self.shape, {unit: (~c).double() for unit, c in below(middle).items()}))
            least, most = (middle, most) if gone <= self._target else (least, middle - 1)
        return below(least)

    def _spared(self, unit: str, log_alpha: Tensor, closed: Tensor) -> Tensor:
        """`closed` without those that a plan keeps: the best of each layer, and what would break up a multiple."""
        grain = self._round_to if unit == "intermediate" else 1
        kept = []
        for values, gone in zip(
            log_alpha.split(self.shape.sizes(unit)), closed.split(self.shape.sizes(unit)), strict=True
        ):
            rest = len(values) % grain  # these go in any case
            count = min(int(gone.sum()), len(values) - grain)
            if count > rest:
                count -= (count - rest) % grain
            if unit == "intermediate":  # each width on its own costs a CPU the making of kernels for it
                step = -(-max(1, len(values) // FEW_WIDTHS) // grain) * grain
                stays = -(-(len(values) - count) // step) * step
                count = max(0, len(values) - stays)
            part = torch.zeros_like(gone)
            part[values.argsort(stable=True, descending=True)[len(values) - count :]] = True
            kept.append(part)
        return torch.cat(kept)

    @torch.no_grad()
    def restore(self) -> None:
        """The model's own shape again, once adapters are merged; what was cut out is zero, and no plan keeps it."""
        for layer, shape in enumerate(self.shape.layers):
            sizes_of = {"kv_group": shape.num_key_value_heads, "intermediate": shape.intermediate_size}
            for unit, of_layers in self._kept.items():
                kept, size = of_layers[layer], sizes_of[unit]
                if len(kept) == size:
                    continue
                self._count(unit, layer, size)
                for matrix, dim, each in self._matrices(unit, layer):
                    places = rows_of(kept, each)
                    for name in along(matrix, dim):
                        left = getattr(matrix, name)
                        sizes = list(left.shape)
                        sizes[dim] = size * each
                        whole = left.new_zeros(sizes).index_copy_(dim, places.to(left.device), left)
                        setattr(matrix, name, nn.Parameter(whole, requires_grad=left.requires_grad))
                    matrix.out_features, matrix.in_features = matrix.weight.shape

    def _narrow(self, unit: str, layer: int, stays: Tensor, optimizer: ExactAdamW) -> None:
        """Keep these of the layer's present units."""
        self._count(unit, layer, len(stays))
        for module, dim, each in self._matrices(unit, layer):
            places = rows_of(stays, each)
            matrix = getattr(module, "base_layer", module)
            adapter: tuple = () if matrix is module else (module.lora_A[ADAPTER] if dim else module.lora_B[ADAPTER],)
            for part in (matrix, *adapter):
                for name in along(part, dim):
                    old = getattr(part, name)
                    new = nn.Parameter(old.index_select(dim, places.to(old.device)), requires_grad=old.requires_grad)
                    setattr(part, name, new)
                    if old.requires_grad:
                        optimizer.exchange(old, new, dim, places.to(old.device))
                part.out_features, part.in_features = part.weight.shape
            module.out_features, module.in_features = matrix.weight.shape

    def _count(self, unit: str, layer: int, units: int) -> None:
        """Tell an attention that counts its heads how many there are."""
        if unit == "kv_group" and self._family.num_heads:
            path, _, name = self._family.num_heads.rpartition(".")
            attention = self._layers[layer].get_submodule(path)
            setattr(attention, name, units * self.shape.layers[layer].queries_per_group)

    def _matrices(self, unit: str, layer: int) -> list[tuple[Any, int, int]]:
        """Linear modules that hold a unit's numbers: along which dimension, and how many each unit has there."""
        family, shape = self._family, self.shape.layers[layer]
        if unit == "intermediate":
            found = [(path, 0, 1) for path in family.mlp_inputs] + [(family.mlp_output, 1, 1)]
        else:
            found = [(path, 0, each) for path, each in rows_per_group(family, shape).items()]
            found.append((family.attention_output, 1, shape.columns(unit)))
        return [(self._layers[layer].get_submodule(path), dim, each) for path, dim, each in found]
