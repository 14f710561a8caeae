"""What a run needs, before it is started: memory by part, steps, tokens, hours. From shapes alone, without weights."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel

from compresso import checkpoint, tuning
from compresso.calibration import AT_ONCE, output_paths
from compresso.config import PruneConfig
from compresso.families import family_of
from compresso.launch import check_in_parts
from compresso.memory import forward_memory, rows_together, shares_prompt, training_memory
from compresso.mixtures import idle
from compresso.prepare import with_units
from compresso.prompts import find_prompt
from compresso.self_data import OWN_LENGTH, texts_for
from compresso.shape import ModelShape, count_prunable, describe
from compresso.streamed import refuse_fused, shapes_of
from compresso.unfused import taken_apart
from compresso.workbench import compute_dtype

CHARACTERS_A_TOKEN = 5  # of the prompts, where there is no tokenizer to ask
GATHERED = 3  # layers that FSDP2 holds whole: the one that runs, the next, and a copy while one is put together
LASTING = ("adapters", "float32 copies", "optimizer", "sums of gradients", "Gram matrices")  # parts of a step's memory
GAPS = 0.34  # of a step's memory on a CPU: measured for two shapes, checked on a third (LOG.md, 2026-11-25)
PASSES = {"wanda": 1, "flap": 1, "shortgpt": 1, "minitron": 1, "taylor": 3, "taylor2": 3}
"""Over the records of calibration; a backward one counts as two."""
SINGLE = ("minitron", "taylor2")  # methods that look at records one by one
BITS = 4.127  # of an NF4 number with its scales (QLoRA, arXiv 2305.14314, section 3)


@dataclass(frozen=True)
class Estimate:
    """Counts, and bytes of one process: each holds a whole model, or with `sharded` its part of one."""

    parameters: int
    prunable: int
    tune: str
    """What learns: `lora` or `full`."""
    learned: int
    """Parameters that learn."""
    gates: int
    training: dict[str, int]
    """Bytes at the peak of a step of pruning, or of a look at records where nothing is trained, by part."""
    recovering: dict[str, int]
    """Bytes at the peak of a step of recovery, by part; nothing if there is none."""
    checking: dict[str, int]
    """Bytes while the cut model is compared with the gated one, by part; in float32 where both are whole."""
    steps: int
    tokens: int
    """Through the model in all steps and processes; the shared prompt once a step and process."""
    calibration: float
    """Floating-point operations of the look at records and own texts that scores, or the gates' start, come from."""
    operations: float
    """Of that and of the steps: forward, backward (to all weights or the adapters), the teacher's pass."""

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in (self.training, self.recovering, self.checking))


def estimate(config: PruneConfig, processes: int = 1, cpu: bool = False) -> Estimate:
    """What `compresso prune` with these settings needs.

    On a CPU, with what its allocator keeps between blocks, and in the numbers that this one multiplies natively.

    Raises as `checkpoint.find` if there is no such model, and ValueError if one process is to hold a part of it.
    """
    if config.sharded and processes < 2:
        raise ValueError("the settings split the weights over processes (sharded); say over how many (--gpus 8)")
    architecture, prompt_tokens = _look(config)
    config = with_units(config, architecture.model_type)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    if cpu:
        dtype = compute_dtype(config.precision, torch.device("cpu"))
    whole = shapes_of(architecture, dtype)
    shape = describe(whole)
    parameters, prunable = sum(p.numel() for p in whole.parameters()), count_prunable(whole)
    tune = tuning.chosen(config, parameters, not config.sharded and config.precision != "4bit")
    taught, taught_again = tuning.distill(config, tune), tuning.recovery_distill(config, tune)
    config = replace(config, tune=tune, distill=taught)
    part = training_memory(architecture, dtype, config, prompt_tokens, cpu)
    learned = part.pop("parameters that learn")
    if config.method != "l0":
        part = _looking(architecture, dtype, config, prompt_tokens, whole, cpu)
    if cpu:
        part["gaps between blocks"] = gaps(part)
    gated_steps = config.steps if config.method == "l0" else 0
    steps = gated_steps + config.recover_steps
    shared = prompt_tokens * (1 if shares_prompt(config, prompt_tokens) else rows_together(config))
    tokens_a_step = processes * (config.batch_size * config.max_length + config.accumulation * shared)
    layers = whole.get_submodule(family_of(architecture.model_type).layers)
    in_layers = sum(p.numel() for p in layers.parameters())
    weights, kept = _weights(config, dtype, processes, parameters, prunable, in_layers, len(layers))
    if config.distill and tune == "full" and config.method == "l0":
        weights["dense model, to learn from"] = weights["weights"]
    passes = steps * (2 + (tune == "full") + config.gradient_checkpointing)
    passes += gated_steps * bool(taught) + config.recover_steps * bool(taught_again)
    used = 2.0 * (parameters - idle(whole))
    recovery_records = config.recover_steps * config.batch_size * processes
    own = tuning.own_share(config, tune)
    of_own = OWN_LENGTH * texts_for(recovery_records, own)  # tokens that the dense model writes
    of_own += 0 if taught_again else round(OWN_LENGTH * recovery_records * own)  # and predicts, when it is their turn
    calibration = used * processes * calibration_tokens(config, prompt_tokens)
    recovering = {}
    if config.recover_steps:
        smaller = training_memory(_narrower(architecture, shape, config), dtype, config, prompt_tokens, cpu)
        smaller.pop("parameters that learn")
        recovering = {**_two_models(bool(taught_again or own), kept, dtype), **smaller}
        if cpu:
            recovering["gaps between blocks"] = gaps(smaller)
    return Estimate(
        parameters,
        prunable,
        tune,
        learned if steps else 0,
        sum(sum(shape.sizes(unit)) for unit in config.gates),
        {**weights, **part},
        recovering,
        kept,
        steps,
        steps * tokens_a_step,
        calibration,
        calibration + used * (passes * tokens_a_step + of_own),
    )


