"""LoRA as few passes over memory: the adapters of peft, computed together with the frozen matrix that they adapt.

peft turns every input into float32, multiplies twice, scales, adds in float32 and turns back; autograd keeps most
of that, and adds the two gradients of the input. Here the adapters stay float32 parameters, and their small factors
are turned into the format of the activations instead. The values are the same, to rounding.
"""

import typing
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.checkpoint import cast
from compresso.config import PruneConfig
from compresso.families import family_of

ADAPTER = "default"  # peft's name of the only adapter
Adapter = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank), scale


def add_lora(model: PreTrainedModel, config: PruneConfig, seed: int) -> PeftModel:
    """Wrap the model with LoRA; the experts of a mixture, which are no modules, get none.

    Raises ValueError if no module carries a target's name.
    """
    torch.manual_seed(seed)
    family = family_of(model.config.model_type)
    targets: str | list[str] = list(config.lora_targets)
    if config.lora_targets == ("all-linear",):
        targets = "all-linear"  # of a mixture peft would take stacks too, and hold the change of all their numbers
        if family.router:
            targets = sorted(linear_names(model.get_submodule(family.layers)))
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, settings)
    if not config.lora_dropout:  # with it, adapters and matrix see different inputs
        for module in wrapped.modules():
            if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
                module.forward = _Forward(module)
    return wrapped


def linear_names(layers: nn.Module) -> set[str]:
    """What the linear modules of decoder layers are called there."""
    return {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}


def inside(wrapped: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model that carries the adapters, if there are any."""
    return typing.cast(PreTrainedModel, wrapped.get_base_model()) if isinstance(wrapped, PeftModel) else wrapped


def learning(model: nn.Module) -> None:
    """Put adapters in training mode, and no other module: dropout that a config asks for (OPT's) would be noise in what
    the gates and the teacher tell."""
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.train()


def merge(wrapped: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Fold LoRA, if there is any, into the weights, and give back the stock model, in float32 and frozen."""
    cast(inside(wrapped), torch.float32)
    model = wrapped.merge_and_unload() if isinstance(wrapped, PeftModel) else wrapped
    return model.requires_grad_(False)


def factors(wrapped: nn.Module) -> dict[str, Adapter]:
    """The adapters by the name of the weight that each of them adapts, on the CPU."""
    found = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            found[f"{name}.weight"] = (down.detach().cpu(), up.detach().cpu(), module.scaling[ADAPTER])
    return found


class _Forward:
    """`forward` of a linear module with one adapter."""

    def __init__(self, module: LoraLinear):
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        if module.disable_adapters or module.merged:
            return module.base_layer(x)
        base, down, up = module.base_layer, module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        return _Adapted.apply(x, base.weight, base.bias, down.weight, up.weight, module.scaling[ADAPTER])


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with W and bias frozen (Hu et al. 2021, arXiv 2106.09685, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        dtype = down.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.T
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale, ctx.dtype = scale, dtype
        out = functional.linear(flat, weight, bias).addmm_(inner, up.T, alpha=scale)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        grad = gradients[0].reshape(-1, len(weight))
        grad_inner = (grad @ up).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, down).view(x.shape)
        grad_down = grad_inner.T @ x.reshape(-1, x.shape[-1])
        grad_up = (grad.T @ inner).mul_(ctx.scale)
        return grad_x, None, None, grad_down.to(ctx.dtype), grad_up.to(ctx.dtype), None
