"""What a run needs, before it is started: memory by part, steps, tokens, hours. From shapes alone, without weights.

One training step is run on tensors without numbers, in a model of two layers and in one of
three; layers are alike, so that the rest follows. What is counted is what the real code keeps.
"""

import copy
import weakref
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedConfig

from compresso import checkpoint, tuning
from compresso.adapters import inside, learning
from compresso.batches import SHARED_PREFIX_FROM, Batch, before_targets
from compresso.calibration import AT_ONCE
from compresso.config import PruneConfig
from compresso.cpu_attention import products
from compresso.families import family_of
from compresso.importance import LENGTH as OWN_LENGTH
from compresso.learned import dense
from compresso.masks import Gates
from compresso.mixtures import idle
from compresso.prepare import with_units
from compresso.prompts import find_prompt
from compresso.shape import ModelShape, count_prunable, describe
from compresso.streamed import shapes_of
from compresso.train import Teacher, mixed_loss, recomputed
from compresso.workbench import compute_dtype

CHARACTERS_A_TOKEN = 5  # of the prompts, where there is no tokenizer to ask
GATHERED = 3  # layers that FSDP2 holds whole: the one that runs, the next, and a copy while one is put together
LASTING = ("adapters", "float32 copies", "optimizer")  # parts of a step's memory
GAPS = 0.34  # of a step's memory on a CPU: measured for two shapes, checked on a third (LOG.md, 2026-11-25)
PASSES = {"wanda": 1, "flap": 1, "shortgpt": 1, "minitron": 2, "taylor": 3, "taylor2": 3}
"""Over the records of calibration; a backward one counts as two."""
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
    """Bytes at the peak of a step of pruning, by part."""
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
    config = replace(config, tune=tune, distill=tuning.distill(config, tune))
    part = training_memory(architecture, dtype, config, prompt_tokens, cpu)
    learned = part.pop("parameters that learn")
    if cpu:
        part["gaps between blocks"] = gaps(part)
    steps = (config.steps if config.method == "l0" else 0) + config.recover_steps
    shared = prompt_tokens * (1 if _shares(config, prompt_tokens) else _rows(config))
    tokens = steps * processes * (config.batch_size * config.max_length + config.accumulation * shared)
    layers = whole.get_submodule(family_of(architecture.model_type).layers)
    in_layers = sum(p.numel() for p in layers.parameters())
    weights, kept = _weights(config, dtype, processes, parameters, prunable, in_layers, len(layers))
    if config.distill and tune == "full":
        weights["dense model, to learn from"] = weights["weights"]
    passes = 2 + (tune == "full") + config.gradient_checkpointing + bool(config.distill)
    used = 2.0 * (parameters - idle(whole))
    calibration = used * processes * calibration_tokens(config, prompt_tokens)
    recovering = {}
    if config.recover_steps:
        smaller = training_memory(_narrower(architecture, shape, config), dtype, config, prompt_tokens, cpu)
        smaller.pop("parameters that learn")
        recovering = {**_two_models(config, kept, dtype), **smaller}
        if cpu:
            recovering["gaps between blocks"] = gaps(smaller)
    return Estimate(
        parameters,
        prunable,
        tune,
        learned,
        sum(sum(shape.sizes(unit)) for unit in config.gates),
        {**weights, **part},
        recovering,
        kept,
        steps,
        tokens,
        calibration,
        calibration + used * passes * tokens,
    )


