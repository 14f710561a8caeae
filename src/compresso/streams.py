"""Data that is read while it is used: many files, or a dataset of the hub that no disk need hold.

The order is that of shuffled files, and within them of a buffer from which records are drawn; it depends on the seed
alone, so that every process of a launch draws the same records and takes its share, and a run can go on from any step.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from compresso.records import Record, Source, files_of, hold_out, hub_rows, parse_row, parts_of, rows_of

BUFFER = 4096  # records that are in memory at a time


class Stream:
    """A source without end in sight. `usable` gives the reason why a record cannot be used, or nothing."""

    def __init__(self, name: str, weight: float | None, usable: Callable[[Record], str | None]):
        self.name, self.weight = name, weight
        self.skipped = 0
        self.reasons: list[str] = []
        """Of the first records that were left out."""
        self._usable = usable
        self._held: set[bytes] = set()
        self._files = files_of(name)

    def hold_out(self, count: int) -> list[Record]:
        """The first records, which no epoch gives from now on: `count`, or a fifth of what is there if that is less.

        Raises ValueError if there is none.
        """
        first = list(itertools.islice(self._records(None), 5 * count))
        if not first:
            raise ValueError(f"no usable record: {self.report() or f'{self.name} is empty'}")
        held = first[: min(count, len(first) // 5)]
        self._held = {_digest(record) for record in held}
        return held or first

    def without(self, records: list[Record]) -> "Stream":
        """The same, but epochs give none of these records and their like either."""
        self._held |= {_digest(record) for record in records}
        return self

    def epoch(self, rng: random.Random) -> Iterator[Record]:
        """Each record once, but those held out and their like."""
        records = (r for r in self._records(rng) if not self._held or _digest(r) not in self._held)
        buffer = list(itertools.islice(records, BUFFER))
        rng.shuffle(buffer)
        for record in records:
            place = rng.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = record
        yield from buffer

    def report(self) -> str:
        """A line for the user about records that were left out so far; empty when there is none."""
        return (
            f"{self.name}: left out {self.skipped} records so far ({'; '.join(self.reasons)})" if self.skipped else ""
        )

    def _records(self, rng: random.Random | None) -> Iterator[Record]:
        for where, number, row in self._rows(rng):
            record, reason = parse_row(row)
            if record is not None:
                reason = self._usable(record) or ""
                if not reason:
                    yield record
                    continue
            self.skipped += 1
            if len(self.reasons) < 5:
                self.reasons.append(f"{where}line {number}: {reason}")

    def _rows(self, rng: random.Random | None) -> Iterator[tuple[str, int, Any]]:
        if not self._files:
            seed = None if rng is None else rng.randrange(2**31)
            yield from (("", number, row) for number, row in hub_rows(self.name, True, seed))
            return
        files = list(self._files)
        if rng is not None:
            rng.shuffle(files)
        for path in files:
            yield from ((f"{path.name} ", number, row) for number, row in rows_of(path))


def _digest(record: Record) -> bytes:
    parts = [record.text, *(f"{turn['role']}\0{turn['content']}" for turn in record.messages)]
    return hashlib.sha1("\0".join(parts).encode()).digest()


def open_streams(data: str, usable: Callable[[Record], str | None]) -> list[Stream]:
    """As `records.read_sources`, without reading; raises as it does for what is not there."""
    return [Stream(name, weight, usable) for name, weight in parts_of(data)]


def take_held_out(
    sources: list[Source] | list[Stream], count: int, seed: int
) -> tuple[list[Source] | list[Stream], list[Record]]:
    """Take about `count` records away for validation; the sources without them, and these.

    Of records in memory any, at most a fifth; of a stream the first ones.
    """
    streams = [source for source in sources if isinstance(source, Stream)]
    if streams:
        each = -(-count // len(streams))
        return streams, [record for stream in streams for record in stream.hold_out(each)]
    return hold_out([source for source in sources if isinstance(source, Source)], count, seed)


def without(sources: list[Source] | list[Stream], held_out: list[Record]) -> list[Source] | list[Stream]:
    """Sources without records that were held out of others, and their like, unless nothing else is there."""
    streams = [source.without(held_out) for source in sources if isinstance(source, Stream)]
    if streams:
        return streams
    held = {_digest(record) for record in held_out}
    whole = [source for source in sources if isinstance(source, Source)]
    rest = [replace(source, records=[r for r in source.records if _digest(r) not in held]) for source in whole]
    return [source for source in rest if source.records] or whole


def interspersed(records: Iterator[Record], others: Sequence[Record], share: float, seed: int) -> Iterator[Record]:
    """The records, in the place of each of which one of the others comes with this probability."""
    rng, own = random.Random(seed), mixed([Source("others", records=list(others))], seed)
    while True:
        yield next(own if rng.random() < share else records)


def mixed(sources: list[Source] | list[Stream], seed: int) -> Iterator[Record]:
    """Records without end: shuffled anew each epoch; with weights, each draw picks its source by weight.

    Without weights, sources in memory count by their records; streams, whose sizes nobody knows, count the same.
    """
    rng = random.Random(seed)

    def epochs(source: Source | Stream) -> Iterator[Record]:
        while True:
            empty = True
            for record in source.epoch(rng):
                empty = False
                yield record
            if empty:
                raise ValueError(f"{source.name} gives no record any more; it did when the run began")

    streamed = any(isinstance(source, Stream) for source in sources)
    if streamed or any(source.weight is not None for source in sources):
        streams = [epochs(source) for source in sources]
        weights = [1.0 if source.weight is None else source.weight for source in sources]
        while True:
            yield next(rng.choices(streams, weights)[0])
    together = Source("all", records=[r for source in sources if isinstance(source, Source) for r in source.records])
    yield from epochs(together)
