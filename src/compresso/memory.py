"""Bytes that a training step takes beyond the weights, from shapes alone: it is run on tensors without numbers.

What is counted is what the real code keeps. Layers are alike, so that two and three of them tell of all.
"""

import copy
import weakref
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedConfig

from compresso import tuning
from compresso.adapters import inside, learning
from compresso.batches import SHARED_PREFIX_FROM, Batch, before_targets
from compresso.config import PruneConfig
from compresso.cpu_attention import products
from compresso.families import family_of
from compresso.learned import dense
from compresso.masks import Gates
from compresso.shape import ModelShape, describe
from compresso.streamed import shapes_of
from compresso.train import Teacher, hidden_before_targets, mixed_loss, recomputed


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


def rows_together(config: PruneConfig) -> int:
    """Records that go through the model together."""
    return -(-config.batch_size // config.accumulation)


def shares_prompt(config: PruneConfig, prompt_tokens: int) -> bool:
    """Whether the prompt is run once for all rows of a batch."""
    return rows_together(config) > 1 and prompt_tokens >= SHARED_PREFIX_FROM


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
    batch = _batch(config, prompt_tokens)
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


def forward_memory(
    architecture: PreTrainedConfig, dtype: torch.dtype, config: PruneConfig, prompt_tokens: int, cpu: bool = False
) -> int:
    """Bytes at the peak of a forward pass that keeps nothing for a backward one, which more layers do not change."""
    with torch.device("meta"):
        model = shapes_of(_with_layers(architecture, 2), dtype)
    batch, mode = _batch(config, prompt_tokens), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _without_numbers(model, mode)
        live = _Live(model)
        with torch.no_grad(), live, products(model, cpu):
            hidden_before_targets(model, batch)
    return live.peak


def _learners(trained: list[Tensor], tune: str) -> dict[str, int]:
    """Bytes of what learns beyond the model's own weights."""
    if tune == "lora":
        return {"adapters": sum(p.numel() * p.element_size() for p in trained)}
    return {"float32 copies": 4 * sum(p.numel() for p in trained if p.dtype != torch.float32)}


def _gate(shape: ModelShape, unit: str) -> Tensor:
    return torch.rand(sum(shape.sizes(unit)), requires_grad=True) * 1


def _batch(config: PruneConfig, prompt: int) -> Batch:
    """The largest batch that the settings allow: every record at its full length."""
    shared = shares_prompt(config, prompt)
    ids = torch.zeros(rows_together(config), config.max_length + (0 if shared else prompt), dtype=torch.long)
    prefix = torch.zeros(prompt if shared else 0, dtype=torch.long)
    return Batch(prefix, ids, ids, (ids.shape[1],) * len(ids), before_targets(ids))


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
