"""Loss on records and perplexity on text."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.batches import Batch
from compresso.float64 import in_float64
from compresso.prefix import for_rows, positions_after, run_prefix, with_cache
from compresso.train import target_loss

WINDOW = 512  # tokens of a perplexity window; figures at other windows are not comparable
TOKENS_AT_ONCE = 1024
POSITIONS_AT_ONCE = 128  # whose logits exist in float32 at a time


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean next-token loss over all labelled tokens, in nats."""
    total = sum(float(target_loss(model, batch.to(model.device))) for batch in batches)
    first_column = sum(int((batch.labels[:, 0] >= 0).sum()) for batch in batches)
    targets = sum(batch.targets for batch in batches) - first_column  # nothing comes before it
    return total / max(targets, 1)


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, windows: int | None, window: int = WINDOW, shorter: bool = False
) -> Tensor:
    """Windows of a text that do not overlap, (N, window) token ids, without special tokens; the rest is dropped.

    With `shorter`, a text that does not fill one window gives one of its own length.
    Raises ValueError if it does not fill one, or has fewer than 16 tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    least = 16 if shorter else window
    if len(ids) < least:
        raise ValueError(f"the text for the perplexity has only {len(ids)} tokens, at least {least} are needed")
    window = min(window, len(ids))
    count = len(ids) // window if windows is None else min(windows, len(ids) // window)
    return torch.tensor(ids[: window * count]).view(count, window)


@torch.no_grad()
def window_nats(model: PreTrainedModel, windows: Tensor, prefix: Sequence[int] = ()) -> list[float]:
    """Mean next-token loss of each window (N, T), in nats a token; the first token of a window is no target.

    `prefix` are tokens that stand before every window and are no targets. Raises ValueError if a loss is not finite.
    """
    ids = torch.tensor(list(prefix), dtype=torch.long, device=model.device)
    cache = run_prefix(model, ids, model.config) if len(ids) else None
    nats: list[float] = []
    for rows in windows.to(model.device).split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        logits = model(
            rows,
            position_ids=positions_after(len(ids), rows),
            **with_cache(model, for_rows(cache, len(rows)) if cache else None),
        ).logits[:, :-1]
        parts = zip(logits.split(POSITIONS_AT_ONCE, 1), rows[:, 1:].split(POSITIONS_AT_ONCE, 1), strict=True)
        losses = [functional.cross_entropy(z.float().transpose(1, 2), y, reduction="none") for z, y in parts]
        nats += in_float64(torch.cat(losses, 1)).mean(1).tolist()
    if not all(map(math.isfinite, nats)):
        raise ValueError("the model's probabilities are not numbers (NaN or infinite); its weights may be damaged")
    return nats


def perplexity(nats: Sequence[float]) -> float:
    """exp of the mean over windows of equal length."""
    return math.exp(sum(nats) / len(nats))
