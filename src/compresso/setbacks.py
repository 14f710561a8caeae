"""What a run does by itself about trouble in the middle of its work: once in a way that may help, then it stops.

A loss that diverges goes back to the last good checkpoint with smaller steps; where memory ran out, batches are taken
in twice as many parts. Everything else stops, with what is kept and how to go on.
"""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from compresso import progress, savepoints
from compresso.checkpoint import first_line
from compresso.config import PruneConfig
from compresso.stopping import DIVERGED, INTERRUPTED, NO_MEMORY, NO_ROOM, TERMINATED, Stopped, Terminated
from compresso.train import Diverged

MEMORY_MESSAGES = ("can't allocate memory", "out of memory", "not enough memory")


def stopped(folder: Path, error: BaseException) -> Stopped:
    """What to raise instead of a signal's or a file's exception once the run folder is there."""
    go_on = f"`compresso prune --resume {folder}` goes on"
    if not isinstance(error, KeyboardInterrupt):
        return Stopped(f"{_reason(error)}. What was whole before is kept; when the cause is mended, {go_on}", NO_ROOM)
    ended = isinstance(error, Terminated)
    code = TERMINATED if ended else INTERRUPTED
    return Stopped(f"{'terminated' if ended else 'interrupted'}; {go_on}", code)


def _reason(error: BaseException) -> str:
    """What a file system said; of the many files that could not be copied, about the first."""
    return str(error.args[0][0][2]) if isinstance(error, shutil.Error) else str(error)


def meet(folder: Path, config: PruneConfig, error: Exception, accelerator: Accelerator) -> str:
    """Note in progress.json how the run goes on after this, and return what to tell the user.

    Raises Stopped if the same has been tried before, or cannot be; `error` itself if it is no setback.
    """
    now = progress.read(folder)
    before = {(setback["kind"], setback["stage"]) for setback in now.setbacks}
    if isinstance(error, Diverged):
        accelerator.wait_for_everyone()  # it comes to all processes, and all have read what was before
        if ("diverged", error.stage) in before:
            advice = "Lower --learning-rate or --gate-learning-rate, or use --precision fp32"
            raise Stopped(f"{error}, with smaller steps too. {advice}", DIVERGED) from error
        found, _ = savepoints.newest(folder, error.stage)
        step = found.facts["training"]["step"] if found else 0
        now.setbacks.append({"kind": "diverged", "stage": error.stage, "step": step})
        note = f"{error}: back to step {step} of {error.stage}, with steps of half the size from there"
        if accelerator.is_main_process:
            now.write(folder)
        accelerator.wait_for_everyone()
        return note
    if not out_of_memory(error):
        raise error
    parts = config.accumulation * now.accumulation * 2
    if ("memory", "") in before or parts > config.batch_size:
        advice = "Lower --batch-size or --max-length, or use --gradient-checkpointing, --tune lora or --precision 4bit"
        raise Stopped(f"memory ran out ({first_line(error)}). {advice}", NO_MEMORY) from error
    now.accumulation *= 2
    now.setbacks.append({"kind": "memory", "stage": "", "step": 0})
    now.write(folder)
    note = f"memory ran out: from the last checkpoint on, a batch is taken in {parts} parts (--accumulation {parts})"
    if accelerator.num_processes > 1:  # the others wait for this one
        raise Stopped(f"{note}; `compresso prune --resume {folder}`, launched as before, goes on", NO_MEMORY) from error
    return note


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, whose allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)
