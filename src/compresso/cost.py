"""What it costs to run a model: size, cache, speed, latency, memory; several models take turns in one process."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from compresso.prefix import with_cache
from compresso.workbench import release_memory

NEW_TOKENS = 24

Spread = dict[str, float]


@torch.no_grad()
def measure_costs(
    models: dict[str, PreTrainedModel],
    batch: int = 1,
    context: int = 256,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 3,
) -> dict[str, dict[str, Any]]:
    """Cost of each model: `repeats` rounds in which the models alternate, after one that warms up.

    prefill_tokens_per_second, first_token_seconds: `batch` rows of `context` tokens at once,
    both fewer if the model's positions do not reach that far. decode_tokens_per_second:
    `new_tokens` further ones. peak_memory_bytes: the weights and what a round adds to
    them; left out where the platform does not tell. kv_bytes_per_token: of one row.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    lengths = {name: fitting(model, context, new_tokens) for name, model in models.items()}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            found = _round(model, batch, *lengths[name])
            if repeat:
                rounds[name].append(found)
    return {
        name: {
            "batch": batch,
            "context": lengths[name][0],
            "new_tokens": lengths[name][1],
            "device": str(model.device),
            "precision": str(model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "memory_bytes": _weights_in_memory(model),
            **{key: spread([found[key] for found in rounds[name]]) for key in _told(rounds[name])},
            "kv_bytes_per_token": round(rounds[name][0]["kv_bytes_per_token"]),
        }
        for name, model in models.items()
    }


def _told(rounds: list[dict[str, float]]) -> list[str]:
    """What every round could measure; a peak of memory may be out of reach in one of them."""
    return [key for key in rounds[0] if all(key in found for found in rounds)]


def _round(model: PreTrainedModel, batch: int, length: int, new_tokens: int) -> dict[str, float]:
    ids = torch.arange(batch * length, device=model.device).view(batch, length) % model.config.vocab_size
    memory = MemoryPeak(model.device)
    began = time.perf_counter()
    cache = DynamicCache(config=model.config)
    using = with_cache(model, cache)
    out = model(ids, **using, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    _wait(model)
    first = time.perf_counter()
    for _ in range(new_tokens):
        out = model(token, **using)
        token = out.logits[:, -1:].argmax(-1)
    _wait(model)
    done = time.perf_counter()
    found = {
        "prefill_tokens_per_second": batch * length / (first - began),
        "first_token_seconds": first - began,
        "decode_tokens_per_second": batch * new_tokens / (done - first),
    }
    kept = [getattr(layer, kind, None) for layer in cache.layers for kind in ("keys", "values")]
    there = [t for t in kept if t is not None and t.numel()]
    found["kv_bytes_per_token"] = sum(t.numel() * t.element_size() / (t.shape[0] * t.shape[2]) for t in there)
    added = memory.added()
    if added is not None:
        found["peak_memory_bytes"] = _weights_in_memory(model) + added
    return found


def fitting(model: PreTrainedModel, context: int, new_tokens: int = NEW_TOKENS) -> tuple[int, int]:
    """Tokens of context, and new ones after them, for which the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or context + new_tokens
    new_tokens = max(1, min(new_tokens, positions // 2))
    return max(1, min(context, positions - new_tokens)), new_tokens


def spread(values: list[float]) -> Spread:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _weights_in_memory(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


class MemoryPeak:
    """What is allocated at most from here on, beyond what is now. Linux lets a process reset its own peak."""

    def __init__(self, device: torch.device):
        self._device = device
        release_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = resident("VmRSS") if _reset_peak() else None

    def added(self) -> int | None:
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, (resident("VmHWM") or self._before) - self._before)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> int | None:
    """A memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