def calibration_tokens(config: PruneConfig, prompt_tokens: int) -> int:
    """Tokens before anything is cut, each counted for every pass that it takes; all records at their full length."""
    if config.method == "l0" and not config.warm_start:
        return 0
    records, together = config.calibration_records, min(AT_ONCE, rows_together(config))
    if config.method in ("l0", "fisher"):
        own = 0 if config.sharded or config.precision == "4bit" else config.own_texts
        return 3 * records * config.max_length + 4 * own * OWN_LENGTH

    def tokens(rows: int) -> int:
        return records * config.max_length + -(-records // rows) * prompt_tokens

    passes = PASSES.get(config.method, 0)
    return passes * tokens(1 if config.method in SINGLE else together) + config.refit * tokens(together)


def _looking(
    architecture: PreTrainedConfig,
    dtype: torch.dtype,
    config: PruneConfig,
    prompt_tokens: int,
    whole: PreTrainedModel,
    cpu: bool,
) -> dict[str, int]:
    """Bytes beyond the weights while a method that trains nothing looks at records, by part."""
    refitted = replace(config, batch_size=min(AT_ONCE, rows_together(config)), accumulation=1)
    config = replace(refitted, batch_size=1) if config.method in SINGLE else refitted
    found = {}
    if config.method in ("taylor", "taylor2", "fisher"):
        step = training_memory(architecture, dtype, replace(config, tune="full", distill=0.0), prompt_tokens, cpu)
        found = {"activations": step["activations"], "logits and backward": step["logits and backward"]}
        if config.method != "fisher":  # of every weight, and float32 sums of it, of the second order also of its square
            sums = (8 if config.method == "taylor2" else 4) * count_prunable(whole)
            found |= {"gradients": step["gradients"], "sums of gradients": sums}
    elif config.method in PASSES or config.refit:
        config = refitted if config.refit else config
        found = {"activations": forward_memory(architecture, dtype, config, prompt_tokens, cpu)}
    if config.refit:
        found["Gram matrices"] = 4 * sum(width**2 for width in _input_widths(whole))
    return found


def _input_widths(model: PreTrainedModel) -> list[int]:
    """Of the matrices that units feed."""
    return [model.get_submodule(path).weight.shape[1] for _, _, path in output_paths(model)]


def gaps(parts: dict[str, int]) -> int:
    """Bytes that glibc keeps between blocks of a step's tensors (not of what is there through all steps)."""
    return round(GAPS * sum(size for name, size in parts.items() if name not in LASTING))


def _weights(
    config: PruneConfig,
    dtype: torch.dtype,
    processes: int,
    parameters: int,
    prunable: int,
    in_layers: int,
    layers: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the weights of one process while it learns, and of those that are there when cut and gated meet."""
    size, removed = dtype.itemsize, config.target_sparsity * prunable
    if config.sharded:
        outside, part = size * (parameters - in_layers), size * in_layers // processes
        gathered = size * GATHERED * in_layers // layers
        cut = round(part * (1 - removed / in_layers))
        weights = {"embedding and head": outside, "part of the layers": part, "layers gathered": gathered}
        return weights, {"dense model": outside + part, "cut model": outside + cut, "layers gathered": gathered}
    if config.precision == "4bit":
        outside, four = size * (parameters - prunable), round(prunable * BITS / 8)
        cut = round((prunable - removed) * BITS / 8)
        largest = size * in_layers // layers // 2  # of a matrix in its full numbers; none is half a layer
        weights = {"embedding, head, norms": outside, "matrices in four bits": four, "matrix at work": largest}
        return weights, {"dense model": outside + four, "cut model": outside + cut, "matrix at work": largest}
    return (
        {"weights": size * parameters},
        {"dense model, in float32": 4 * parameters, "cut model, in float32": 4 * round(parameters - removed)},
    )


def show(found: Estimate, gpus: int, gpu_memory: float | None, teraflops: float | None, console: Console) -> None:
    """Print an estimate; `gpu_memory` in GB, `teraflops` that each GPU sustains."""
    console.print(
        f"{found.parameters / 1e9:,.2f} B parameters, {found.prunable / 1e9:,.2f} B of them prunable, "
        f"{found.gates:,} gates, {found.learned / 1e6:,.1f} M parameters that learn"
        f"{' (LoRA)' if found.tune == 'lora' else ''}",
        highlight=False,
    )
    table = Table("memory of each process, GB", "", title=None)
    stages = {"pruning": found.training, "recovery": found.recovering, "checking": found.checking}
    for stage, parts in stages.items():
        table.add_row(Text(stage, style="bold"), f"{sum(parts.values()) / 1e9:,.2f}")
        for name, size in parts.items():
            table.add_row(f"  {name}", f"{size / 1e9:,.2f}")
    console.print(table)
    console.print(
        f"{found.steps:,} steps, {found.tokens / 1e6:,.1f} M tokens, {found.operations:.2e} operations, "
        f"{found.calibration:.1e} of them to find out what matters",
        highlight=False,
    )
    if teraflops is not None:
        hours = found.operations / (teraflops * 1e12 * gpus) / 3600
        console.print(
            f"{hours:,.1f} hours on {gpus} GPU{'s' if gpus > 1 else ''} that sustain {teraflops:g} teraflops each"
        )
    if gpu_memory is not None:
        need = found.peak / 1e9
        split = "part of the layers" in found.training
        advice = "" if split else "; split the weights (--sharded), or use 4bit, which takes no mixtures of experts"
        verdict = "it fits" if need <= gpu_memory else "it does not fit" + advice
        console.print(f"{need:,.1f} GB of {gpu_memory:g} GB at the peak: {verdict}", highlight=False)


def _look(config: PruneConfig) -> tuple[PreTrainedConfig, int]:
    """The architecture, and the length of the collaborative prompt in tokens."""
    bare = (Path(config.model) / "config.json").is_file()  # weights need not be there
    place = config.model if bare else checkpoint.find(config.model)
    if place.endswith(".gguf"):
        architecture = checkpoint.read_gguf_config(Path(place))
    else:
        architecture, _ = checkpoint.read_config(place)
    if config.sharded or config.precision == "4bit":
        check_in_parts(config, config.sharded)
        refuse_fused(config.model, architecture.model_type)
    architecture = taken_apart(architecture)
    family_of(architecture.model_type)
    prompt = find_prompt(config.prompt, config.prompt_format)
    try:
        return architecture, len(checkpoint.load_tokenizer(place)(prompt.body)["input_ids"]) if prompt.body else 0
    except ValueError:
        return architecture, len(prompt.body) // CHARACTERS_A_TOKEN


def _narrower(architecture: PreTrainedConfig, shape: ModelShape, config: PruneConfig) -> PreTrainedConfig:
    """About what is left: FFN channels removed alone, down to a tenth of them."""
    smaller = copy.deepcopy(architecture)
    family = family_of(architecture.model_type)
    mlp = sum(layer.channels * shape.mlp_matrices for layer in shape.layers)
    share = max(0.1, 1 - config.target_sparsity * sum(map(shape.rows, shape.layers)) / mlp)
    name, grain = family.intermediate_size, family.multiple
    smaller.per_layer_config = None  # layers of the step are: all as wide as the widest
    setattr(smaller, name, max(1, round(getattr(smaller, name) * share / grain)) * grain)
    return smaller


def _two_models(taught: bool, kept: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights in recovery: the cut model, and the dense one where it teaches."""
    halved = dtype.itemsize / 4  # whole models are compared in float32, and go on in this
    found = {name.partition(",")[0]: round(size * halved) if "float32" in name else size for name, size in kept.items()}
    if not taught:
        found.pop("dense model")
    return found
