"""What a mixture of experts has that an FFN has not: experts in one stack, and a router that chooses among them.

All experts of a layer keep as many channels, as the stock classes want it. So that the n-th channel of each is the same
unit, every mixture that is loaded has the channels of each expert in the order of their weight.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.families import Family, family_of
from compresso.shape import describe, has


def sort_channels(model: PreTrainedModel) -> PreTrainedModel:
    """Put the channels of each expert in order, those of largest L2 norm over gate, up and down first, in place.

    The model computes what it did, to rounding. Nothing is done to one that is no mixture.
    """
    family = family_of(model.config.model_type)
    for layer in model.get_submodule(family.layers) if family.router else ():
        if has(layer, family.mlp_output):
            _sort(*(layer.get_parameter(path) for path in (*family.mlp_inputs, family.mlp_output)))
    return model


@torch.no_grad()
def _sort(inputs: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Both stacks of a layer, (E, 2 I, H) and (E, H, I), sorted in place."""
    for rows, columns in zip(inputs, output, strict=True):  # one expert at a time, which float32 copies are made of
        gate, up = rows.chunk(2)
        norm = gate.float().square().sum(1) + up.float().square().sum(1) + columns.float().square().sum(0)
        order = norm.argsort(descending=True, stable=True)
        rows.copy_(torch.cat([gate[order], up[order]]))
        columns.copy_(columns[:, order])
    return inputs, output


class Sorted(Mapping[str, Tensor]):
    """Weights of a mixture with the channels of each expert in order, as `sort_channels` puts them."""

    def __init__(self, weights: Mapping[str, Tensor], family: Family):
        self._weights, self._stacks = weights, (*family.mlp_inputs, family.mlp_output)

    def __getitem__(self, name: str) -> Tensor:
        which = next((i for i, path in enumerate(self._stacks) if name.endswith(f".{path}")), None)
        if which is None:
            return self._weights[name]
        layer = name.removesuffix(self._stacks[which])
        return _sort(*(self._weights[layer + path] for path in self._stacks))[which]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def choose(router: nn.Module, output: tuple[Tensor, ...], gates: Tensor) -> tuple[Tensor, ...]:
    """What a router gives, logits (N, E), weights and indices of the chosen (N, k), with log z added to its logits.

    An expert whose gate is 0 is never chosen, as if it were not there, and another takes its place. Where fewer are
    open than a token goes to, the others weigh nothing.
    """
    logits, weights, _ = output
    is_open = gates > 0
    added = torch.where(is_open, gates, 1.0).log()
    logits = (logits.float() + added).masked_fill(~is_open, torch.finfo(torch.float32).min)
    probabilities, chosen = logits.softmax(-1).topk(weights.shape[-1])
    if getattr(router, "norm_topk_prob", True):  # Mixtral's always does, and has no such attribute
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return logits, (probabilities * is_open[chosen]).to(weights.dtype), chosen


def idle(model: PreTrainedModel) -> int:
    """Parameters that a token does not go through: those of the experts that are not chosen for it."""
    if not family_of(model.config.model_type).router:
        return 0
    shape = describe(model)
    left = [max(0, layer.experts - shape.experts_per_token) for layer in shape.layers]
    price = shape.price("expert")
    return shape.hidden_size * sum(count * rows for count, rows in zip(left, price, strict=True))
