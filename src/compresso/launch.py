"""On what a run computes: which device, how many processes, and whether each holds the whole model."""

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel

from compresso import quantised, sharded, tuning
from compresso.config import VOCABULARY, PruneConfig
from compresso.workbench import compute_dtype, console

LAUNCHES = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")  # of accelerate
PATIENCE = timedelta(hours=3)  # that processes wait for one that writes a large model


def start(config: PruneConfig) -> Accelerator:
    """The processes of this launch on the device that the settings name. Raises ValueError for what they cannot do."""
    instead = "use --device cpu, in a run that goes on `device: cpu` in its config.yaml"
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {config.device}: this torch sees no CUDA device (`compresso doctor` tells more); {instead}"
        )
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device mps: this torch sees no Apple GPU; {instead}")
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"--device must be auto, cpu, cuda or mps, got {config.device!r}")
    log_with = None if config.tracker == "none" else config.tracker
    if log_with and find_spec(log_with) is None:
        raise ValueError(f"--tracker {log_with}: its package is not installed (pip install {log_with})")
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu", log_with=log_with, project_dir=config.output, kwargs_handlers=[patience]
        )
    except (ImportError, ValueError) as error:
        raise ValueError(f"--tracker {config.tracker}: {error}") from error
    if accelerator.distributed_type not in LAUNCHES:
        raise ValueError(
            f"this launch asks for {accelerator.distributed_type}, which compresso does not know; it runs in one "
            "process or in several, with the weights whole in each or split over them (FSDP, ZeRO-3, --sharded)"
        )
    split = splits(config, accelerator)
    if split and config.precision == "4bit":
        raise ValueError("--precision 4bit holds the weights whole in every process; leave out --sharded or FSDP")
    if split and accelerator.num_processes == 1:
        raise ValueError(
            "--sharded splits the weights over processes; launch with accelerate, or with torchrun: torchrun "
            "--nproc-per-node 2 -m compresso.cli prune ..."
        )
    console.quiet = not accelerator.is_main_process
    return accelerator


def in_parts(config: PruneConfig, accelerator: Accelerator) -> bool:
    """Whether training has no whole model in its own numbers, which could be cut."""
    return config.precision == "4bit" or splits(config, accelerator)


def splits(config: PruneConfig, accelerator: Accelerator) -> bool:
    """Whether settings or launch ask for weights split over the processes: FSDP, or the third stage of ZeRO.

    We split them in one way for both. Only adapters and gates learn, so that the other stages have nothing to save.
    """
    plugin = accelerator.deepspeed_plugin
    return (
        config.sharded
        or accelerator.distributed_type == DistributedType.FSDP
        or (plugin is not None and plugin.zero_stage == 3)
    )


def check_in_parts(config: PruneConfig, split: bool) -> None:
    """Raise ValueError for what 4-bit weights cannot do, or weights that are `split` over processes."""
    tuning.chosen(config, 0, whole=False)
    if VOCABULARY in config.units:
        raise ValueError(
            "the unit vocab needs whole weights in their own numbers, not 4-bit ones or some split over processes; "
            "leave it out of --units, or prune the vocabulary first (docs/methods.md)"
        )
    if split and config.records == "self":
        raise ValueError(
            "--data self lets one process write, and weights that are split over processes need all of them; let a run "
            "that is not split write first (--steps 1 leaves RUN/self.jsonl), and give that file to --data"
        )
    if config.own_share:
        raise ValueError("--own-share needs whole weights in their own numbers, which write texts; leave it out")
    if config.also:
        raise ValueError("--also needs whole weights in their own numbers; run each sparsity by itself")
    if config.method != "l0":
        raise ValueError(
            f"--method {config.method} scores whole weights in their own numbers; with 4-bit weights or weights split "
            "over processes only l0 works"
        )


def load_parts(config: PruneConfig, place: Path, accelerator: Accelerator) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in a folder of safetensors, split over the processes or in four bits; and the dtype it is stored in."""
    if config.precision == "4bit":
        return quantised.load(place, accelerator.device)
    return sharded.load(place, compute_dtype(config.precision, accelerator.device), accelerator)
