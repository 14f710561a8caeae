"""What every step of a run has at hand: settings, model, records, prompt, device, and where rows of metrics go."""

import ctypes
import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso import savepoints, tuning, whole_files
from compresso.batches import Batch, Encoder, batches
from compresso.config import PruneConfig
from compresso.plan import Plan
from compresso.progress import Progress
from compresso.prompts import CollaborativePrompt
from compresso.records import Record, Source, similar_lengths
from compresso.savepoints import Savepoint
from compresso.stopping import DISCONNECTED, Stopped, uninterrupted
from compresso.streams import Stream, interspersed, mixed
from compresso.train import Disconnected, Diverged
from compresso.training import Training

console = Console()
METRICS = "metrics.jsonl"
NO_CHECKPOINTS = {"written": 0, "seconds": 0.0}
RELEASE_EVERY = 8  # steps
POOL = 32  # batches that are sorted by length together (LOG.md, 2026-11-26)
SAVING = 0.02  # share of the time that checkpoints may take


@dataclass
class Workbench:
    config: PruneConfig
    folder: Path
    accelerator: Accelerator
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    prompt: CollaborativePrompt
    sources: list[Source] | list[Stream]
    held_out: list[Record]
    windows: Tensor
    """(N, T) token ids of held-out text."""
    parameters: int
    """Of the dense model."""
    prunable: int
    tune: str
    """What learns besides the gates: `lora` or `full`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What steps leave for the summary."""

    progress: Progress = field(default_factory=Progress)
    began: float = field(default_factory=time.perf_counter)
    """When, in seconds of time.perf_counter, less what was spent on the run before it was resumed."""

    place: Path | None = None
    """Folder of the checkpoint, where the model here is no whole one: it is cut on the way from files to files."""

    device: str = ""
    """Kind of device that the stage began on."""

    leave: Callable[[PreTrainedModel, Plan, float], None] | None = None
    """Saves what a plan cuts out of a model on its way to the target, at this sparsity (`--also`)."""

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.accelerator.is_main_process

    def prompt_at(self, sparsity: float) -> CollaborativePrompt:
        """The prompt with the state of the run filled in."""
        target = self.config.target_sparsity
        tokens = self.facts.get("vocabulary") or {"parameters": {"before": 0, "after": 0}}
        lost = tokens["parameters"]["before"] - tokens["parameters"]["after"]
        left = self.parameters - lost - sparsity * self.prunable
        return self.prompt.filled(sparsity=sparsity, target_sparsity=target, parameters=left)

    def batches(self, seed: int, start: int = 0, own: Sequence[Record] = ()) -> Callable[[float], list[Batch]]:
        """A function of the sparsity so far that gives this process's parts of the next global batch.

        All processes draw the same records and each takes its share, so that the run does not
        depend on how many there are. The first `start` batches are passed over. `own` records
        make the share that is set.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = self.config.batch_size * processes
        records = mixed(self.sources, seed)
        if own:
            records = interspersed(records, own, tuning.own_share(self.config, self.tune), seed)
        groups = similar_lengths(records, size, POOL, seed, self.encoder.lengths)
        groups = itertools.islice(groups, start, None)

        def next_batches(sparsity: float) -> list[Batch]:
            prompt = self.prompt_at(sparsity)
            parts = self.config.accumulation * self.progress.accumulation
            return batches(next(groups)[rank::processes], self.encoder, prompt, parts)

        return next_batches

    def spend(self, stage: str, operations: int) -> None:
        """Enter floating-point operations into the account of a stage."""
        account = self.facts.setdefault("operations", {})
        account[stage] = account.get(stage, 0) + operations

    def validation(self, sparsity: float = 0.0) -> list[Batch]:
        """The held-out records, of similar length together."""
        prompt = self.prompt_at(sparsity)
        return batches(self.held_out, self.encoder, prompt, parts=(len(self.held_out) + 7) // 8)

    def newest(self, stage: str) -> Savepoint | None:
        """The checkpoint that a stage goes on from; tells of damaged ones."""
        found, wrong = savepoints.newest(self.folder, stage)
        for line in wrong:
            before = f"the one of step {found.facts['training']['step']}" if found else f"the beginning of {stage}"
            console.print(f"{line}; going on from {before}", markup=False, highlight=False)
        return found

    def began_on(self, found: Savepoint | None) -> str:
        """Kind of device that a stage began on which goes on from this checkpoint, if from one."""
        here = self.accelerator.device.type
        return found.facts.get("device", here) if found else here  # which older checkpoints do not tell

    def begin(self, stage: str, training: Training, found: Savepoint | None) -> None:
        """Go on from a checkpoint, or begin a stage; metrics.jsonl then ends with its last step."""
        self.device = self.began_on(found)
        if found:
            training.restore(found.facts["training"], found.tensors())
            self.facts["operations"] = found.facts["operations"]
            self.began = time.perf_counter() - found.facts["seconds"]
            console.print(f"{stage} goes on after step {training.step}", markup=False, highlight=False)
        if self.writes:
            rows = order_metrics(self.folder / METRICS, stage, training, self.progress.rows)
            self.facts.setdefault("operations", {})[stage] = sum(row["operations"] for row in rows)

    def follow(self, stage: str, training: Training, rows: Iterator[dict], steps: int) -> None:
        """Run the loop to its end: progress bar, metrics.jsonl, tracker, checkpoints.

        If it is stopped inside, the state after the last whole step is saved, and Stopped tells how to go on.
        """
        path = self.folder / METRICS if self.writes else Path(os.devnull)
        saved = _Saved(training.step)
        try:
            with path.open("a", encoding="utf-8") as metrics, progress_bar() as bar:
                task = bar.add_task(stage, total=steps, completed=training.step, note="")
                began, tokens = time.perf_counter(), 0
                for row in rows:
                    tokens += row["tokens"]
                    self.spend(stage, row["operations"])
                    metrics.write(json.dumps({"stage": stage, **row}) + "\n")
                    metrics.flush()
                    self.accelerator.log({f"{stage}/{k}": v for k, v in row.items() if not isinstance(v, str)})
                    if self.accelerator.device.type == "cpu" and row["step"] % RELEASE_EVERY == 0:
                        release_memory()
                    rate = tokens / (time.perf_counter() - began)
                    bar.update(task, advance=1, description=f"{stage} ({row['phase']})", note=_note(row, rate))
                    if not console.is_terminal and row["step"] % max(1, steps // 10) == 0:
                        console.print(
                            f"{stage} ({row['phase']}) step {row['step']}/{steps}  {_note(row, rate)}", markup=False
                        )
                    if self.writes and saved.due(self.config.checkpoint_seconds):
                        os.fsync(metrics.fileno())
                        self._save(stage, training, saved)
        except Diverged as error:
            error.stage = stage
            raise
        except (KeyboardInterrupt, Disconnected) as error:
            self._save(stage, training, saved)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Stopped(
                f"{error}. `compresso prune --resume {self.folder}`, launched as before, goes on after step "
                f"{training.step} of {stage}",
                DISCONNECTED,
            ) from error
        for source in self.sources:
            if isinstance(source, Stream) and source.report():
                console.print(source.report(), markup=False)
        release_memory()

    def _save(self, stage: str, training: Training, saved: "_Saved") -> None:
        """Save a checkpoint, unless the last one is of this step."""
        if not self.writes or training.step == saved.step:
            return
        began = time.perf_counter()
        facts = {
            "training": training.facts(),
            "operations": self.facts.get("operations", {}),
            "seconds": began - self.began,
            "device": self.device,
        }
        with uninterrupted():
            tensors = training.tensors()
            savepoints.save(self.folder, stage, training.step, tensors, facts, self.config.checkpoints)
        saved.step, saved.at = training.step, time.perf_counter()
        saved.took = saved.at - began
        so_far = self.facts.get("checkpoints", NO_CHECKPOINTS)
        self.facts["checkpoints"] = {"written": so_far["written"] + 1, "seconds": so_far["seconds"] + saved.took}


@dataclass
class _Saved:
    """The last checkpoint of a stage."""

    step: int
    at: float = field(default_factory=time.perf_counter)
    took: float = 0.0

    def due(self, seconds: float) -> bool:
        """Whether it is time for the next one, `seconds` later or so much that saving takes a small share of time."""
        return not seconds or time.perf_counter() - self.at >= max(seconds, self.took / SAVING)


def order_metrics(path: Path, stage: str, training: Training, before: int) -> list[dict[str, Any]]:
    """Leave of the rows after the first `before` those of other stages, and of this one those up to the state's step.

    A row that was torn, or of a step that will be made again, goes; that of the last step is added if it is missing: a
    signal may come once a step is made. Returns the stage's own rows, of which earlier recoveries may have made some.
    """
    kept: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else ()):
        with suppress(ValueError):
            row = json.loads(line)
            if number < before or row["stage"] != stage or row["step"] <= training.step:
                kept.append(row)
    if training.row and (not kept or (kept[-1]["stage"], kept[-1]["step"]) != (stage, training.step)):
        kept.append({"stage": stage, **training.row})
    whole_files.write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return [row for row in kept if row["stage"] == stage]


def _note(row: dict, rate: float) -> str:
    note = f"loss {row['loss']:.3f}"
    if "expected_sparsity" in row:
        note += f"  sparsity {100 * row['expected_sparsity']:.1f}% of {100 * row['target_sparsity']:.1f}%"
    return f"{note}  {rate:,.0f} tokens/s"


def release_memory() -> None:
    """Give freed memory back: glibc keeps what a stage's tensors left, and the next stage's do not fit into it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def status(text: str) -> AbstractContextManager:
    """Tell what is being done, where somebody watches."""
    return console.status(Text(text)) if console.is_terminal else nullcontext()


def progress_bar() -> ProgressBar:
    return ProgressBar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where it is asked for, or where the hardware multiplies it natively; also beside 4-bit weights."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            probe = getattr(torch.cpu, "get_capabilities", dict)  # younger than the oldest torch that we take
            capabilities: dict[str, Any] = probe() if device.type == "cpu" else {}
            native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
        precision = "bf16" if native else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16
