"""Ask a model something, with the collaborative prompt that it carries; ask two the same."""

from dataclasses import replace
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from compresso import checkpoint
from compresso.batches import Encoder
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.workbench import console, release_memory, status


class Opened(NamedTuple):
    """A model that can be asked something."""

    model: PreTrainedModel
    encoder: Encoder
    prompt: CollaborativePrompt


class TooLong(ValueError):
    """A question leaves no position for its answer."""


def open_model(model: str, prompt: str | None = None) -> Opened:
    """Load a run folder, a checkpoint, a .gguf file or a hub id, with its own prompt or another."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with status(f"loading {model}"):
        loaded, tokenizer = checkpoint.load(checkpoint.of_run(model), any_family=True)
    encoder = Encoder(tokenizer, max_length=0, context=getattr(loaded.config, "max_position_embeddings", None))
    return Opened(loaded, encoder, prompt_for(loaded, tokenizer, prompt))


def prompt_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None, form: str = "auto"
) -> CollaborativePrompt:
    """The prompt called `name`, or the one that the checkpoint carries, or none.

    `form` is the placement; auto: the stored one, else chat where the tokenizer has a template.
    """
    stored = checkpoint.prompt_of(model.config)
    if form == "auto":
        form = stored.format if stored else "chat" if tokenizer.chat_template else "alpaca"
    if form == "chat" and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use --prompt-format alpaca")
    if name is not None:
        return find_prompt(name, form)
    return replace(stored, format=form) if stored else find_prompt("none", form)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens with which an answer may end: the tokenizer's, and those of the generation config, where chat models list
    the ends of a turn."""
    told = model.generation_config.eos_token_id if model.generation_config else None
    listed = told if isinstance(told, list) else [told]
    return sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None})


@torch.no_grad()
def answer(
    model: PreTrainedModel, encoder: Encoder, prompt: CollaborativePrompt, message: str, max_new_tokens: int = 64
) -> str:
    """The model's greedy answer to one question. Raises TooLong if that fills the model's context."""
    message = message.encode("utf-8", "replace").decode()  # a terminal may pass half a surrogate pair
    ids = torch.tensor([encoder.question(message, prompt)], device=model.device)
    if encoder.context is not None and ids.shape[1] >= encoder.context:
        raise TooLong(
            f"the question takes {ids.shape[1]} tokens with all that stands around it, and the model has positions for "
            f"{encoder.context}, the answer's among them; ask a shorter one"
        )
    tokenizer, ends = encoder.tokenizer, end_tokens(model, encoder.tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    room = min(max_new_tokens, (encoder.context or 10**9) - ids.shape[1])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        do_sample=False,
        return_dict_in_generate=False,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def chat(model: str, message: str | None = None, prompt: str | None = None, max_new_tokens: int = 256) -> str | None:
    """Answer one message, or each line that is typed until an empty one.

    `model` is a run folder, a checkpoint or a hub id. `prompt` replaces the stored
    collaborative prompt, by name or file.
    """
    opened = open_model(model, prompt)
    if message is not None:
        reply = answer(*opened, message, max_new_tokens)
        console.print(reply, markup=False)
        return reply
    console.print("An empty line ends the conversation; every question stands alone.")
    while True:
        try:
            message = console.input("> ").strip()
        except EOFError:
            return None
        if not message:
            return None
        console.print(answer(*opened, message, max_new_tokens), markup=False)


def compare(
    first: str, second: str, messages: list[str], prompt: str | None = None, max_new_tokens: int = 128
) -> list[tuple[str, str]]:
    """Print the answers of two models to the same messages side by side, and return them.

    One model is in memory at a time; each is asked with the prompt that it carries, or with `prompt`.
    """
    columns, headings = [], []
    for model in (first, second):  # before one is loaded for nothing
        checkpoint.find(checkpoint.of_run(model), any_family=True)
    for model in (first, second):
        opened = open_model(model, prompt)
        headings.append(f"{model} (prompt: {opened.prompt.name})")
        with status(f"{model} answers"):
            columns.append([answer(*opened, message, max_new_tokens) for message in messages])
        del opened
        release_memory()
    answers = list(zip(*columns, strict=True))
    for message, pair in zip(messages, answers, strict=True):
        table = Table(title=Text(f"“{message}”"), show_lines=True)
        for heading in headings:
            table.add_column(Text(heading), ratio=1)
        table.add_row(*map(Text, pair))
        console.print(table)
    return answers
