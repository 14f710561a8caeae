"""Texts for perplexities: WikiText-2, PTB and C4, from the hub or from local files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compresso import hub


@dataclass(frozen=True)
class Text:
    """A text of which perplexities are published, put together as those who publish them do."""

    patterns: tuple[str, ...]
    """Names of local files, the first that exists is taken."""
    dataset: dict[str, Any]
    """Arguments of datasets.load_dataset."""
    column: str
    separator: str
    lines: Literal["with ends", "stripped"] | None
    """Whether a row of the data set is a line of the file, with the end of the line or stripped; None: neither."""


TEXTS = {
    "wikitext2": Text(
        ("wikitext2.txt", "wikitext2*test*.txt", "wikitext2*.txt"),
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
        "text",
        "\n\n",
        "with ends",
    ),
    "ptb": Text(
        ("ptb.txt", "ptb*test*.txt", "ptb*.txt"),
        {
            "path": "ptb-text-only/ptb_text_only",
            "revision": "refs/convert/parquet",
            "data_files": "penn_treebank/test/*.parquet",
            "split": "train",
        },
        "sentence",
        "\n\n",
        "stripped",
    ),
    "c4": Text(
        ("c4.txt", "c4*valid*.txt", "c4*.txt"),
        {"path": "allenai/c4", "data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "train[:1100]"},
        "text",
        " ",
        None,
    ),
}


def find_text(name: str, data_dir: Path) -> Path | None:
    """The local file of a text."""
    for pattern in TEXTS[name].patterns:
        for folder in (data_dir, data_dir / "text"):
            found = sorted(folder.glob(pattern))
            if found:
                return found[0]
    return None


def read_text(name: str, data_dir: Path | None) -> tuple[str, str]:
    """The text, and where it is from.

    Raises FileNotFoundError if there is no local file, or if the hub does not give it.
    """
    text = TEXTS[name]
    if data_dir is None:
        return _from_hub(name)
    path = find_text(name, data_dir)
    if path is None:
        raise FileNotFoundError(f"no file {text.patterns[-1]} in {data_dir} or {data_dir / 'text'}")
    content = path.read_text(encoding="utf-8")
    if text.lines == "with ends":
        content = text.separator.join(line if line.strip() else "" for line in content.splitlines(keepends=True))
    elif text.lines == "stripped":
        content = text.separator.join(line.strip() for line in content.splitlines() if line.strip())
    return content, path.name


def _from_hub(name: str) -> tuple[str, str]:
    from datasets import load_dataset

    text = TEXTS[name]
    load: Callable[..., Any] = load_dataset
    place = text.dataset["path"]
    try:
        rows = hub.fetch(place, lambda: load(**text.dataset), "dataset")[text.column]
    except Exception as error:  # the hub's clients raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"the hub did not give {place} ({reason}); --data-dir reads local files") from error
    return text.separator.join(rows), text.dataset["path"]
