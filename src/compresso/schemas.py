"""What the files of a run folder must hold to be read, and the check of it: files may be damaged or foreign."""

import json
from typing import Any

SCHEMA = "compresso-eval/1"
MOST_MODELS, MOST_FIGURES = 50, 1000  # beyond them no table can be read, and pictures take hours
LARGEST = 2**63  # of a whole number
SPREADS = "prefill_tokens_per_second|decode_tokens_per_second|first_token_seconds?|peak_memory_bytes?"
KINDS: dict[str, Any] = {"number": (int, float), "whole number": int, "text": str, "object": dict, "list": list}
SUMMARY = {
    "sparsity|target_sparsity|seconds?": "number",
    "perplexity_window": "whole number",
    "parameters|prunable_parameters|hidden_size.before|after": "number",
    "vocabulary?.tokens|parameters.before|after": "number",
    "bytes.before|after?": "number",
    "loss|perplexity.dense|cut|recovered?": "number",
    "cost?.before|after.batch|context|parameters?|kv_bytes_per_token?": "number",
    f"cost?.before|after.{SPREADS}.median|min|max": "number",
    "logit_differences?|operations?.*": "number",
    "model": "text",
    "sample.question|dense|cut|recovered?": "text",
    "recovery?": "object",
}
METRICS = {"loss|expected_sparsity?|target_sparsity?": "number", "stage|phase": "text"}
EVALUATION = {
    "schema": "text",
    "models.*.stage?|fingerprint?": "text",
    "models.*.parameters": "number",
    "results|averages?.*.*.metric|group?": "text",
    "results|averages?.*.*.value?|stderr?": "number",
    "comparisons?.[].a|b|task|metric": "text",
    "comparisons?.[].difference|low|high|p_value?": "number",
    "cost?.*.batch|context|parameters?|weight_bytes?|kv_bytes_per_token?": "number",
    f"cost?.*.{SPREADS}.median|min|max": "number",
    "left_out?|versions?.*": "text",
}
"""What the page needs of a file: keys of nested objects, each of those between |, those with ? if they are there; * is
every key, [] every item of a list. Null counts as missing."""


def parse(text: bytes, needed: dict[str, str], where: str) -> Any:
    """JSON that has what is needed, without its nulls. Raises ValueError, naming `where`, if it has not."""
    try:
        found = json.loads(text, object_hook=lambda part: {k: v for k, v in part.items() if v is not None})
        for keys, kind in needed.items():
            _check(found, keys, kind, "it")
        if needed is EVALUATION and found["schema"] != SCHEMA:
            raise ValueError(f"its schema is {found['schema'][:80]!r}, expected {SCHEMA!r}")
        if needed is EVALUATION:
            most = max(map(len, [found["models"], *found["results"].values()]), default=0)
            if len(found["models"]) > MOST_MODELS or most > MOST_FIGURES:
                raise ValueError(f"it has more than {MOST_MODELS} models, or {MOST_FIGURES} figures of one")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged or not of this version: {error}. Restore it, or run it again") from None
    return found


def _check(found: Any, keys: str, kind: str, where: str) -> None:
    """Raise ValueError unless all that these keys lead to is of this kind."""
    first, _, deeper = keys.partition(".")
    expected = kind if not keys else "list" if first == "[]" else "object"
    if not isinstance(found, KINDS[expected]):
        raise ValueError(f"{where} is {str(found)[:40]!r}, expected: {expected}")
    if isinstance(found, int) and abs(found) > LARGEST:
        raise ValueError(f"{where} is a number of {len(str(found))} digits")
    if first in ("*", "[]"):
        for name, inner in found.items() if first == "*" else enumerate(found):
            _check(inner, deeper, kind, f"{where}[{name!r}]")
    for key in first.split("|") if first not in ("", "*", "[]") else ():
        if key.removesuffix("?") in found:
            _check(found[key.removesuffix("?")], deeper, kind, f"{where}[{key.removesuffix('?')!r}]")
        elif not key.endswith("?"):
            raise ValueError(f"{where} has no {key!r}")