def calibration_tokens(config: PruneConfig, prompt_tokens: int) -> int:
    """Tokens before anything is cut, each counted for every pass that it takes; all records at their full length."""
    if config.method == "l0" and not config.warm_start:
        return 0
    records, together = config.calibration_records, min(AT_ONCE, _rows(config))
    if config.method in ("l0", "fisher"):
        own = 0 if config.sharded else config.own_texts
        return 3 * records * config.max_length + 4 * own * OWN_LENGTH
    passes = PASSES.get(config.method, 0) + config.refit
    return passes * (records * config.max_length + -(-records // together) * prompt_tokens)


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
    family_of(architecture.model_type)
    prompt = find_prompt(config.prompt, config.prompt_format)
    try:
        return architecture, len(checkpoint.load_tokenizer(place)(prompt.body)["input_ids"]) if prompt.body else 0
    except ValueError:
        return architecture, len(prompt.body) // CHARACTERS_A_TOKEN


def training_memory(
    architecture: PreTrainedConfig, dtype: torch.dtype, config: PruneConfig, prompt_tokens: int, cpu: bool = False
) -> dict[str, int]:
    """`step_memory` of the whole model, from that of two and of three of its layers."""
    few, more = (step_memory(_with_layers(architecture, n), dtype, config, prompt_tokens, cpu) for n in (2, 3))
    found = {name: few[name] + (architecture.num_hidden_layers - 2) * (more[name] - few[name]) for name in few}
    missing = min(0, found["logits and backward"])  # gradients that are not there yet at the peak
    found["gradients"] += missing
    found["logits and backward"] -= missing
    return found


def _rows(config: PruneConfig) -> int:
    """Records that go through the model together."""
    return -(-config.batch_size // config.accumulation)


def _shares(config: PruneConfig, prompt_tokens: int) -> bool:
    """Whether the prompt is run once for all rows of a batch."""
    return _rows(config) > 1 and prompt_tokens >= SHARED_PREFIX_FROM


def _narrower(architecture: PreTrainedConfig, shape: ModelShape, config: PruneConfig) -> PreTrainedConfig:
    """About what is left: FFN channels removed alone, down to a tenth of them."""
    smaller = copy.deepcopy(architecture)
    family = family_of(architecture.model_type)
    mlp = sum(layer.channels * shape.mlp_matrices for layer in shape.layers)
    share = max(0.1, 1 - config.target_sparsity * sum(map(shape.rows, shape.layers)) / mlp)
    name, grain = family.intermediate_size, family.multiple
    smaller.per_layer_config = None  # as in `_with_layers`: all as wide as the widest
    setattr(smaller, name, max(1, round(getattr(smaller, name) * share / grain)) * grain)
    return smaller


def _two_models(config: PruneConfig, kept: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights in recovery: the cut model, and the dense one where it teaches."""
    halved = dtype.itemsize / 4  # whole models are compared in float32, and go on in this
    found = {name.partition(",")[0]: round(size * halved) if "float32" in name else size for name, size in kept.items()}
    if not config.distill:
        found.pop("dense model")
    return found


def _with_layers(architecture: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    fewer = copy.deepcopy(architecture)
    fewer.num_hidden_layers = layers
    fewer.per_layer_config = None
    if getattr(fewer, "layer_types", None):
        fewer.layer_types = fewer.layer_types[:layers]
    return fewer


def step_memory(
    architecture: PreTrainedConfig, dtype: torch.dtype, config: PruneConfig, prompt_tokens: int, cpu: bool = False
) -> dict[str, int]:
    """Bytes that one training step of this model takes beyond its weights, by part; every record at its full length.

    `config.tune` must say what learns: `lora` or `full`.
    """
    with torch.device("meta"):
        wrapped = tuning.start(shapes_of(architecture, dtype), config.tune, config, config.seed)
    learning(wrapped)
    model = inside(wrapped)
    shape = describe(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    learned = sum(p.numel() for p in trained)
    bytes_of = sum(p.numel() * p.element_size() for p in trained)
    batch = _batch(_rows(config), config.max_length, prompt_tokens, _shares(config, prompt_tokens))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _without_numbers(model, mode)
        gates = Gates(model, shape)
        live = _Live(model)
        reached: list[int] = []
        head = model.get_submodule(family_of(architecture.model_type).head)
        head.register_forward_pre_hook(lambda *_: reached.append(live.now))
        teacher = None
        if config.distill and isinstance(wrapped, PeftModel):
            teacher = Teacher(model, config.distill, partial(dense, wrapped, gates))
        with live, products(model, cpu), recomputed(model, config.gradient_checkpointing):
            gates.set({unit: _gate(shape, unit) for unit in config.gates})
            mixed_loss(model, batch, teacher)[0].backward()
    activations = reached[0]
    return {
        **_learners(trained, config.tune),
        "optimizer": 8 * learned,
        "gradients": bytes_of,
        "activations": activations,
        "logits and backward": live.peak - activations - bytes_of,
        "parameters that learn": learned,
    }


def _learners(trained: list[Tensor], tune: str) -> dict[str, int]:
    """Bytes of what learns beyond the model's own weights."""
    if tune == "lora":
        return {"adapters": sum(p.numel() * p.element_size() for p in trained)}
    return {"float32 copies": 4 * sum(p.numel() for p in trained if p.dtype != torch.float32)}


def _gate(shape: ModelShape, unit: str) -> Tensor:
    return torch.rand(sum(shape.sizes(unit)), requires_grad=True) * 1


def _batch(rows: int, length: int, prompt: int, shared: bool) -> Batch:
    """The largest batch that the settings allow: every record at its full length."""
    ids = torch.zeros(rows, length + (0 if shared else prompt), dtype=torch.long)
    prefix = torch.zeros(prompt if shared else 0, dtype=torch.long)
    return Batch(prefix, ids, ids, ids.numel(), before_targets(ids))


def _without_numbers(model: nn.Module, mode: FakeTensorMode) -> None:
    """Parameters and buffers that know shape and device and hold nothing; tied ones stay tied."""
    fakes: dict[int, nn.Parameter] = {}

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.to("meta"), torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = nn.Parameter(fake(parameter.data), requires_grad=parameter.requires_grad)
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _grouped(a: Tensor, b: Tensor, offs: Tensor, *_: object) -> Tensor:
    """What torch's product by groups gives, of (S, K) and (E, K, N) or (K, S) and (S, N); it knows bfloat16 alone."""
    size = (len(a), b.shape[-1])
    return a.new_empty(size if b.ndim == 3 else (len(offs), *size))


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations inside made and that are still there; `peak` is the most.

    Those of `model` are not counted, of which a transposed weight is a view.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        there = [*model.parameters(), *model.buffers()]
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        grouped = operation is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)
        made = (_grouped if grouped else operation)(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
