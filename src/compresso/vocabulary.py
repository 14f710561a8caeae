"""A vocabulary of the tokens that a corpus uses: found, closed, taken out of the tokenizer and out of the model.

Every text still comes back as it was, because single bytes (or characters) stay; a text of the corpus becomes the same
tokens as before, under new numbers. BPE divides a text by merges, each time the one of lowest rank: what the merges
inside a token of the corpus make on their way stays too, so that they go on as they did, and a merge that is gone was
none of theirs. A unigram model takes the likeliest division, and that one stays possible.
"""

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso import checkpoint
from compresso.batches import Encoder
from compresso.prompts import CollaborativePrompt
from compresso.records import Record

SPACE = "\u2581"  # stands for a space in sentencepiece's pieces; as bytes it would come back as itself
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
AT_ONCE = 1000  # records that are tokenised together
IDS = ("_token_id", "suppress_tokens")  # ends of names of settings that hold tokens


def used_tokens(encoder: Encoder, records: Iterable[Record], prompt: CollaborativePrompt) -> set[int]:
    """Ids of the tokens in records as `encoder` writes them, whole, with the prompt and the chat template."""
    found: set[int] = set()
    texts = [prompt.body, prompt.body.strip()]  # by itself, as the encoder measures it
    rest = iter(records)
    while texts:
        found.update(*encoder.tokenizer(texts, add_special_tokens=False)["input_ids"])
        texts = ["".join(encoder.split_text(record, prompt)) for record in itertools.islice(rest, AT_ONCE)]
    return found


def special_tokens(model: PreTrainedModel) -> set[int]:
    """Ids that config and generation config name: where a text begins and ends, and the like."""
    return {i for settings in _settings(model) for value in _ids(settings).values() for i in _listed(value)}


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError, with what was found, for a tokenizer or a model whose vocabulary cannot be cut."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"the vocabulary of a {model.config.model_type} cannot be cut: its embedding is a "
            f"{type(embedding).__name__} and its head a {type(head).__name__}, expected one matrix each; leave vocab "
            "out of --units"
        )
    whole, rows = _read(tokenizer), len(embedding.weight)
    last = max(_numbers(whole).values())
    if last >= rows or len(head.weight) != rows:
        raise ValueError(
            f"the tokenizer has token {last}, the embedding {rows} rows and the head {len(head.weight)}, expected a "
            "row for each token; leave vocab out of --units"
        )


