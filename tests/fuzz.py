"""Damaged and hostile files, thousands of them: each is taken or refused with a message, in bounded time and memory.

    python tests/fuzz.py 10000 --seed 0            so many inputs in all, shared out over the kinds
    python tests/fuzz.py --seed 0 --only gguf:17   one of them again, with its traceback

What a reader may raise is ValueError or OSError, which the command line prints as one line. A traceback of another
kind, a crash, a hang or a gigabyte is a failure; its input is kept. The same seed gives the same inputs.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from compresso import bounded, charts, checkpoint
from compresso import plan as plans
from compresso.config import PruneConfig, read_yaml
from compresso.records import read_sources
from compresso.report import report
from compresso.streamed import StoredWeights
from test_gguf import ROPE, write_gguf
from tiny import random_plan, tiny_model, tiny_tokenizer

SECONDS = 20  # for one input, on a busy machine
BYTES = 2**30  # that one may add to what the process has
NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**30, -(2**63)]
VALUES: list[Any] = [
    *NUMBERS,
    *(0.5, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), None, True, False, [], {}, "", "x", "x" * 10_000),
    *("../../x", "/dev/zero", "/etc/passwd", "model.bin", "\0", "\ud800", "<script>alert(1)</script>", "{{ 7 * 7 }}"),
    *(
        [[]] * 100,
        {"a": {"b": {}}},
        {"": None},
        ["x", 1],
        "org/kernel",
        "__class__",
        "1e999",
        "\u202e",
        "%s%n",
        "é" * 99,
    ),
]
PIECES = [
    *(b"&a [", b"*a", b"!!python/object/apply:os.system ", b"<<: ", b"- ", b": ", b"|", b"\t", b"{", b"[", b"]", b"}"),
    *(
        b"? ",
        b"~",
        b".nan",
        b".inf",
        b"0x",
        b"1e999",
        b"2001-99-99",
        b"\0",
        b"\xff",
        b"\r",
        b'"',
        b"'",
        b",",
        b"\\ud800",
    ),
    *(b"[" * 2000, b"{{ ", b" }}", b"{% for i in range(99999) %}", b"{% endfor %}", b"\xef\xbb\xbf", b"1" * 5000, b"#"),
]
SHARES = {
    **{"config": 10, "index": 5, "safetensors": 16, "tokenizer": 6, "template": 6, "gguf": 6, "plan": 16, "yaml": 16},
    **{"jsonl": 8, "json": 5, "csv": 2, "parquet": 2, "run": 1.9, "pictures": 0.1},
}
"""Of each kind, in percent."""


@dataclass
class Result:
    taken: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    """KIND:NUMBER, and what happened."""


def nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def edited(rng: random.Random, value: Any) -> Any:
    """A value of JSON with one of its parts replaced, left out, repeated or buried."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(12):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, str(rng.choice(VALUES)): rng.choice(VALUES)}
            case 2:
                return {**value, key: nested(value[key], rng.choice((1, 60, 150)))}
            case _:
                return {**value, key: edited(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value + value[: rng.choice((1, 1000))]
            case _:
                return [*value[:at], edited(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def scratched(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some of them changed, lost, repeated or added."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 4, 8, 100))
        match rng.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + 8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
            case 2:
                changed[at : at + 4] = (rng.choice(NUMBERS) % 2**32).to_bytes(4, "little")
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 50))
            case 6:
                changed[at:at] = rng.choice(PIECES)
    return bytes(changed)


def of_json(rng: random.Random, data: bytes) -> bytes:
    value = whole = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = edited(rng, value)
    while type(value) is not type(whole) and rng.random() < 0.9:
        value = edited(rng, whole)
    text = json.dumps(value).encode()
    return scratched(rng, text) if rng.random() < 0.15 else text


def of_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = of_json(rng, lines[at]) if rng.random() < 0.7 else scratched(rng, lines[at])
    return b"\n".join(lines)


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return scratched(rng, data[:4000]) + data[4000:]
    length = int.from_bytes(data[:8], "little")
    header = of_json(rng, data[8 : 8 + length])
    told = len(header) if rng.random() < 0.8 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", told) + header + data[8 + length :]


def of_gguf(rng: random.Random, data: bytes) -> bytes:
    """Counts and the first keys most of all: there the lengths are."""
    near = rng.choice((24, 400, 4000, len(data)))
    return scratched(rng, data[:near]) + data[near:]


class Kinds:
    """The files to begin with, how each kind is changed, and what reads it."""

    def __init__(self, base: Path):
        self.base = base
        base.mkdir(exist_ok=True)
        tokenizer = tiny_tokenizer()
        model = tiny_model("llama", max_position_embeddings=512)
        self.folder = base / "model"
        model.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        self.tokenizer = tokenizer
        names = {name: "model.safetensors" for name in model.state_dict()}
        index = json.dumps({"metadata": {"total_size": 1}, "weight_map": names}).encode()
        self.run = base / "run"
        self.run.mkdir()
        plans.save(random_plan(model), self.run, {"method": "l0"})
        (self.run / "config.yaml").write_text(PruneConfig(model="x").to_yaml())
        for name, value in run_files().items():
            (self.run / name).write_text(value)
        small = tiny_model("llama", vocab_size=len(tokenizer), intermediate_size=64, rope_parameters=ROPE)
        gguf = write_gguf(base / "x.gguf", small, tokenizer).read_bytes()
        row = {"instruction": "Add one.", "input": "two", "output": "three"}
        turns = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
        rows = [row, turns, {"text": "plain"}, {"conversations": [{"from": "human", "value": "a"}]}] * 2
        datasets.disable_progress_bars()
        datasets.Dataset.from_list([row] * 4).to_csv(base / "x.csv")
        datasets.Dataset.from_list([row] * 4).to_parquet(base / "x.parquet")
        in_model = {name: (self.folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
        tokens = {n: (self.folder / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}
        plan = {name: (self.run / name).read_bytes() for name in ("plan.json", "plan.safetensors")}
        of_run = {name: (self.run / name).read_bytes() for name in (*run_files(), *plan, "config.yaml")}
        jsonl = "\n".join(map(json.dumps, rows)).encode()
        self.seeds: dict[str, dict[str, bytes]] = {
            "config": {"config.json": in_model["config.json"]},
            "index": {checkpoint.untrusted.INDEX: index},
            "safetensors": {"model.safetensors": in_model["model.safetensors"]},
            "tokenizer": tokens,
            "template": {"chat_template.jinja": (self.folder / "chat_template.jinja").read_bytes()},
            "gguf": {"x.gguf": gguf},
            "plan": plan,
            "yaml": {"c.yaml": (self.run / "config.yaml").read_bytes()},
            "jsonl": {"x.jsonl": jsonl},
            "json": {"x.json": json.dumps(rows).encode()},
            "csv": {"x.csv": (base / "x.csv").read_bytes()},
            "parquet": {"x.parquet": (base / "x.parquet").read_bytes()},
            "run": of_run,
            "pictures": of_run,
        }
        self.plain = charts.picture

    def make(self, kind: str, number: int, seed: int) -> tuple[str, bytes]:
        """Name and content of one input."""
        rng = random.Random(f"{seed}/{kind}/{number}")
        name = rng.choice(list(self.seeds[kind]))
        data = self.seeds[kind][name]
        change: Callable[[random.Random, bytes], bytes] = {
            ".json": of_json,
            ".jsonl": of_lines,
            ".safetensors": of_safetensors,
            ".gguf": of_gguf,
        }.get(Path(name).suffix, scratched)
        return name, change(rng, data)

    def read(self, kind: str, name: str, data: bytes, where: Path) -> None:
        """Let the reader of this kind have it."""
        source = self.run if kind in ("plan", "run", "pictures") else self.folder
        if kind not in ("gguf", "yaml", "jsonl", "json", "csv", "parquet"):
            for file in source.iterdir():
                if file.is_file() and file.name != name:
                    os.link(file, where / file.name)
        (where / name).write_bytes(data)
        match kind:
            case "config":
                checkpoint.prompt_of(checkpoint.read_config(checkpoint.find(str(where), any_family=True))[0])
            case "index" | "safetensors":
                checkpoint.find(str(where))
                len(StoredWeights(where))
            case "tokenizer" | "template":
                tokenizer = checkpoint.load_tokenizer(str(where))
                len(tokenizer("Hello, world")["input_ids"])
                bounded.render(tokenizer, [{"role": "user", "content": "Hello"}], True)
            case "gguf":
                checkpoint.load(where / name)
            case "plan":
                plans.load(where).widths()
            case "yaml":
                PruneConfig(**read_yaml(where / name))
            case "run" | "pictures":
                charts.picture = self.plain if kind == "pictures" else lambda draw: charts.Picture("", "", b"", 1, 1)
                report(where)
            case _:
                read_sources(str(where / name))


def run_files() -> dict[str, str]:
    """What a report reads, beside plan and settings."""
    stages = {"dense": 1.0, "cut": 3.0, "recovered": 2.0}
    summary = {
        **{"model": "x", "sparsity": 0.2, "target_sparsity": 0.2, "perplexity_window": 64, "seconds": 3.0},
        **{key: {"before": 100, "after": 80} for key in ("parameters", "prunable_parameters", "hidden_size", "bytes")},
        **{"loss": stages, "perplexity": stages, "sample": {"question": "q", **dict.fromkeys(stages, "answer")}},
    }
    rows = [
        {"stage": "prune", "phase": "ramp", "step": i, "loss": 2.0, "expected_sparsity": 0.1, "target_sparsity": 0.1}
        for i in range(4)
    ]
    entry = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4}
    evaluation = {
        "schema": "compresso-eval/1",
        "models": {"a": {"stage": "dense", "parameters": 100}, "b": {"stage": "recovered", "parameters": 80}},
        "results": {"a": {"piqa": entry}, "b": {"piqa": entry}},
        "comparisons": [
            {"a": "a", "b": "b", "task": "piqa", "metric": "acc", "difference": 0.1, "low": 0.0, "high": 0.2}
        ],
    }
    return {
        "summary.json": json.dumps(summary),
        "metrics.jsonl": "\n".join(map(json.dumps, rows)),
        "eval.json": json.dumps(evaluation),
        "env.json": json.dumps({"versions": {"python": "3"}, "platform": "x"}),
    }


def plan_of(count: int) -> list[tuple[str, int]]:
    """How many inputs of each kind, at least one."""
    total = sum(SHARES.values())
    return [(kind, number) for kind, share in SHARES.items() for number in range(max(1, round(count * share / total)))]


def attempt(kinds: Kinds, kind: str, number: int, seed: int) -> str:
    """`taken`, `refused`, or the traceback of what should not have come."""
    name, data = kinds.make(kind, number, seed)
    where = Path(tempfile.mkdtemp(dir=kinds.base))
    try:
        kinds.read(kind, name, data, where)
        return "taken"
    except (ValueError, OSError) as error:
        return "refused" if str(error).strip() else "refused without a word"
    except BaseException:
        return traceback.format_exc()
    finally:
        shutil.rmtree(where)


def child(kinds: Kinds, inputs: list[tuple[str, int]], seed: int, out: int) -> None:
    """Try one after the other, and tell the parent, who watches the clock."""
    warnings.simplefilter("ignore")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch's pools do not always outlive a fork, and fail in new threads
    there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + 3 * BYTES, there + 3 * BYTES))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, number in inputs:
        told = attempt(kinds, kind, number, seed)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > BYTES:
            told = f"took {grown / 2**30:.1f} GB"
        os.write(out, json.dumps(told).encode() + b"\n")
        if grown > BYTES // 2:
            break  # a new process begins anew
    os._exit(0)


def answers(reading: int) -> Iterator[str | None]:
    """What a child tells of one input after the other; None at the end, be it a sudden one, or a long silence."""
    found = b""
    while True:
        while b"\n" in found:
            line, _, found = found.partition(b"\n")
            yield json.loads(line)
        more = os.read(reading, 2**16) if select.select([reading], [], [], SECONDS)[0] else b""
        if not more:
            yield None
            return
        found += more


def fuzz(count: int, seed: int, keep: Path, base: Path, leave_out: tuple[str, ...] = ()) -> Result:
    """Try `count` inputs in processes of their own; those that fail are kept."""
    datasets.config.HF_DATASETS_CACHE = base / "cache"
    kinds, result, done = Kinds(base), Result(), 0
    inputs = [one for one in plan_of(count) if one[0] not in leave_out]
    while done < len(inputs):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(kinds, inputs[done:], seed, writing)
            finally:
                os._exit(1)
        os.close(writing)
        ended = None
        for told in answers(reading):
            if told is None:  # it is at work for too long, or gone
                if select.select([reading], [], [], 0)[0]:
                    ended = os.waitpid(pid, 0)[1]
                if ended == 0:
                    break
                told = f"took more than {SECONDS} s" if ended is None else f"crashed with status {ended}"
            enter(kinds, result, *inputs[done], told, seed, keep)
            done += 1
        os.close(reading)
        if ended is None:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    return result


def enter(kinds: Kinds, result: Result, kind: str, number: int, told: str, seed: int, keep: Path) -> None:
    if told in ("taken", "refused"):
        (result.taken if told == "taken" else result.refused)[kind] += 1
        return
    result.failed[f"{kind}:{number}"] = told
    name, data = kinds.make(kind, number, seed)
    folder = keep / f"{kind}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    (folder / "what.txt").write_text(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="KIND:NUMBER")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        if given.only:
            kind, _, number = given.only.partition(":")
            print(attempt(Kinds(Path(base)), kind, int(number), given.seed))
            return 0
        began = time.perf_counter()
        result = fuzz(given.count, given.seed, given.keep, Path(base))
    for kind in SHARES:
        failed = sum(name.startswith(kind + ":") for name in result.failed)
        print(f"{kind:12} {result.refused[kind]:7,} refused {result.taken[kind]:7,} taken {failed:5,} failed")
    total = sum(result.refused.values()) + sum(result.taken.values()) + len(result.failed)
    print(f"{total:,} inputs of seed {given.seed} in {time.perf_counter() - began:.0f} s")
    for name, told in list(result.failed.items())[:20]:
        print(
            f"{name}: {told.strip().splitlines()[-1][:150]}\n  python tests/fuzz.py --seed {given.seed} --only {name}"
        )
    if result.failed:
        print(f"{len(result.failed)} failed; they are kept in {given.keep}")
    return bool(result.failed)


if __name__ == "__main__":
    sys.exit(main())
