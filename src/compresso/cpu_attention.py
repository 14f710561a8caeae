"""Attention for training in half precision on a CPU, as matrix products.

torch's fused kernel keeps nothing but its output, which pays for long rows; on a CPU it takes twice the time of plain
products at the lengths of instruction records (LOG.md, 2026-11-25), most of it in the backward pass. Here query heads
of a group are stacked over their key head, which is not repeated, and probabilities are kept. Scores are rounded to
the activations' format, as in transformers' eager attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "compresso_cpu"
LONGEST = 1024  # keys; for more the probabilities take too much memory, and the fused kernel is used


@contextmanager
def products(model: PreTrainedModel, cpu: bool) -> Iterator[None]:
    """Inside, the model attends by plain products, if it computes in half precision on a CPU."""
    before = model.config._attn_implementation
    if cpu and model.dtype in (torch.bfloat16, torch.float16) and before == "sdpa":
        model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query (B, H, T, D), key and value (B, K, S, D) with H a multiple of K -> (B, T, H, D); for transformers to call.

    The mask (B or 1, 1, T, S) is True where a query may look; None stands for causal.
    """
    length, keys = query.shape[2], key.shape[2]
    if keys > LONGEST or dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Products.apply(query, key, value, ~attention_mask, scale).transpose(1, 2).contiguous(), None


class _Products(torch.autograd.Function):
    """softmax(scale Q K^T) V, where `hidden` keys (B or 1, 1, T, S) have no weight."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
        rows, heads, length, width = query.shape
        groups, keys = key.shape[1:3]
        stacked = (query * scale).reshape(rows, groups, -1, width)
        scores = (stacked @ key.transpose(2, 3)).view(rows, groups, -1, length, keys)
        scores.masked_fill_(hidden[:, :, None], -torch.inf)
        weights = torch.softmax(scores, -1).view(rows, groups, -1, keys)
        ctx.save_for_backward(stacked, key, value, weights)
        ctx.scale = scale
        return (weights @ value).view(rows, heads, length, width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stacked, key, value, weights = ctx.saved_tensors
        grad = gradients[0].reshape(stacked.shape)
        grad_scores = torch._softmax_backward_data(grad @ value.transpose(2, 3), weights, -1, weights.dtype)
        grad_query = ((grad_scores @ key) * ctx.scale).view(gradients[0].shape)
        return grad_query, grad_scores.transpose(2, 3) @ stacked, weights.transpose(2, 3) @ grad, None, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
