"""Records -> token batches: templates, labels on response tokens only, truncation, the shared prefix."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from compresso import bounded
from compresso.few_shapes import rounded_length
from compresso.prompts import CollaborativePrompt
from compresso.records import Record

IGNORE = -100  # the label of a token that is no target
MARK = "\u2047"  # stands for the user's words while a chat template is taken apart
SHARED_PREFIX_FROM = 16  # tokens; below this, sharing costs more than it saves


@dataclass(frozen=True)
class Example:
    """Token ids, and for each of them its label: itself in a response, else IGNORE."""

    ids: list[int]
    labels: list[int]
    own: bool = False
    """Of a text that the dense model wrote."""

    @property
    def first_target(self) -> int:
        return next(i for i, label in enumerate(self.labels) if label != IGNORE)


@dataclass(frozen=True)
class Batch:
    """`prefix` (P,) comes once before every row; `ids` and `labels` (B, T) are padded on the right.

    Attention is causal, so that padding on the right is never seen by a real token.
    """

    prefix: Tensor
    ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    """Real tokens of each row, those of the prefix among them."""
    places: Tensor
    """(N,) positions in the flattened rows whose next token is a target: found before the rows go to a device, which
    would have to be waited for."""
    own: int = 0
    """Rows that the dense model wrote: the last ones."""
    own_targets: int = 0
    """Of `places`, those in such rows: the last ones."""

    @property
    def tokens(self) -> int:
        """Real tokens, the prefix counted once per row."""
        return sum(self.lengths)

    @property
    def computed(self) -> int:
        """Real tokens that go through the model, the prefix counted once."""
        return self.tokens - len(self.prefix) * max(len(self.ids) - 1, 0)

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORE).sum())

    def unshared(self) -> "Batch":
        """The same rows with the prefix in front of each."""
        prefix = self.prefix.expand(len(self.ids), -1)
        labels = torch.cat([torch.full_like(prefix, IGNORE), self.labels], 1)
        ids = torch.cat([prefix, self.ids], 1)
        return replace(self, prefix=self.prefix[:0], ids=ids, labels=labels, places=before_targets(labels))

    def own_rows(self) -> "Batch":
        """The rows that the dense model wrote, by themselves."""
        others = len(self.ids) - self.own
        places = self.places[len(self.places) - self.own_targets :] - others * self.ids.shape[1]
        ids, labels = self.ids[others:], self.labels[others:]
        return replace(self, ids=ids, labels=labels, lengths=self.lengths[others:], places=places)

    def rows(self) -> Iterator["Batch"]:
        """The rows of an unshared batch, each by itself."""
        for ids, labels in zip(self.ids.split(1), self.labels.split(1), strict=True):
            yield Batch(self.prefix, ids, labels, (ids.numel(),), before_targets(labels))

    def to(self, device: torch.device) -> "Batch":
        prefix, ids, labels, places = (t.to(device) for t in (self.prefix, self.ids, self.labels, self.places))
        return replace(self, prefix=prefix, ids=ids, labels=labels, places=places)


def before_targets(labels: Tensor) -> Tensor:
    """Flat positions in rows of labels (B, T) that are followed, in their row, by a target: (N,)."""
    return functional.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero().squeeze(1)


class Encoder:
    """Turns records into examples with one tokenizer and one placement of the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, context: int | None = None):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.context = context
        """Positions of the model; None if it has no limit."""

    def room(self, prompt: CollaborativePrompt) -> int:
        """Tokens that a record may take after the prompt.

        Raises ValueError if the prompt leaves less than 64 of the model's context.
        """
        length = len(self.tokenizer(prompt.body)["input_ids"]) if prompt.body else 0
        if self.context is not None and length + 64 > self.context:
            raise ValueError(
                f"the collaborative prompt {prompt.name!r} has {length} tokens, and the model's context only "
                f"{self.context}; use a shorter one (--prompt short, middle or none)"
            )
        return self.max_length if self.context is None else min(self.max_length, self.context - length)

    def lengths(self, records: list[Record]) -> list[int]:
        """Tokens of each record's own words, up to `max_length`: enough to tell which records are similarly long."""
        texts = [record.text or "\n".join(turn["content"] for turn in record.messages) for record in records]
        if not texts:
            return []
        tokens = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [min(len(ids), self.max_length) for ids in tokens]

    def encode(self, record: Record, prompt: CollaborativePrompt) -> Example:
        """Tokens of one record after the prompt, cut to `room`; the response keeps at least a token."""
        prefix, response = self.split_text(record, prompt)
        before, after = self._tokens(prefix, response)
        body = prompt.body.strip()
        head = len(self._tokens(prefix[: prefix.find(body) + len(body)], "")[0]) if body else 0
        limit = self.room(prompt) + head
        before, after = cut(before, after, limit if self.context is None else min(limit, self.context), head)
        return Example(before + after, [IGNORE] * len(before) + after, record.own)

    def split_text(self, record: Record, prompt: CollaborativePrompt) -> tuple[str, str]:
        """The text before the response, and the response with what ends it.

        Raises ValueError if the chat template cannot render the record.
        """
        eos = self.tokenizer.eos_token or ""
        if not record.messages:
            return prompt.raw_text(), record.text
        if prompt.format == "alpaca" or not self.tokenizer.chat_template:
            return prompt.instruction(record.instruction, record.input), record.response + eos
        turns = list(record.messages)
        whole = self.render(turns, prompt, generate=False)
        opened = self.render(turns[:-1], prompt, generate=True)
        # up to where both agree: some templates open a turn in another way than they render it
        agreed = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(opened, whole, strict=False))
        before = "".join(a for a, _ in agreed)
        response = whole[len(before) :]
        if not response.strip():
            raise ValueError("the chat template leaves nothing of the response")
        if eos and eos in response:  # a line break after the end of the turn is not the model's to say
            response = response[: response.rindex(eos) + len(eos)]
        return before, response

    def render(self, turns: list[dict[str, str]], prompt: CollaborativePrompt, generate: bool) -> str:
        """A conversation as the tokenizer's chat template writes it, the prompt as its system turn.

        A template that knows no system turn gets the prompt in front of the first turn. Raises ValueError if it cannot
        render the conversation, bounded.TooMuch if it does not come to an end.
        """
        system = prompt.system
        own = [turn["content"] for turn in turns if turn["role"] == "system"]
        turns = [turn for turn in turns if turn["role"] != "system"]
        if own:
            system = "\n\n".join(filter(None, [system, *own]))
        if system is None:
            return bounded.render(self.tokenizer, turns, generate)
        try:
            text = bounded.render(self.tokenizer, [{"role": "system", "content": system}, *turns], generate)
            if system.strip() in text:
                return text
        except ValueError:
            pass
        first = {**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}
        return bounded.render(self.tokenizer, [first, *turns[1:]], generate)

    def question(self, message: str, prompt: CollaborativePrompt) -> list[int]:
        """Tokens that ask one question and leave the answer to the model."""
        if prompt.format == "alpaca" or not self.tokenizer.chat_template:
            text = prompt.instruction(message)
        else:
            text = self.render([{"role": "user", "content": message}], prompt, generate=True)
        return self.tokens_of_prefix(text)

    def system_turn(self, prompt: CollaborativePrompt) -> str:
        """The prompt as the chat template writes it, up to where the next turn begins; nothing without a prompt.

        A template that puts it into the user's turn gives all that stands before the user's words.
        """
        if prompt.system is None:
            return ""
        before = self.render([{"role": "user", "content": MARK}], prompt, generate=False).partition(MARK)[0]
        end = before.index(prompt.system) + len(prompt.system)
        special = {*self.tokenizer.all_special_tokens, *map(str, self.tokenizer.added_tokens_decoder.values())} - {""}
        starts = sorted({m.start() for token in special for m in re.finditer(re.escape(token), before[end:])})
        return before[: end + starts[1]] if len(starts) > 1 else before

    def tokens_of_prefix(self, text: str) -> list[int]:
        """Tokens of a text that others follow."""
        if not text:
            return []
        return self._drop_final(self.tokenizer(text, add_special_tokens=self._adds_special(text))["input_ids"])

    def _tokens(self, prefix: str, response: str) -> tuple[list[int], list[int]]:
        """Tokens of both parts, divided where the response begins.

        The whole is tokenised at once, as a user of the model would, and a token that
        reaches across the border counts as the response's.
        """
        special = self._adds_special(prefix)
        if not self.tokenizer.is_fast:
            before = self.tokenizer(prefix, add_special_tokens=special)["input_ids"] if prefix or special else []
            after = self.tokenizer(response, add_special_tokens=False)["input_ids"]
            return self._drop_final(before) if special else before, after
        out = self.tokenizer(prefix + response, add_special_tokens=special, return_offsets_mapping=True)
        ids, offsets = out["input_ids"], out["offset_mapping"]
        if len(ids) > 1 and ids[-1] == ids[-2] == self.tokenizer.eos_token_id:  # the tokenizer added another one
            ids, offsets = ids[:-1], offsets[:-1]
        border = next((i for i, (_, end) in enumerate(offsets) if end > len(prefix)), len(ids))
        return ids[:border], ids[border:]

    def _drop_final(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _adds_special(self, text: str) -> bool:
        """A template that writes the BOS itself must not get a second one."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))


def cut(before: list[int], after: list[int], limit: int, head: int) -> tuple[list[int], list[int]]:
    """Shorten to `limit` tokens: first the response, down to a quarter of the room after
    `head`, then what lies between the head and the last tokens before the response."""
    after = after[: max(limit - len(before), (limit - head) // 4, 1)]
    room = limit - len(after) - head
    if len(before) - head > room:
        tail = min(16, room // 2)
        before = before[: head + room - tail] + before[len(before) - tail :]
    return before, after


def collate(examples: list[Example], context: int | None = None) -> Batch:
    """Pad to the longest row with 0, which is never attended to; what all rows begin with becomes the prefix.

    Rows come in few lengths (`rounded_length`), which no more than the model's `context` positions take; those that the
    dense model wrote come last.
    """
    examples = sorted(examples, key=lambda e: e.own)
    rows = list(zip(*(e.ids[: max(e.first_target - 1, 0)] for e in examples), strict=False))
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, rows))
    if len(examples) < 2 or shared < SHARED_PREFIX_FROM:
        shared = 0
    longest = max(len(e.ids) for e in examples) - shared
    longest = rounded_length(longest, None if context is None else context - shared)
    ids = torch.zeros((len(examples), longest), dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORE)
    for i, e in enumerate(examples):
        ids[i, : len(e.ids) - shared] = torch.tensor(e.ids[shared:])
        labels[i, : len(e.ids) - shared] = torch.tensor(e.labels[shared:])
    prefix = torch.tensor(examples[0].ids[:shared], dtype=torch.long)
    own = sum(e.own for e in examples)
    own_targets = int((labels[len(examples) - own :, 1:] != IGNORE).sum())
    lengths = tuple(len(e.ids) for e in examples)
    return Batch(prefix, ids, labels, lengths, before_targets(labels), own, own_targets)


def batches(records: list[Record], encoder: Encoder, prompt: CollaborativePrompt, parts: int = 1) -> list[Batch]:
    """The records as `parts` batches of similar length each."""
    examples = sorted((encoder.encode(record, prompt) for record in records), key=lambda e: len(e.ids))
    borders = [i * len(examples) // parts for i in range(parts + 1)]
    return [collate(examples[a:b], encoder.context) for a, b in itertools.pairwise(borders) if b > a]
