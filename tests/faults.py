"""Kill runs at random moments or let the disk fail, let them go on, and compare with runs that were left alone.

KILLS=50 FAULTS=25 SEED=0 python tests/faults.py        # what `make test-faults` does

Every attempt is a forked child, so that nothing is imported twice. What is left must be the same files with the same
bytes; only what tells times and memory may differ.
"""

import contextlib
import errno
import gc
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch

import compresso
from compresso import savepoints
from compresso.cli import main as command
from compresso.stopping import NO_ROOM
from tiny import QUICK, tiny_model, tiny_tokenizer, write_records

CALLS = 250  # of writing, syncing and renaming in a run of these kinds, about
TIMES = {"seconds", "recovery_seconds", "peak_memory_bytes", "cost", "checkpoints"}
VARIANTS: dict[str, dict[str, Any]] = {
    "all weights": {"tune": "full", "also": (0.1,), "steps": 10, "hold": 0.5, "own_texts": 2},
    "adapters": {"tune": "lora", "distill": 0.3, "kept_gates": "soft"},
    "own records": {"data": "self", "self_records": 10, "steps": 4, "units": "kv_group,intermediate,hidden"},
    "a score": {"method": "wanda", "recover_steps": 6, "own_share": 0.5},
    "recover": {"steps": 4, "recover_steps": 2},
}
"""What is killed: settings of `compresso prune`; `recover` is killed in a recovery that goes further."""


