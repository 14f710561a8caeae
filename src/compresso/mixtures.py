"""What a mixture of experts has that an FFN has not: experts in one stack, and a router that chooses among them.

All experts of a layer keep as many channels, as the stock classes want it. So that the n-th channel of each is the same
unit, every mixture that is loaded has the channels of each expert in the order of their weight.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.families import family_of
from compresso.shape import describe, has


@torch.no_grad()
def sort_channels(model: PreTrainedModel) -> PreTrainedModel:
    """Put the channels of each expert in order, those of largest L2 norm over gate, up and down first, in place.

    The model computes what it did, to rounding. Nothing is done to one that is no mixture.
    """
    family = family_of(model.config.model_type)
    for layer in model.get_submodule(family.layers) if family.router else ():
        if has(layer, family.mlp_output):
            inputs, output = (layer.get_parameter(path) for path in (*family.mlp_inputs, family.mlp_output))
            for rows, columns in zip(inputs.data, output.data, strict=True):  # one expert at a time: (2 I, H), (H, I)
                gate, up = rows.chunk(2)
                norm = sum(part.float().square().sum(dim) for part, dim in ((gate, 1), (up, 1), (columns, 0)))
                order = norm.argsort(descending=True, stable=True)
                rows.copy_(torch.cat([gate[order], up[order]]))
                columns.copy_(columns[:, order])
    return model


def choose(router: nn.Module, output: tuple[Tensor, ...], gates: Tensor) -> tuple[Tensor, ...]:
    """What a router gives, (logits, weights, indices of the chosen), with log z added to its logits: (N, E), (N, k) twice.

    An expert whose gate is 0 is never chosen, as if it were not there, and another takes its place. Where fewer are open
    than a token goes to, those of the others weigh nothing.
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
