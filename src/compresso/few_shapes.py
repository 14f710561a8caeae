"""Few different shapes of matrices while a model learns on a CPU.

oneDNN makes a kernel for each new shape of a product of matrices, which takes longer than the product, and keeps about
a thousand of them. A pruned model has a width in every layer and batches have any number of tokens, so that nearly
every product of a step would be a new one (LOG.md, 2026-11-27).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from compresso.families import family_of
from compresso.shape import along, has

WIDTHS = 24  # about as many steps up to the widest FFN
GRAIN = 32  # of widths: what kernels in half precision take at once
SHORT, FINE, COARSE = 96, 8, 16
"""Rows of at most SHORT tokens are filled up to a multiple of FINE, longer ones to one of COARSE."""


def rounded_length(tokens: int, most: int | None) -> int:
    """A length of rows that holds so many tokens, one of a few, and at most what a model's positions leave."""
    grain = FINE if tokens <= SHORT else COARSE
    wider = -(-tokens // grain) * grain
    return wider if most is None else max(tokens, min(wider, most))


@contextmanager
def few_widths(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Inside, if wanted, FFNs have one of a few widths; channels of zeros fill them up, and are gone at the end.

    A channel whose weights are all zero gives nothing and gets no gradient, so that it stays so while weights learn;
    adapters would wake it up. Experts are left as they are.
    """
    family = family_of(model.config.model_type)
    layers = model.get_submodule(family.layers) if wanted and not family.router else []
    ffns = [
        [(layer.get_submodule(path), 0) for path in family.mlp_inputs] + [(layer.get_submodule(family.mlp_output), 1)]
        for layer in layers
        if has(layer, family.mlp_output)
    ]
    widths = [ffn[-1][0].in_features for ffn in ffns]
    step = GRAIN * max(1, round(max(widths, default=0) / WIDTHS / GRAIN))
    for ffn, width in zip(ffns, widths, strict=True):
        _resize(ffn, -(-width // step) * step)
    try:
        yield
    finally:
        for ffn, width in zip(ffns, widths, strict=True):
            _resize(ffn, width)


@torch.no_grad()
def _resize(ffn: list[tuple[nn.Linear, int]], width: int) -> None:
    """Give the matrices of an FFN this width, along their dimension of channels."""
    for matrix, dim in ffn:
        for name in along(matrix, dim):
            old = getattr(matrix, name)
            if old.shape[dim] != width:
                sizes = list(old.shape)
                sizes[dim] = width
                new, both = old.new_zeros(sizes), min(width, old.shape[dim])
                new.narrow(dim, 0, both).copy_(old.narrow(dim, 0, both))
                setattr(matrix, name, nn.Parameter(new, requires_grad=old.requires_grad))
        matrix.out_features, matrix.in_features = matrix.weight.shape
