"""Records that the model writes itself, for when there is no instruction data (LLM-QAT's idea, arXiv 2305.17888).

A chat model samples a user's turn after its own template's opening, then answers it. A
base model continues random tokens: the first three to five greedily, the rest sampled.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso import whole_files
from compresso.batches import MARK, Encoder
from compresso.chat import end_tokens
from compresso.prompts import CollaborativePrompt
from compresso.records import Record, Source, read_file
from compresso.workbench import progress_bar

AT_ONCE = 16
TEXTS_AT_ONCE = 32
OWN_LENGTH = 128
MOST_TEXTS = 2048
QUESTION_TOKENS, ANSWER_TOKENS, TEXT_TOKENS = 64, 160, 192


def write_records(
    model: PreTrainedModel, encoder: Encoder, count: int, seed: int, path: Path, advance: Callable[[int], None]
) -> None:
    """Write `count` records to `path` as JSON lines; `advance` is told how many were added."""
    torch.manual_seed(seed)
    write = _conversations if encoder.tokenizer.chat_template else _continuations
    written = 0
    with path.open("w", encoding="utf-8") as sink:
        for record in write(model, encoder, random.Random(seed), count * 4):
            sink.write(json.dumps(record, ensure_ascii=False) + "\n")
            written += 1
            advance(1)
            if written == count:
                return
    if not written:
        raise ValueError("the model wrote no usable record of its own; use --data with a file")


def kept_texts(model: PreTrainedModel, encoder: Encoder, count: int, seed: int, path: Path) -> list[Record]:
    """Plain texts of OWN_LENGTH tokens that the model samples, `count` of them without empty ones, from the file where
    they are kept; those that are missing there are written. They are marked as its own."""
    source = read_file(path) if path.exists() else Source(str(path))
    there = len(source.records) + len(source.skipped)
    if there < count:
        ids = write_texts(model, encoder, count - there, own_length(encoder), seed + there)[:, 1:]
        lines = (json.dumps({"text": text}) for text in encoder.tokenizer.batch_decode(ids, skip_special_tokens=True))
        before = path.read_bytes() if there else b""
        whole_files.write(path, before + "".join(f"{line}\n" for line in lines).encode())
        source = read_file(path)
    places = zip(source.records, source.places, strict=True)
    return [replace(record, own=True) for record, (number, _) in places if number <= count]


def texts_for(records: int, share: float) -> int:
    """How many texts are written so that they make such a share of so many records, each about twice."""
    return min(MOST_TEXTS, math.ceil(records * share / 2))


def own_length(encoder: Encoder) -> int:
    """Tokens of a text of `kept_texts`."""
    return min(OWN_LENGTH, encoder.context or OWN_LENGTH)


@torch.no_grad()
def write_texts(model: PreTrainedModel, encoder: Encoder, count: int, length: int, seed: int) -> Tensor:
    """Token ids (count, length) of texts that the model samples after what texts begin with."""
    torch.manual_seed(seed)
    first = torch.full((count, 1), _opening(model, encoder.tokenizer), device=model.device)
    texts = []
    with progress_bar() as bar:
        task = bar.add_task("the model writes texts", total=count, note="")
        for rows in first.split(TEXTS_AT_ONCE):
            texts.append(
                model.generate(
                    rows,
                    attention_mask=torch.ones_like(rows),
                    max_new_tokens=length - 1,
                    min_new_tokens=length - 1,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    pad_token_id=_pad(model, encoder),
                )
            )
            bar.advance(task, len(rows))
    return torch.cat(texts)


def _conversations(model: PreTrainedModel, encoder: Encoder, rng: random.Random, most: int) -> Iterator[dict]:
    none = CollaborativePrompt("none", "", "chat")
    opening = encoder.render([{"role": "user", "content": MARK}], none, generate=False).partition(MARK)[0]
    for _ in range(0, most, AT_ONCE):
        questions = [q for q in _sample(model, encoder, [opening] * AT_ONCE, QUESTION_TOKENS) if len(q.split()) > 2]
        asked = [encoder.render([{"role": "user", "content": q}], none, generate=True) for q in questions]
        for question, answer in zip(questions, _sample(model, encoder, asked, ANSWER_TOKENS), strict=True):
            if answer:
                yield {"instruction": question, "output": answer}


def _continuations(model: PreTrainedModel, encoder: Encoder, rng: random.Random, most: int) -> Iterator[dict]:
    tokenizer = encoder.tokenizer
    for _ in range(0, most, AT_ONCE):
        start = torch.tensor([[rng.randrange(model.config.vocab_size)] for _ in range(AT_ONCE)], device=model.device)
        greedy = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=rng.randint(2, 4),
            do_sample=False,
            pad_token_id=_pad(model, encoder),
        )
        texts = tokenizer.batch_decode(greedy, skip_special_tokens=True)
        for head, tail in zip(texts, _sample(model, encoder, texts, TEXT_TOKENS), strict=True):
            if tail:
                yield {"text": f"{head} {tail}".strip()}


@torch.no_grad()
def _sample(model: PreTrainedModel, encoder: Encoder, texts: list[str], tokens: int) -> list[str]:
    """Sampled continuations, one a text; batches are padded on the left."""
    if not texts:
        return []
    tokenizer, pad = encoder.tokenizer, _pad(model, encoder)
    rows = [tokenizer(t, add_special_tokens=not t.startswith(tokenizer.bos_token or "\0"))["input_ids"] for t in texts]
    rows = [row or [pad] for row in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        pad_token_id=pad,
        eos_token_id=end_tokens(model, tokenizer) or None,
    )
    return [text.strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def _opening(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stood before each text when the model was trained, as far as its tokenizer tells.

    It is the one that the tokenizer puts there, or the <|endoftext|> that divided texts; a chat model's own BOS and EOS
    would open a conversation.
    """
    first = tokenizer("a")["input_ids"][0]
    special = first if first in tokenizer.all_special_ids else None
    divider = tokenizer.get_vocab().get("<|endoftext|>")
    return _known(model, special, divider, tokenizer.bos_token_id, tokenizer.eos_token_id)


def _pad(model: PreTrainedModel, encoder: Encoder) -> int:
    return _known(model, encoder.tokenizer.pad_token_id, encoder.tokenizer.eos_token_id)


def _known(model: PreTrainedModel, *tokens: int | None) -> int:
    """The first that there is and that the model has a row for: tokenizers add tokens that it never saw."""
    return next((token for token in tokens if token is not None and token < model.config.vocab_size), 0)
