"""What every step of a run has at hand: settings, model, records, prompt, device, and where rows of metrics go."""

import ctypes
import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.batches import Batch, Encoder, batches
from compresso.config import PruneConfig
from compresso.masks import Masks
from compresso.plan import Plan
from compresso.prompts import CollaborativePrompt
from compresso.records import Record, Source, similar_lengths
from compresso.stopping import DISCONNECTED, DIVERGED, INTERRUPTED, TERMINATED, Stopped, Terminated, uninterrupted
from compresso.streams import Stream, mixed
from compresso.train import Disconnected, Diverged

console = Console()
RELEASE_EVERY = 8  # steps
POOL = 16  # batches that are sorted by length together
STOPPED = "stopped"  # folder in a run: what had been learned when it stopped


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

    place: Path | None = None
    """Folder of the checkpoint, where the model here is no whole one: it is cut on the way from files to files."""

    leave: Callable[[PreTrainedModel, Plan, float], None] | None = None
    """Saves what a plan cuts out of a model on its way to the target, at this sparsity (`--also`)."""

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.accelerator.is_main_process

    def prompt_at(self, sparsity: float) -> CollaborativePrompt:
        """The prompt with the state of the run filled in."""
        target = self.config.target_sparsity
        left = self.parameters - sparsity * self.prunable
        return self.prompt.filled(sparsity=sparsity, target_sparsity=target, parameters=left)

    def batches(self, seed: int, start: int = 0) -> Callable[[float], list[Batch]]:
        """A function of the sparsity so far that gives this process's parts of the next global batch.

        All processes draw the same records and each takes its share, so that the run does not
        depend on how many there are. The first `start` batches are passed over.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = self.config.batch_size * processes
        groups = itertools.islice(similar_lengths(mixed(self.sources, seed), size, POOL, seed), start, None)

        def next_batches(sparsity: float) -> list[Batch]:
            prompt = self.prompt_at(sparsity)
            return batches(next(groups)[rank::processes], self.encoder, prompt, self.config.accumulation)

        return next_batches

    def spend(self, stage: str, operations: int) -> None:
        """Enter floating-point operations into the account of a stage."""
        account = self.facts.setdefault("operations", {})
        account[stage] = account.get(stage, 0) + operations

    def validation(self, sparsity: float = 0.0) -> list[Batch]:
        """The held-out records, of similar length together."""
        prompt = self.prompt_at(sparsity)
        return batches(self.held_out, self.encoder, prompt, parts=(len(self.held_out) + 7) // 8)

    def follow(self, stage: str, rows: Iterator[dict], steps: int) -> None:
        """Run the loop to its end: progress bar, metrics.jsonl, tracker."""
        path = self.folder / "metrics.jsonl" if self.writes else Path(os.devnull)
        with path.open("a", encoding="utf-8") as metrics, progress_bar() as bar:
            task = bar.add_task(stage, total=steps, note="")
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

        for source in self.sources:
            if isinstance(source, Stream) and source.report():
                console.print(source.report(), markup=False)
        release_memory()

    @contextmanager
    def keeping(self, wrapped: PreTrainedModel | PeftModel, masks: Masks | None) -> Iterator[None]:
        """If training stops inside, save what learns as of the last good step, and raise Stopped."""
        try:
            yield
        except (KeyboardInterrupt, Diverged, Disconnected) as error:
            with uninterrupted():
                what = self._keep(wrapped, masks)
            if isinstance(error, KeyboardInterrupt):
                ended = isinstance(error, Terminated)
                code = TERMINATED if ended else INTERRUPTED
                raise Stopped(f"{'terminated' if ended else 'interrupted'}. {what}", code) from None
            if isinstance(error, Disconnected):
                raise Stopped(f"{error}. {what} Start all processes again", DISCONNECTED) from error
            advice = "Lower --learning-rate or --gate-learning-rate, or use --precision fp32"
            raise Stopped(f"{error}. {what} {advice}", DIVERGED) from error

    def _keep(self, wrapped: PreTrainedModel | PeftModel, masks: Masks | None) -> str:
        """Save adapters or weights, and gates; what to tell about it."""
        kept = self.folder / STOPPED
        if self.writes:
            wrapped.save_pretrained(kept, safe_serialization=True)
            if masks is not None:
                save_file({unit: a.detach() for unit, a in masks.log_alpha.items()}, kept / "log_alpha.safetensors")
        parts = ("adapters" if self.tune == "lora" else "weights") + (" and gates" if masks else "")
        what = f"The {parts} of the last good step are in {kept}, the metrics beside it."
        if masks is None:
            what += f" The cut model is whole; `compresso recover {self.folder}` repeats its recovery."
        return what


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


def progress_bar() -> Progress:
    return Progress(
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
