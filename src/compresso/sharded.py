"""Frozen weights split over the processes of a launch (FSDP2), for models that no process can hold.

Only the decoder layers are split: their weights never learn, so that no gradient of them is exchanged, and adapters,
gates and optimizer stay whole and equal in every process, as in a launch without sharding. A layer is gathered when it
runs. Embedding and head are whole everywhere.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from compresso.families import family_of
from compresso.streamed import StoredWeights, read_weights


def load(place: Path, dtype: torch.dtype, accelerator: Accelerator) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in a folder of safetensors, each process with its part of every layer; and the dtype it is stored in.

    No process holds more than its parts, embedding, head and one whole layer. Raises ValueError for weights that cannot
    be read.
    """
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which empty weights are not
    stored = read_weights(place, model)
    family = family_of(config.model_type)
    decoder = model.get_submodule(family.layers.rpartition(".")[0])
    layers = model.get_submodule(family.layers)
    device = accelerator.device
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for i, layer in enumerate(layers):
        _fill(layer, f"{family.layers}.{i}.", stored, dtype, device)
        fully_shard(layer.to(device), mesh=mesh)
    _fill(model, "", stored, dtype, device)
    model.tie_weights()  # to what has been read
    for name, buffer in list(model.named_buffers()):
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.to(device)
    fully_shard(decoder, mesh=mesh, ignored_params=set(model.parameters()) - set(layers.parameters()))
    model.config.dtype = dtype
    if (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    return model.eval(), StoredWeights(place).dtype


def _fill(
    module: nn.Module, prefix: str, stored: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Read the parameters that are not there yet; a tied one has no name of its own among the stored."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta and prefix + name in stored:
            owner, _, own = name.rpartition(".")
            value = stored[prefix + name].to(device, dtype)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{prefix + name} has the shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
                )
            setattr(module.get_submodule(owner), own, nn.Parameter(value, requires_grad=False))