def kept_tokens(tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> list[int]:
    """Ids that stay, in order: those used, those that they are made of, added tokens, and single bytes or characters.

    Single characters stay where there is no fallback to bytes. Raises ValueError for a tokenizer that is not fast, or
    neither BPE nor Unigram.
    """
    whole = _read(tokenizer)
    model, numbers = whole["model"], _numbers(whole)
    tokens = {i: token for token, i in numbers.items()}
    kept = {tokens[i] for i in {*used, model.get("unk_id")} if i in tokens}
    added = {token["content"] for token in whole["added_tokens"]}
    if model["type"] == "BPE":
        ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
        kept.update(*(_made_of(token, ranks) for token in kept - BYTES - added))
        kept.add(model["unk_token"])
    else:
        kept.update(*map(set, kept))  # an unknown character costs less than some pieces, but none is unknown
        kept.add(min(model["vocab"], key=lambda piece: piece[1])[0])  # from which that cost is counted
    if model.get("byte_fallback") and numbers.keys() >= BYTES:
        kept |= BYTES | {SPACE}
    else:
        kept.update(token for token in numbers if len(token) == 1)
    return sorted(numbers[token] for token in kept | added if token in numbers)


def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """A tokenizer with these tokens alone (as `kept_tokens` gives them), numbered from 0 in their order.

    Chat template, special tokens and all other settings are those of `tokenizer`, which stays as it is. Raises
    ValueError as `kept_tokens`, and where the tokens cannot be numbered so.
    """
    whole = _read(tokenizer)
    new = {old: i for i, old in enumerate(kept)}
    numbers = {token: new[old] for token, old in _numbers(whole).items() if old in new}
    model = whole["model"]
    if model["type"] == "BPE":
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
        model["merges"] = [(a, b) for a, b in _merges(model) if {a, b, a + b} <= model["vocab"].keys()]
    else:
        model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = new.get(model["unk_id"])
    for added in whole["added_tokens"]:
        added["id"] = new[added["id"]]
    if whole["padding"]:
        whole["padding"]["pad_id"] = numbers.get(whole["padding"]["pad_token"], 0)
    _renumber_processor(whole["post_processor"], new)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        smaller = checkpoint.load_tokenizer(folder)
    for name in ("padding_side", "truncation_side", "name_or_path"):
        setattr(smaller, name, getattr(tokenizer, name))
    if smaller.get_vocab() != numbers:
        raise ValueError(
            f"this tokenizer ({type(tokenizer).__name__}) numbers its tokens in a way that does not survive when some "
            "of them go; leave vocab out of --units, and please report it with its tokenizer.json"
        )
    return smaller


def shared_tokens(tokenizer: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase) -> list[int]:
    """Ids in `tokenizer` of the tokens that `smaller`, which was made from it, still has, in their order."""
    numbers = tokenizer.get_vocab()
    return sorted(numbers[token] for token in smaller.get_vocab())


def cut(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave in embedding and head the rows of these tokens, in place; config and generation config follow.

    Rows that belong to no token go, and ids in a config that are not among `kept` (an id of such a row) become None.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = {id(p): p for p in (*embedding.parameters(), *head.parameters())}  # a tied one once
    for parameter in matrices.values():
        parameter.data = parameter.data[torch.tensor(kept, device=parameter.device)]
    new = {old: i for i, old in enumerate(kept)}
    for settings in _settings(model):
        for name, value in _ids(settings).items():
            listed = [new[old] for old in _listed(value) if old in new]
            setattr(settings, name, listed if isinstance(value, (list, tuple)) else next(iter(listed), None))
    embedding.padding_idx = model.config.pad_token_id
    model.resize_token_embeddings(len(kept))  # changes no numbers any more, but what the modules say of them


def _read(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json. Raises ValueError for one that is not understood here."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the vocabulary of a slow tokenizer ({type(tokenizer).__name__}) cannot be cut, expected a fast one "
            "(tokenizer.json); leave vocab out of --units"
        )
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] not in ("BPE", "Unigram") or affixes:
        kind = f"{model['type']}{f' with {affixes!r} at parts of words' if affixes else ''}"
        raise ValueError(
            f"the vocabulary of this tokenizer ({kind}) cannot be cut, expected BPE or Unigram; leave vocab out of "
            "--units"
        )
    return whole


def _numbers(whole: dict[str, Any]) -> dict[str, int]:
    """All tokens and their ids."""
    vocab = whole["model"]["vocab"]
    if whole["model"]["type"] == "Unigram":
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    return vocab | {added["content"]: added["id"] for added in whole["added_tokens"]}


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs that BPE joins, in the order of their ranks; older files write them as one text."""
    for pair in model["merges"]:
        a, b = pair.split(" ") if isinstance(pair, str) else pair
        yield a, b


def _made_of(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """All that BPE makes of the characters of a token, on its way to the token."""
    symbols = list(token)
    made = set(symbols)
    while found := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
        _, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        made.add(symbols[i])
    return made


def _renumber_processor(processor: dict[str, Any] | None, new: dict[int, int]) -> None:
    """Ids in what puts special tokens around a text."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _renumber_processor(inner, new)
    for special in processor.get("special_tokens", {}).values():  # TemplateProcessing
        special["ids"] = [new[old] for old in special["ids"]]
    for name in {"sep", "cls"} & processor.keys():  # BertProcessing, RobertaProcessing
        processor[name][1] = new[processor[name][1]]


def _settings(model: PreTrainedModel) -> list[Any]:
    return [settings for settings in (model.config, model.generation_config) if settings is not None]


def _ids(settings: Any) -> dict[str, Any]:
    """Settings that hold an id of a token or a list of them."""
    return {name: value for name, value in vars(settings).items() if name.endswith(IDS) and value is not None}


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
