"""Gates on a stock model: hooks that multiply by the current z, and the log_alpha that z is drawn from.

A gate sits only where it folds into a weight: at the inputs of the attention output and
of the last FFN matrix, and at the three kinds of writes to the residual stream. The
published code gates inside SwiGLU, which cannot be folded. An expert's gate acts on the
router (`mixtures.choose`).

z is drawn once a step and only read by the hooks, so that a recomputed forward
(gradient checkpointing) sees the same gates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso import hard_concrete
from compresso.families import family_of
from compresso.mixtures import choose
from compresso.shape import ModelShape, has, sparsity

CLOSED = -1e4  # log_alpha of a gate that no draw opens


def is_closed(log_alpha: Tensor) -> Tensor:
    """Which gates are closed for ever, a boolean for each."""
    return log_alpha <= CLOSED / 2


class Masks(nn.Module):
    """The learned parameters: one log_alpha per unit of the chosen kinds, in float32 on the CPU.

    `log_alpha[unit]` is flat, layer after layer (see `ModelShape.sizes`).
    """

    def __init__(self, shape: ModelShape, initial_log_alpha: dict[str, float]):
        super().__init__()
        self.shape = shape
        self.log_alpha = nn.ParameterDict(
            {unit: torch.full((sum(shape.sizes(unit)),), value) for unit, value in initial_log_alpha.items()}
        )
        self.pinned = {unit: torch.zeros(len(a), dtype=torch.bool) for unit, a in self.log_alpha.items()}
        """Units that are closed for ever."""

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw every gate once."""
        return {unit: hard_concrete.sample(a, generator) for unit, a in self.log_alpha.items()}

    def prob_open(self) -> dict[str, Tensor]:
        return {unit: hard_concrete.prob_open(a) for unit, a in self.log_alpha.items()}

    def expected_sparsity(self) -> Tensor:
        """Share of the prunable parameters expected to go: a scalar, differentiable.

        In float64: half precision loses whole columns in a sum this long.
        """
        return sparsity(self.shape, {unit: p.double() for unit, p in self.prob_open().items()})

    @torch.no_grad()
    def clamp(self) -> None:
        for unit, a in self.log_alpha.items():
            a.copy_(self.limited(unit, a))

    @torch.no_grad()
    def level(self) -> None:
        """Move the values of each layer together, so that any threshold keeps about as many units of a kind in each.

        The quantile that moves to its mean over layers is that of the share of the kind that is expected to go; which
        units of a layer go is not touched. Layers that have none of a kind are passed over.
        """
        for unit, a in self.log_alpha.items():
            gone = 1 - float(hard_concrete.prob_open(a).mean())
            parts = [part for part in a.split(self.shape.sizes(unit)) if not is_closed(part).all()]
            bounds = torch.stack([part[~is_closed(part)].quantile(gone) for part in parts])
            for part, bound in zip(parts, bounds, strict=True):
                part += bounds.mean() - bound

    def limited(self, unit: str, log_alpha: Tensor) -> Tensor:
        """These values within their limits, pinned ones where they are pinned."""
        within = log_alpha.clamp(-hard_concrete.LIMIT, hard_concrete.LIMIT)
        return within.masked_fill(self.pinned[unit], CLOSED)

    def pin_closed(self, unit: str, which: Tensor) -> None:
        """Close these units (a boolean for each) for ever: every draw of their gates is 0."""
        self.pinned[unit] |= which
        self.clamp()


class Gates:
    """Hooks on `model` that multiply by the gates last given to `set`; none are set at first.

    Attach after peft has wrapped the model, so that a gate covers the adapter too.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape):
        self.shape = shape
        self.kept: dict[str, list[Tensor]] = {}
        """For units of which some have been cut out of the model: indices of those that are left, layer by layer."""
        self._group: list[Tensor] | None = None
        self._channel: list[Tensor] | None = None
        self._expert: list[Tensor] | None = None
        self._written: dict[str, list[Tensor]] = {}
        self._embedded: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        family = family_of(model.config.model_type)
        self._device = model.get_submodule(family.embedding).weight.device

        def on_input(module: nn.Module, read) -> None:
            def hook(_module, args):
                gate = read()
                return None if gate is None else (args[0] * gate.to(args[0].dtype), *args[1:])

            self._handles.append(module.register_forward_pre_hook(hook))

        def on_output(module: nn.Module, read) -> None:
            def hook(_module, _args, output):
                gate = read()
                return None if gate is None else output * gate.to(output.dtype)

            self._handles.append(module.register_forward_hook(hook))

        on_output(model.get_submodule(family.embedding), lambda: self._embedded)
        for i, layer in enumerate(model.get_submodule(family.layers)):
            if has(layer, family.attention_output):
                o = layer.get_submodule(family.attention_output)
                on_input(o, lambda i=i: self._group and self._group[i])
                on_output(o, lambda i=i: self._written.get("attention") and self._written["attention"][i])
            if has(layer, family.mlp_output):
                last = layer.get_submodule(family.experts if family.router else family.mlp_output)
                # what experts activate goes, times what comes from up, into the last matrix of each
                inside = partial(on_output, last.act_fn) if family.router else partial(on_input, last)
                inside(lambda i=i: self._channel and self._channel[i])
                on_output(last, lambda i=i: self._written.get("mlp") and self._written["mlp"][i])
            if family.router and has(layer, family.router):

                def reroute(router, _args, output, i=i):
                    return None if self._expert is None else choose(router, output, self._expert[i])

                self._handles.append(layer.get_submodule(family.router).register_forward_hook(reroute))

    def set(self, z: dict[str, Tensor]) -> None:
        """Use these gates from now on; units that are left out are open."""
        if self._device.type == "mps":  # which has no float64
            z = {unit: values.float() for unit, values in z.items()}
        parts = {unit: list(values.to(self._device).split(self.shape.sizes(unit))) for unit, values in z.items()}
        for unit in parts.keys() & self.kept.keys():
            parts[unit] = [part[kept] for part, kept in zip(parts[unit], self.kept[unit], strict=True)]
        self._group = None
        if "kv_group" in parts:
            rows = [layer.queries_per_group * layer.head_dim for layer in self.shape.layers]
            self._group = [z_G.repeat_interleave(n) for z_G, n in zip(parts["kv_group"], rows, strict=True)]
        self._channel = parts.get("intermediate")
        self._expert = parts.get("expert")
        self._embedded = parts["hidden"][0] if "hidden" in parts else None
        self._written = {}
        for unit in ("attention", "mlp"):
            if unit in parts and self._embedded is not None:
                self._written[unit] = [self._embedded * z_1 for z_1 in parts[unit]]
            elif unit in parts:
                self._written[unit] = parts[unit]
            elif self._embedded is not None:
                self._written[unit] = [self._embedded] * len(self.shape.layers)

    def open(self) -> None:
        """Compute what the model computes without gates."""
        self.set({})

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, all gates are open; afterwards they are what they were."""
        before = self._group, self._channel, self._expert, self._written, self._embedded
        self.open()
        try:
            yield
        finally:
            self._group, self._channel, self._expert, self._written, self._embedded = before

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def gated(model: PreTrainedModel, shape: ModelShape, z: dict[str, Tensor]) -> Iterator[PreTrainedModel]:
    """The model with these gates, for the length of a with block."""
    gates = Gates(model, shape)
    gates.set(z)
    try:
        yield model
    finally:
        gates.remove()
