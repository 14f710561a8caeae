"""Files and hub ids -> records. Knows nothing of tokens.

All files are read row by row, so that a wrong record can be named, and none has to fit in
memory (a .json list aside); hub ids are read by `datasets`.
"""

import csv
import glob
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresso import hub
from compresso.config import nearest_path

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
OUTPUT_NAMES = ("output", "response", "completion", "answer")
INPUT_NAMES = ("input", "context")
LONGEST_FIELD = 2**24  # characters of one in a CSV file
ROWS_AT_ONCE = 1024  # of a Parquet file


@dataclass(frozen=True)
class Record:
    """An exchange that ends with the assistant's response, or a plain text."""

    messages: tuple[dict[str, str], ...] = ()
    """Turns, each with `role` and `content`; empty for a plain text."""
    instruction: str = ""
    input: str = ""
    text: str = ""
    own: bool = False
    """Written by the dense model for recovery, which learns from it what else it would have written there."""

    @property
    def response(self) -> str:
        return self.messages[-1]["content"] if self.messages else self.text

    @staticmethod
    def instruct(instruction: str, input: str, output: str) -> "Record":
        user = f"{instruction}\n\n{input}" if input else instruction
        turns = ({"role": "user", "content": user}, {"role": "assistant", "content": output})
        return Record(messages=turns, instruction=instruction, input=input)


@dataclass
class Source:
    """The usable records of one file, and what was wrong with the others."""

    name: str
    weight: float | None = None
    records: list[Record] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """Line or row number, from 1, and the reason."""
    places: list[tuple[int, str]] = field(default_factory=list)
    """Line or row number of each record as it was read, and its file if there are several."""

    def add(self, number: int, row: Any, where: str = "") -> None:
        record, reason = parse_row(row)
        if record:
            self.records.append(record)
            self.places.append((number, where))
        else:
            self.skipped.append((number, where + reason))

    def epoch(self, rng: random.Random) -> Iterator[Record]:
        """Each record once."""
        yield from rng.sample(self.records, len(self.records))

    def report(self) -> str:
        """A line for the user about skipped records; empty when there is none."""
        if not self.skipped:
            return ""
        first = "; ".join(f"line {number}: {reason}" for number, reason in self.skipped[:5])
        return f"{self.name}: skipped {len(self.skipped)} of {len(self.skipped) + len(self.records)} records ({first})"


def parse_row(row: Any) -> tuple[Record | None, str]:
    """A record, or the reason why there is none; a row may be the ValueError that its reading ended with."""
    try:
        if isinstance(row, ValueError):
            raise row
        record = parse(row)
        "".join([record.text, *(turn["content"] for turn in record.messages)]).encode()
    except UnicodeEncodeError:
        return None, "half a surrogate pair in the text"
    except ValueError as error:
        return None, str(error)
    return record, ""


