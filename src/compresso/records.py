"""Files and hub ids -> records. Knows nothing of tokens.

JSON is read line by line here, so that a wrong record can be named by its line; CSV,
Parquet and hub ids are read by `datasets`.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
OUTPUT_NAMES = ("output", "response", "completion", "answer")


@dataclass(frozen=True)
class Record:
    """An exchange that ends with the assistant's response, or a plain text."""

    messages: tuple[dict[str, str], ...] = ()
    """Turns, each with `role` and `content`; empty for a plain text."""
    instruction: str = ""
    input: str = ""
    text: str = ""

    @property
    def response(self) -> str:
        return self.messages[-1]["content"] if self.messages else self.text

    def length(self) -> int:
        """Characters, as a cheap stand-in for tokens."""
        return len(self.text) + sum(len(turn["content"]) for turn in self.messages)

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

    def add(self, number: int, row: Any) -> None:
        try:
            record = parse(row)
            "".join([record.text, *(turn["content"] for turn in record.messages)]).encode()
            self.records.append(record)
        except UnicodeEncodeError:
            self.skipped.append((number, "half a surrogate pair in the text"))
        except ValueError as error:
            self.skipped.append((number, str(error)))

    def report(self) -> str:
        """A line for the user about skipped records; empty when there is none."""
        if not self.skipped:
            return ""
        first = "; ".join(f"line {number}: {reason}" for number, reason in self.skipped[:5])
        return f"{self.name}: skipped {len(self.skipped)} of {len(self.skipped) + len(self.records)} records ({first})"


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
        texts = {name: row.get(name) for name in ("instruction", "input")} | {"output": row.get(output or "output")}
        for name, value in texts.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be text, found {type(value).__name__}")
        instruction, extra, answer = (value or "" for value in texts.values())
        if not answer.strip():
            raise ValueError("no response")
        if not instruction.strip() and not extra.strip():
            raise ValueError("no instruction")
        return Record.instruct(instruction, extra if extra.strip() else "", answer)
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


def read_sources(data: str) -> list[Source]:
    """Read `a.jsonl:0.7,b.csv:0.3,org/name`. Raises FileNotFoundError or ValueError for a source of no use."""
    sources = []
    for part in (part.strip() for part in data.split(",") if part.strip()):
        name, _, weight = part.rpartition(":")
        try:
            source = Source(name, float(weight)) if name else Source(part)
        except ValueError:
            source = Source(part)
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise ValueError(f"the weight of {source.name} must be above 0, got {source.weight}")
        _read(source)
        if not source.records:
            reason = source.report() or f"{source.name} is empty"
            raise ValueError(f"no usable record: {reason}. Expected instruction/input/output, messages or text columns")
        sources.append(source)
    if not sources:
        raise ValueError("--data names no source")
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("either every source of --data has a weight (a.jsonl:0.7,b.jsonl:0.3) or none has")
    return sources


def _read(source: Source) -> None:
    path = Path(source.name)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the files in it ({', '.join(SUFFIXES)})")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; expected {', '.join(SUFFIXES)}"
            )
        reader = {".json": _read_json, ".jsonl": _read_jsonl}.get(path.suffix, _read_table)
        reader(source, path)
    elif path.suffix in SUFFIXES or source.name.count("/") != 1:
        raise FileNotFoundError(
            f"no data file {path}; expected a file ({', '.join(SUFFIXES)}), a hub id org/name, self or demo"
        )
    else:
        _read_hub(source)


def _read_jsonl(source: Source, path: Path) -> None:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                source.add(number, json.loads(line))
            except (ValueError, RecursionError):
                source.skipped.append((number, "not JSON"))


def _read_json(source: Source, path: Path) -> None:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        with path.open("rb") as lines:
            first = lines.readline().strip()
        if first.startswith(b"{") and first.endswith(b"}"):
            _read_jsonl(source, path)  # JSON lines under the other name
            return
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of records, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        source.add(number, row)


def _read_table(source: Source, path: Path) -> None:
    from datasets import Dataset
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    try:
        reader = Dataset.from_csv if path.suffix == ".csv" else Dataset.from_parquet
        for number, row in enumerate(reader(str(path), keep_in_memory=True), 1):
            source.add(number, row)
    except Exception as error:  # pandas, pyarrow and datasets each raise their own
        raise ValueError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}") from error


def _read_hub(source: Source) -> None:
    from datasets import load_dataset

    try:
        for number, row in enumerate(load_dataset(source.name, split="train"), 1):
            source.add(number, row)
    except Exception as error:  # the hub client raises its own for each way to fail
        raise FileNotFoundError(
            f"no file {source.name!r}, and the hub gave no such dataset ({type(error).__name__}). Check the "
            "spelling and the network, or use local files or `--data demo`"
        ) from error


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


def similar_lengths(records: Iterator[Record], size: int, pool: int, seed: int) -> Iterator[list[Record]]:
    """Groups of `size` records of similar length, so that padding is small: `pool` groups at a time, shuffled."""
    rng = random.Random(seed)
    while True:
        together = sorted(itertools.islice(records, size * pool), key=Record.length)
        groups = [together[i : i + size] for i in range(0, len(together), size)]
        rng.shuffle(groups)
        yield from groups


def stream(sources: list[Source], seed: int) -> Iterator[Record]:
    """Records without end: shuffled anew each epoch; with weights, each draw picks its source by weight."""
    rng = random.Random(seed)

    def epochs(records: list[Record]) -> Iterator[Record]:
        while True:
            yield from rng.sample(records, len(records))

    if any(source.weight is not None for source in sources):
        streams = [epochs(source.records) for source in sources]
        weights = [source.weight or 0.0 for source in sources]
        while True:
            yield next(rng.choices(streams, weights)[0])
    yield from epochs([record for source in sources for record in source.records])
