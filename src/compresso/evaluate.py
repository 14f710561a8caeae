"""What a model costs and how well it does: loss, perplexity, speed, one answer."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.batches import Batch, Encoder
from compresso.prompts import CollaborativePrompt
from compresso.train import target_loss

WINDOW = 512  # tokens of a perplexity window; figures at other windows are not comparable


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean next-token loss over all labelled tokens, in nats."""
    total = sum(float(target_loss(model, batch.to(model.device))) for batch in batches)
    first_column = sum(int((batch.labels[:, 0] >= 0).sum()) for batch in batches)
    targets = sum(batch.targets for batch in batches) - first_column  # nothing comes before it
    return total / max(targets, 1)


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, windows: int, context: int | None) -> list[Batch]:
    """Non-overlapping windows of a text, every token a target, without a prompt.

    Raises ValueError if the text has fewer than 16 tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 16:
        raise ValueError(f"the text for the perplexity has only {len(ids)} tokens, at least 16 are needed")
    window = min(WINDOW, context or WINDOW, len(ids))
    rows = torch.tensor(ids[: window * min(windows, len(ids) // window)]).view(-1, window)
    empty = torch.empty(0, dtype=torch.long)
    return [Batch(empty, part, part, part.numel()) for part in rows.split(4)]


@torch.no_grad()
def answer(
    model: PreTrainedModel, encoder: Encoder, prompt: CollaborativePrompt, message: str, max_new_tokens: int = 64
) -> str:
    """The model's greedy answer to one question."""
    message = message.encode("utf-8", "replace").decode()  # a terminal may pass half a surrogate pair
    ids = torch.tensor([encoder.question(message, prompt)], device=model.device)
    tokenizer = encoder.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    room = max(1, min(max_new_tokens, (encoder.context or 10**9) - ids.shape[1]))
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def speeds(
    models: dict[str, PreTrainedModel], prefill: int = 256, decode: int = 24, repeats: int = 3
) -> dict[str, Any]:
    """Tokens per second at batch 1, the models taking turns: median and extremes of `repeats`."""
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for repeat in range(repeats + 1):  # the first round warms up and is not counted
        for name, model in models.items():
            length = min(prefill, model.config.max_position_embeddings - decode)
            ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
            began = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            _wait(model)
            middle = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            for _ in range(decode):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            _wait(model)
            if repeat:
                times[name]["prefill"].append(length / (middle - began))
                times[name]["decode"].append(decode / (time.perf_counter() - middle))
    return {
        name: {
            kind: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for kind, values in kinds.items()
        }
        for name, kinds in times.items()
    }


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
