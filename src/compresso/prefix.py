"""Tokens that many rows begin with: run once, their keys and values shared by all."""

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedConfig


def with_cache(model: nn.Module, cache: DynamicCache | None) -> dict[str, Any]:
    """Arguments of `model`'s forward that make it use this cache, or none."""
    if cache is None:
        return {"use_cache": False}
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}  # renamed in 5.24


def run_prefix(decoder: nn.Module, ids: Tensor, config: PreTrainedConfig) -> DynamicCache:
    """Keys and values of the tokens `ids` (P,), for one row. Gradients flow where they are enabled."""
    cache = DynamicCache(config=config)
    decoder(input_ids=ids[None], **with_cache(decoder, cache))
    _gather_for(decoder, cache)
    filled = copy.copy(cache)
    cache.layers = read_only(DynamicCache(config=config)).layers  # what recomputed activations of this run will see
    return filled


def _gather_for(decoder: nn.Module, cache: DynamicCache) -> None:
    """Have a layer's weights at hand when a gradient comes to its keys and values.

    FSDP2 gathers a layer when a gradient comes to its output; these leave it by way of the cache.
    """
    layers = (module for module in decoder.modules() if isinstance(module, FSDPModule) and module is not decoder)
    for layer, kept in zip(layers, cache.layers, strict=False):  # none, unless the layers are split over processes
        for tensor in (kept.keys, kept.values):
            if tensor.requires_grad:
                tensor.register_hook(partial(_gather, layer))


def _gather(layer: FSDPModule, gradient: Tensor) -> None:
    layer.unshard()


def is_shareable(cache: DynamicCache) -> bool:
    """Whether all of a model's memory is keys and values (that of a state-space layer is not)."""
    return all(getattr(layer, "keys", None) is not None for layer in cache.layers)


def for_rows(cache: DynamicCache, rows: int) -> DynamicCache:
    """The one-row cache as the beginning of `rows` rows: views, nothing is copied; `cache` stays as it is."""
    shared = copy.copy(cache)
    shared.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in shared.layers:
        if layer.keys is not None:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return shared


def read_only(cache: DynamicCache) -> DynamicCache:
    """The same beginning, to which rows add nothing: a layer run again (recomputed activations) finds it unchanged."""
    fixed = copy.copy(cache)
    fixed.layers = [_read_only(layer) for layer in cache.layers]
    return fixed


def _read_only(layer: Any) -> Any:
    fixed = copy.copy(layer)
    fixed.update = lambda *args, **kwargs: type(layer).update(copy.copy(layer), *args, **kwargs)
    return fixed


def positions_after(length: int, ids: Tensor) -> Tensor:
    """Positions (1, T) of `ids` (B, T) that follow a prefix of `length` tokens."""
    return torch.arange(ids.shape[1], device=ids.device)[None] + length
