"""The one loop: task loss, and the sparsity constraint where there are masks.

`fit` is a generator of metrics rows, one an optimizer step; who shows or stores them is
not its business. Recovery is the same loop without masks. In several processes each
takes its part of the global batch; one message of summed gradients a step, of what
learns, is all that is exchanged, and every process makes the same step.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compresso.adapters import learning
from compresso.batches import Batch
from compresso.cpu_attention import products
from compresso.families import family_of
from compresso.mixtures import idle
from compresso.prefix import for_rows, positions_after, read_only, run_prefix, with_cache
from compresso.shrink import EVERY
from compresso.stopping import uninterrupted
from compresso.training import Training

LOGITS_AT_ONCE = 2**23  # entries of float32 logits that exist at a time: 32 MiB
WARMUP = 0.05  # share of the steps in which the learning rate rises
EXPLODED = 3.0  # times the loss at first, or that of a model that guesses, whichever is larger


class Diverged(RuntimeError):
    """A loss or gradient is not finite, or the loss exploded; nothing of that step was applied."""

    stage = ""
    """`prune` or `recover`, once it is known."""


class Disconnected(RuntimeError):
    """Another process of this launch does not answer."""


@dataclass(frozen=True)
class Teacher:
    """The dense model, whose predictions are part of the aim.

    While gates are learned with LoRA it is the model itself, adapters off and gates open (`silent`), so that nothing is
    held twice; elsewhere it is a model of its own.
    """

    model: PreTrainedModel
    weight: float
    """Share of the distance to the teacher in the loss, in [0, 1]; of texts that it wrote the distance is all."""
    silent: Callable[[], AbstractContextManager] = nullcontext

    def taught(self, batch: Batch) -> Batch:
        """The rows of which it predicts the targets."""
        return batch if self.weight else batch.own_rows()

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        with self.silent():
            return hidden_before_targets(self.model, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        return logits_of(self.model, hidden)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits of what the head gets, scaled and capped as the config says (Granite, Gemma 2)."""
    config = model.config
    logits = model.get_submodule(family_of(config.model_type).head)(hidden).float()
    scaling = getattr(config, "logits_scaling", 1.0)
    logits = logits if scaling == 1.0 else logits / scaling  # a pass over the largest tensor of a step
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def hidden_before_targets(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the head gets at the positions that are followed by a target: (N, hidden).

    The shared prefix is run once, and every row attends to its keys and values; gradients flow through them.
    """
    decoder = model.get_submodule(family_of(model.config.model_type).layers.rpartition(".")[0])
    cache = None
    if len(batch.prefix):
        cache = read_only(for_rows(run_prefix(decoder, batch.prefix, model.config), len(batch.ids)))
    hidden = decoder(
        input_ids=batch.ids,
        position_ids=positions_after(len(batch.prefix), batch.ids),
        **with_cache(decoder, cache),
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.places)


def target_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Sum of the next-token loss over the labelled tokens of a batch: a scalar, in float32."""
    return mixed_loss(model, batch, None)[0]


def mixed_loss(model: PreTrainedModel, batch: Batch, teacher: Teacher | None) -> tuple[Tensor, Tensor]:
    """Sums over the labelled tokens of a batch, in float32: what is minimised, and the next-token loss alone.

    With a teacher the first is (1 - weight) times the next-token loss plus weight times the cross entropy with the
    teacher's distribution (Hinton et al. 2015, arXiv 1503.02531): its gradient is that of the Kullback-Leibler
    divergence, and one softmax serves both. Of rows that the teacher wrote the weight is 1: that is what the tokens
    which it drew say on average, without their noise. Logits are computed only where there is a label, in chunks.
    """
    labels = batch.labels.flatten().index_select(0, batch.places + 1)
    own = batch.own_targets if teacher else 0
    of_teacher = teacher.hidden(teacher.taught(batch)) if teacher and (teacher.weight or own) else None
    hidden = hidden_before_targets(model, batch)
    if teacher is None or of_teacher is None:
        return _sums(model, hidden, labels)
    others = len(labels) - own
    aims = (teacher, teacher.weight, of_teacher[:others]) if teacher.weight else ()
    mixed, loss = _sums(model, hidden[:others], labels[:others], *aims)
    if not own:
        return mixed, loss
    own_mixed, own_loss = _sums(model, hidden[others:], labels[others:], teacher, 1.0, of_teacher[-own:])
    return mixed + own_mixed, loss + own_loss


def _sums(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    teacher: Teacher | None = None,
    weight: float = 0.0,
    of_teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mixed_loss` of targets (N,) with the same weight, from what both models' heads get: (N, hidden) each."""

    def loss_of(part: Tensor, label: Tensor, of_teacher: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_p = functional.log_softmax(logits_of(model, part), -1)
        loss = functional.nll_loss(log_p, label, reduction="sum")
        if teacher is None or of_teacher is None:
            return loss, loss.detach()
        aim = functional.softmax(teacher.logits(of_teacher), -1).mul_(weight)
        aim.scatter_add_(-1, label[:, None], torch.full_like(aim[:, :1], 1 - weight))
        return -torch.dot(aim.flatten(), log_p.flatten()), loss.detach()

    aims = [labels] if of_teacher is None else [labels, of_teacher]
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _SumWithGradient.apply(hidden, aims, loss_of, chunk)
    parts = zip(*(t.split(chunk) for t in (hidden, *aims)), strict=True)
    mixed, loss = zip(*(loss_of(*part) for part in parts), strict=True)
    return torch.stack(mixed).sum(), torch.stack(loss).sum()


class _SumWithGradient(torch.autograd.Function):
    """Sums of `loss_of` over chunks of rows, the first one's gradient taken while a chunk's logits are there.

    The head is frozen, so that the gradient of the hidden states is all that is wanted; no logits are kept, and none
    are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, aims: list[Tensor], loss_of: Callable[..., tuple[Tensor, Tensor]], chunk: int
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)
        sums = []
        for rows, out, *aim in zip(*(t.split(chunk) for t in (hidden, gradient, *aims)), strict=True):
            with torch.enable_grad():
                part = rows.detach().requires_grad_()
                mixed, loss = loss_of(part, *aim)
                out.copy_(torch.autograd.grad(mixed, part)[0])
            sums.append(torch.stack([mixed.detach(), loss]))
        ctx.save_for_backward(gradient)
        mixed, loss = (part.clone() for part in torch.stack(sums).sum(0))
        ctx.mark_non_differentiable(loss)
        return mixed, loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None, None


@contextmanager
def recomputed(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Inside, if wanted, a decoder layer keeps its input, and backward runs it again (activation checkpointing)."""
    layers = model.get_submodule(family_of(model.config.model_type).layers) if wanted else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def operations(model: PreTrainedModel, tokens: int, passes: int) -> int:
    """Floating-point operations of passes of a model over tokens: two for a token and each parameter that it meets; a
    backward pass counts as two passes (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
    weights = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())  # NF4: two a byte
    return 2 * passes * tokens * (weights - idle(model))


def gate_learning_rate(steps: int) -> float:
    """Step size of log_alpha such that a steady gradient carries it across its range within the run."""
    return min(0.3, max(0.01, 12 / steps))


def fit(
    accelerator: Accelerator,
    training: Training,
    next_batches: Callable[[float], list[Batch]],
    *,
    steps: int,
    learning_rate: float,
    clip: float,
    teacher: Teacher | None = None,
    recompute: bool = False,
    slowed: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[dict[str, Any]]:
    """Train what requires grad, and the masks, up to `steps` optimizer steps, from where `training` is.

    `next_batches` gets the sparsity so far (for prompts that show it) and returns this process's parts of one global
    batch. `slowed` is the share of the step sizes that a step, from 0, takes. Raises Diverged before a step with a loss
    or gradient that is not finite, or a loss that exploded, is applied, Disconnected if another process has gone.
    """
    model, pruning = training.model, training.pruning
    learning(model)
    for step in range(training.step, steps):
        began = time.perf_counter()
        phase = pruning.lagrangian.schedule.phase(step) if pruning else "recover"
        gating = phase not in ("lora", "recover")
        rate = learning_rate * _rate(step, steps) * slowed(step)
        torch.manual_seed(_dropout_seed(training.seed, step, accelerator.process_index))
        if pruning and gating:
            pruning.gates.set(pruning.masks.sample(training.noise))
        with products(model, accelerator.device.type == "cpu"), recomputed(model, recompute):
            parts = next_batches(training.sparsity)
            total, tokens, computed, taught = _backward(accelerator, model, parts, gating, teacher)
        trainable = training.trainable()
        _sum_gradients(accelerator, [*trainable, *(pruning.masks.parameters() if pruning and gating else ())])
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, clip))
        _check(training, total, norm)
        spent = operations(model, computed, 3) + (operations(teacher.model, taught, 1) if teacher else 0)
        row: dict[str, Any] = {"step": step + 1, "phase": phase, "loss": total}
        with uninterrupted():
            row |= _apply(training, step, rate, gating, slowed(step))
            row |= {"learning_rate": rate, "gradient_norm": norm, "tokens": tokens, "operations": spent}
            row["seconds"] = time.perf_counter() - began
            training.step, training.row = step + 1, row
            training.first_loss = training.first_loss or total
            training.noise_before = training.noise.get_state()
        yield row
    model.eval()


def _apply(training: Training, step: int, rate: float, gating: bool, slowed: float) -> dict[str, float]:
    """Make the step that the gradients ask for; what the metrics say of the constraint."""
    pruning, optimizer, gate_optimizer = training.pruning, training.optimizer, training.gate_optimizer
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    if not pruning or not gate_optimizer:
        return {}
    target = 0.0
    if gating:
        for group in gate_optimizer.param_groups:
            group["lr"] = pruning.learning_rate * slowed
        gate_optimizer.step()
        gate_optimizer.zero_grad()
        if pruning.level:
            pruning.masks.level()
        pruning.masks.clamp()
        training.sparsity, target = pruning.lagrangian.step(pruning.masks, step)
        if pruning.shrinking and pruning.lagrangian.schedule.phase(step) == "hold" and step % EVERY == 0:
            pruning.shrinking.cut(optimizer)
    return {
        "expected_sparsity": training.sparsity,
        "target_sparsity": target,
        "lambda_1": pruning.lagrangian.lambda_1,
    }


def _check(training: Training, loss: float, norm: float) -> None:
    """Raise Diverged unless the step may be made."""
    masks = training.pruning.masks.parameters() if training.pruning else ()
    finite = all(bool(torch.isfinite(a.grad).all()) for a in masks if a.grad is not None)
    if not (math.isfinite(loss) and math.isfinite(norm) and finite):
        raise Diverged(f"at step {training.step + 1} the loss is {loss} and the gradient's norm {norm}")
    most = EXPLODED * max(training.first_loss, math.log(training.model.config.vocab_size))
    if training.first_loss and loss > most:
        raise Diverged(f"at step {training.step + 1} the loss is {loss:.2f}; it was {training.first_loss:.2f} at first")


def _dropout_seed(seed: int, step: int, process: int) -> int:
    """Of what a model draws in training: the same for a step whether or not the run was cut short before it."""
    return ((seed * 1_000_003 + step) * 4_099 + process) % 2**63


def _backward(
    accelerator: Accelerator, model: PreTrainedModel, parts: list[Batch], gating: bool, teacher: Teacher | None
) -> tuple[float, int, int, int]:
    """Gradients of this process's share of a step; of the global batch the next-token loss, the tokens, those of
    them that go through the model, and those that go through the teacher."""
    counts = [sum(getattr(part, what) for part in parts) for what in ("targets", "tokens", "computed")]
    counts.append(sum(teacher.taught(part).computed for part in parts) if teacher else 0)
    sharing = [int(len(part.prefix) > 0) for part in parts]
    targets, tokens, computed, taught, *sharing = _summed(
        accelerator, torch.tensor([*counts, *sharing], dtype=torch.float64)
    ).tolist()
    # all processes run the model equally often, or those that hold a part of it would wait for ever
    parts = [p if n == accelerator.num_processes else p.unshared() for p, n in zip(parts, sharing, strict=True)]
    parts_loss = torch.zeros(1, dtype=torch.float64)
    for i, part in enumerate(parts):
        minimised, loss = mixed_loss(model, part.to(accelerator.device), teacher)
        # the gates are a graph of their own, shared by the parts of the batch
        (minimised / max(targets, 1)).backward(retain_graph=gating and i + 1 < len(parts))
        parts_loss += float(loss) / max(targets, 1)
    return float(_summed(accelerator, parts_loss)), int(tokens), int(computed), int(taught)


def _summed(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over processes."""
    if accelerator.num_processes == 1:
        return values
    try:
        return accelerator.reduce(values.to(accelerator.device), reduction="sum").to(values.device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Disconnected(f"another process of this launch does not answer ({str(error).splitlines()[0]})") from error


def _sum_gradients(accelerator: Accelerator, parameters: list[Tensor]) -> None:
    """Sum the gradients over processes, in one message for each number format, whatever device they are on."""
    if accelerator.num_processes == 1:
        return
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        group = [p for p in parameters if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([grad.flatten().to(accelerator.device) for grad in grads])
        for p, grad in zip(group, _summed(accelerator, flat).split([p.numel() for p in group]), strict=True):
            p.grad = grad.view_as(p).to(p.device)


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to a tenth."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