@dataclass
class Harness:
    """A folder with a tiny model and records, and what happened to runs in it."""

    folder: Path
    kills: int = 0
    faults: int = 0
    runs: int = 0
    attempts: int = 0
    graceful: list[float] = field(default_factory=list)
    """Seconds that SIGTERM took to end an attempt."""

    def __post_init__(self) -> None:
        tiny_model("llama", max_position_embeddings=512).save_pretrained(self.folder / "dense")
        tiny_tokenizer().save_pretrained(self.folder / "dense")
        write_records(self.folder / "records.jsonl")

    def settings(self, variant: str) -> dict[str, Any]:
        fixed = {"model": "../dense", "data": "../records.jsonl", "output": "run", "checkpoint_seconds": 0.0}
        return {**QUICK, "target_sparsity": 0.3, **fixed, **VARIANTS[variant]}

    def whole(self, variant: str) -> tuple[Path, float]:
        """A run that is left alone, and how long it took."""
        place = self.folder / f"whole {variant}"
        began = time.perf_counter()
        if not place.exists():
            self._begin(place, variant)
            (place / "seconds").write_text("0")
            began = time.perf_counter()
            assert self.attempt(place, variant, None) == 0, log_of(place).read_text()
            (place / "seconds").write_text(str(time.perf_counter() - began))
        return place / "run", float((place / "seconds").read_text())

    def _begin(self, place: Path, variant: str) -> None:
        """An empty place, or one with a finished run that is to be recovered further."""
        place.mkdir()
        if variant == "recover":
            finished = self.folder / "finished"
            if not finished.exists():
                finished.mkdir()
                code = self._child(finished, lambda: compresso.prune(**self.settings(variant)), None)
                assert code == 0, log_of(finished).read_text()
            shutil.copytree(finished / "run", place / "run")

    def attempt(self, place: Path, variant: str, end: Callable[[int], None] | None, failing: int = 0) -> int:
        """Begin a run, or go on with it, in a child that `end` may put an end to; its exit code, negative if killed.

        In it the disk is full at the call of number `failing`.
        """

        def work() -> None:
            if failing:
                full_at(failing)
            begun = Path("run/progress.json").exists()
            if variant == "recover" and json.loads(Path("run/progress.json").read_text())["done"]:
                compresso.recover("run", further=True, recover_steps=6)
            elif begun:
                compresso.resume("run")
            else:
                compresso.prune(**self.settings(variant))

        self.attempts += 1
        return self._child(place, work, end)

    def fail(self, variant: str, rng: random.Random) -> None:
        """Let one of a run's calls to the disk fail, then let it go on. Raises AssertionError."""
        reference, _ = self.whole(variant)
        place = self.folder / f"failed {self.runs}"
        self._begin(place, variant)
        self.runs += 1
        code = self.attempt(place, variant, None, failing=rng.randrange(1, CALLS))
        told = log_of(place).read_text()
        assert "Traceback" not in told, told
        assert code in (0, 2, NO_ROOM), f"{code}: {told}"  # 2: before the run folder was there
        while code or (variant == "recover" and not _further(place)):
            code = self.attempt(place, variant, None)
            assert code == 0, log_of(place).read_text()
        differing = differences(reference, place / "run")
        assert not differing, f"{place} differs: {differing}"
        shutil.rmtree(place)
        self.faults += "No space left" in told

    def fill(self, variant: str, kilobytes: int) -> int:
        """Let a run go on in a file system of its own that grows by so much whenever it is full; how often it was.

        Raises AssertionError, and subprocess.CalledProcessError where nobody may mount.
        """
        reference, _ = self.whole(variant)
        place = self.folder / f"small {self.runs}"
        place.mkdir()
        self.runs += 1
        full, size = 0, kilobytes
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], check=True, capture_output=True)
        try:
            while code := self.attempt(place, variant, None):
                told = log_of(place).read_text()
                assert "Traceback" not in told, told
                assert code in (2, NO_ROOM), f"{code}: {told}"
                full, size = full + 1, size + kilobytes
                subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)
            differing = differences(reference, place / "run")
            assert not differing, f"{place} differs: {differing}"
        finally:
            subprocess.run(["umount", place], check=True)
        return full

    def _child(self, place: Path, work: Callable[[], Any], end: Callable[[int], None] | None) -> int:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an earlier command in this process may have set another
            log = os.open(log_of(place), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                os.chdir(place)
                code = _exit_code(work)
            except BaseException:  # the parent's stack is not ours to go up
                traceback.print_exc()
            finally:
                os._exit(code)
        if end:
            end(child)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def survive(self, variant: str, rng: random.Random, kills: int) -> int:
        """Kill one run at up to so many random moments until it is done; how many it took. Raises AssertionError."""
        reference, seconds = self.whole(variant)
        place = self.folder / f"killed {self.runs}"
        self._begin(place, variant)
        self.runs += 1
        killed = 0
        while True:
            after = rng.uniform(0, seconds) if killed < kills else None
            number = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
            waits: list[float] = []
            code = self.attempt(place, variant, None if after is None else _after(after, number, waits))
            if code == 0 and (variant != "recover" or _further(place)):
                break
            said = log_of(place).read_text()
            assert code in (-signal.SIGKILL, -signal.SIGTERM, 143), said
            self.graceful += waits if code == 143 else []
            killed += 1
        differing = differences(reference, place / "run")
        assert not differing, f"{place} differs after {killed} kills: {differing}\n{(place / 'log').read_text()}"
        shutil.rmtree(place)
        self.kills += killed
        return killed


def log_of(place: Path) -> Path:
    """What the attempts in a place said."""
    return place.with_name(f"{place.name}.log")


def full_at(call: int) -> None:
    """From here on the disk has no room at this call of what writes, syncs or renames, counted from 1."""
    calls = itertools.count(1)

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def perhaps(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return perhaps

    names = ("rename", "replace", "write_text", "write_bytes", "mkdir")
    for owner, name in [(os, "fsync"), (savepoints, "save_file"), *((Path, name) for name in names)]:
        setattr(owner, name, wrapped(getattr(owner, name)))


def _further(place: Path) -> bool:
    """Whether the recovery that goes further is done, rather than the run before it."""
    return json.loads((place / "run" / "summary.json").read_text()).get("recovery", {}).get("further", False)


def _exit_code(work: Callable[[], Any]) -> int:
    """As the command line would end."""
    compresso.cli.COMMANDS["work"] = lambda _: work() and None
    return command(["work"])


def _after(seconds: float, number: int, waits: list[float]) -> Callable[[int], None]:
    """Wait, send the signal, and note how long the child took to end."""

    def end(child: int) -> None:
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            time.sleep(min(0.005, seconds))
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return  # it was faster
        os.kill(child, number)
        began = time.perf_counter()
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        waits.append(time.perf_counter() - began)

    return end


def contents(run: Path) -> dict[str, Any]:
    """What a run folder holds, file by file, without what tells times and memory."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name.startswith("report") or name in ("env.json", "progress.json"):
            continue
        if path.name == "metrics.jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "summary.json":
            found[name] = _timeless(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in TIMES}


def differences(expected: Path, actual: Path) -> list[str]:
    """Files of two run folders that are not the same."""
    one, two = contents(expected), contents(actual)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def main() -> None:
    kills, rng = int(os.environ.get("KILLS", "50")), random.Random(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        gc.freeze()
        variants = list(VARIANTS)
        while harness.kills < kills:
            variant = variants[harness.runs % len(variants)]
            harness.survive(variant, rng, min(12, kills - harness.kills))
            print(f"{harness.kills} of {kills} kills, {harness.runs} runs done, all alike", flush=True)
        for number in range(int(os.environ.get("FAULTS", "25"))):
            harness.fail(variants[number % len(variants)], rng)
            print(f"{harness.faults} failing calls to the disk in {number + 1} runs, all alike", flush=True)
        try:
            full = sum(harness.fill(variant, 300) for variant in ("all weights", "own records"))
            print(f"a disk that was full {full} times in 2 runs, all alike", flush=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no disk was filled: nobody may mount one here ({error})")
        terms = harness.graceful or [0.0]
        print(
            f"{harness.kills} kills and {harness.faults} failing calls to the disk in {harness.runs} runs of "
            f"{len(variants)} kinds: each ended as if left alone, bit for bit"
        )
        print(
            f"SIGTERM ended {len(harness.graceful)} attempts with exit code 143, "
            f"after {statistics.median(terms):.2f} s in the median, {max(terms):.2f} s at most"
        )


if __name__ == "__main__":
    sys.exit(main())
