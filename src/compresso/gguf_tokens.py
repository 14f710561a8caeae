"""A tokenizer as the fields of a GGUF file, so that llama.cpp reads text as transformers does."""

import json
from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA_3: "llama-bpe", QWEN_2: "qwen2", TEKKEN: "tekken"}
"""llama.cpp's name for how a text is divided before merges apply, by the regular expression that does it."""
SAMPLE = "It's 1,234.5 °C — naïve?\n\n\tfor (i = 0; i < 10; i++)  // 你好 😀 end"


def write_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add tokens, merges, special tokens and the chat template; `rows` is that of the embedding.

    Raises ValueError for a tokenizer that llama.cpp has no form for.
    """
    if not tokenizer.is_fast:
        raise ValueError("a GGUF file needs a fast tokenizer (tokenizer.json), and this one is slow")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise ValueError(f"llama.cpp has no form for a {model['type']} tokenizer of transformers; BPE ones are written")
    tokens = {i: token for token, i in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in whole["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= rows:
        raise ValueError(f"the tokenizer has token {max(tokens)}, and the embedding only {rows} rows")
    listed = [tokens.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [types.get(i, TokenType.UNUSED) for i in range(rows)]
    if model.get("byte_fallback"):
        special = {token: TokenType.BYTE for token in listed if _is_byte(token)}
        special[model.get("unk_token")] = TokenType.UNKNOWN
        kinds = [special.get(token, kind) for token, kind in zip(listed, kinds, strict=True)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(i) for i in range(rows)])  # pieces are listed in the order of their merges
        writer.add_add_space_prefix(_adds_space(whole))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_division(whole["pre_tokenizer"]))
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_token_list(listed)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _is_byte(token: str) -> bool:
    """Whether a token stands for one byte, `<0x0A>`."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _parts(given: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order."""
    if given and given["type"] == "Sequence":
        for part in given[inner]:
            yield from _parts(part, inner)
    elif given:
        yield given


def _adds_space(whole: dict[str, Any]) -> bool:
    """Whether a sentencepiece-like tokenizer puts a space before the text."""
    normal = any(part["type"] == "Prepend" for part in _parts(whole["normalizer"], "normalizers"))
    return normal or any(
        part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in _parts(whole["pre_tokenizer"], "pretokenizers")
    )


def _division(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for how a byte-level BPE divides a text."""
    parts = list(_parts(pre_tokenizer, "pretokenizers"))
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = parts[0]["pattern"].get("Regex")
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise ValueError(
        f"this tokenizer divides text in a way ({', '.join(kinds) or 'none'}) that is none of those known here by "
        f"llama.cpp's names (gpt-2, smollm, {', '.join(SPLITS.values())}); please report it with its tokenizer.json"
    )