def parse(row: Any) -> Record:
    """One record from a decoded row. Raises ValueError with the reason if it is not usable."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    messages = row.get("messages")
    if messages is None and row.get("conversations") is not None:
        messages = row["conversations"]
    if messages is not None:
        return _conversation(messages)
    output = next((name for name in OUTPUT_NAMES if row.get(name) is not None), None)
    if "instruction" in row or output is not None:
        extra = next((name for name in INPUT_NAMES if row.get(name) is not None), "input")
        texts = {name: row.get(name) for name in ("instruction", extra, output or "output")}
        for name, value in texts.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be text, found {type(value).__name__}")
        instruction, more, answer = (value or "" for value in texts.values())
        if not answer.strip():
            raise ValueError("no response")
        if not instruction.strip() and not more.strip():
            raise ValueError("no instruction")
        return Record.instruct(instruction, more if more.strip() else "", answer)
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"text must be text, found {type(row['text']).__name__}")
        if not row["text"].strip():
            raise ValueError("empty text")
        return Record(text=row["text"])
    columns = ", ".join(str(key) for key in list(row)[:5]) or "none"
    raise ValueError(f"no instruction/input/output, messages or text column (found: {columns})")


def _conversation(messages: Any) -> Record:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("messages must be a list of turns")
    turns = []
    for turn in messages:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("every turn of messages needs a role and a content, both text")
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        turns.append({"role": role, "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        raise ValueError("no response")
    asked = [turn["content"] for turn in turns[:-1] if turn["role"] != "system"]
    if not asked:
        raise ValueError("no instruction")
    return Record(messages=tuple(turns), instruction="\n\n".join(asked))


def parts_of(data: str) -> list[tuple[str, float | None]]:
    """Names and weights in `a.jsonl:0.7,b.csv:0.3,org/name`. Raises ValueError if they make no sense."""
    parts: list[tuple[str, float | None]] = []
    for part in (part.strip() for part in data.split(",") if part.strip()):
        name, _, weight = part.rpartition(":")
        try:
            parts.append((name, float(weight)) if name else (part, None))
        except ValueError:
            parts.append((part, None))
        if parts[-1][1] is not None and not 0 < parts[-1][1] < float("inf"):
            raise ValueError(f"the weight of {parts[-1][0]} must be above 0, got {parts[-1][1]}")
    if not parts:
        raise ValueError("--data names no source")
    if len({weight is None for _, weight in parts}) > 1:
        raise ValueError("either every source of --data has a weight (a.jsonl:0.7,b.jsonl:0.3) or none has")
    return parts


def read_sources(data: str) -> list[Source]:
    """Read `a.jsonl:0.7,b.csv:0.3,org/name`. Raises FileNotFoundError or ValueError for a source of no use."""
    sources = []
    for name, weight in parts_of(data):
        source = Source(name, weight)
        files = files_of(name)
        for path in files:
            for number, row in rows_of(path):
                source.add(number, row, f"{path.name}: " if len(files) > 1 else "")
        if not files:
            for number, row in hub_rows(name):
                source.add(number, row)
        if not source.records:
            reason = source.report() or f"{source.name} is empty"
            raise ValueError(f"no usable record: {reason}. Expected instruction/input/output, messages or text columns")
        sources.append(source)
    return sources


def read_file(path: Path) -> Source:
    """What one file holds, whatever characters its name has. Raises FileNotFoundError or ValueError if it cannot be
    read."""
    source = Source(str(path))
    for number, row in rows_of(path):
        source.add(number, row)
    return source


def files_of(name: str) -> list[Path]:
    """The files that a source names, in order: one, those of a folder or a pattern (a/*.jsonl); none for a hub id.

    Raises FileNotFoundError or ValueError for what can be none of these.
    """
    path = Path(name)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found:
            raise ValueError(f"the folder {path} holds no data file ({', '.join(SUFFIXES)})")
        return found
    if path.is_file():
        found = [path]
    elif any(sign in name for sign in "*?["):
        found = sorted(Path(file) for file in glob.glob(name, recursive=True))
        if not found:
            raise FileNotFoundError(f"no data file fits {name}")
    elif path.suffix in SUFFIXES or name.count("/") != 1:
        raise FileNotFoundError(
            f"no data file {path}{nearest_path(path)}; expected a file ({', '.join(SUFFIXES)}), a folder or pattern of "
            "such files, a hub id org/name, self or demo"
        )
    else:
        return []
    for file in found:
        if file.suffix not in SUFFIXES:
            raise ValueError(
                f"{file}: cannot read {file.suffix or 'a file without suffix'}; expected {', '.join(SUFFIXES)}"
            )
    return found


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Line or row number, from 1, and what is there: decoded, or a ValueError. Raises ValueError for a damaged file."""
    readers = {".json": _json_rows, ".jsonl": _line_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    return readers[path.suffix](path)


def _line_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, ValueError("not JSON")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        with path.open("rb") as lines:
            first = lines.readline().strip()
        if not (first.startswith(b"{") and first.endswith(b"}")):
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        yield from _line_rows(path)  # JSON lines under the other name
        return
    if not isinstance(rows, list):
        found = f"an object ({', '.join(list(rows)[:5])})" if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(f"{path} must hold a list of records, found {found}; a record a line does as well (.jsonl)")
    yield from enumerate(rows, 1)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Every value is text as it stands there: an answer may be `None`, or 007."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            if not reader.fieldnames:
                raise ValueError("it has no line with the columns' names")
            yield from enumerate(reader, 1)
    except UnicodeDecodeError:
        raise ValueError(f"{path} cannot be read as .csv: it is not UTF-8 text") from None
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} cannot be read as .csv: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            parts = (batch.to_pylist() for batch in file.iter_batches(ROWS_AT_ONCE))
            yield from enumerate(itertools.chain.from_iterable(parts), 1)
    except (ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as .parquet: {reason}") from error


def hub_rows(name: str, streaming: bool = False, seed: int | None = None) -> Iterator[tuple[int, Any]]:
    """Rows of a dataset of the hub, fetched as a whole or while they are used; with a seed its files are shuffled.

    Raises FileNotFoundError if the hub does not give it.
    """
    from datasets import load_dataset

    try:
        rows = hub.fetch(name, lambda: load_dataset(name, split="train", streaming=streaming), "dataset")
        yield from enumerate(rows if seed is None else rows.shuffle(seed=seed, buffer_size=1), 1)
    except Exception as error:  # the hub client raises its own for each way to fail
        told = str(error) if isinstance(error, hub.Unavailable) else hub.explain(error, name, "dataset")
        told = told or f"the hub gave no such dataset ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        raise hub.Unavailable(f"no file {name!r}, and {told}. Or use local files, or `--data demo`") from error


def hold_out(sources: list[Source], count: int, seed: int) -> tuple[list[Source], list[Record]]:
    """Take `count` records (at most a fifth, at least one where there are two) away for validation."""
    total = sum(len(source.records) for source in sources)
    count = min(count, max(total // 5, 1)) if total > 1 else 0
    places = [(i, j) for i, source in enumerate(sources) for j in range(len(source.records))]
    random.Random(seed).shuffle(places)
    held = set(places[:count])
    rest = [
        Source(source.name, source.weight, [r for j, r in enumerate(source.records) if (i, j) not in held])
        for i, source in enumerate(sources)
    ]
    rest = [source for source in rest if source.records]
    validation = [sources[i].records[j] for i, j in sorted(held)]
    return rest, validation or [record for source in sources for record in source.records]


def similar_lengths(
    records: Iterator[Record], size: int, pool: int, seed: int, lengths: Callable[[list[Record]], list[int]]
) -> Iterator[list[Record]]:
    """Groups of `size` records of similar length, so that padding is small: `pool` groups at a time, shuffled.

    `lengths` measures the records of a pool.
    """
    rng = random.Random(seed)
    while True:
        together = [*itertools.islice(records, size * pool)]
        order = sorted(range(len(together)), key=lengths(together).__getitem__)
        groups = [[together[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
        rng.shuffle(groups)
        yield from groups
