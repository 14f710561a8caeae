"""What the dense model does with some records: statistics of activations and gradients, for scores and for repair.

Every process of a launch looks at the same records, so that all of them come to the same plan.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.batches import IGNORE, Batch, batches
from compresso.families import family_of
from compresso.records import similar_lengths
from compresso.shape import has
from compresso.streams import mixed
from compresso.train import hidden_before_targets, target_loss
from compresso.workbench import Workbench, progress_bar

AT_ONCE = 8  # records


@dataclass
class Moments:
    """Of the inputs x of a matrix over all tokens that were seen: (in,) each, in float32."""

    tokens: int
    total: Tensor
    squares: Tensor
    absolute: Tensor
    gram: Tensor | None = None
    """Sum of x x^T, (in, in), where it was asked for."""

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.tokens - self.mean.square()).clamp(min=0)


def calibration_batches(bench: Workbench) -> list[Batch]:
    """The first records of the run's data, `calibration_records` of them, with the prompt of a dense model."""
    count = bench.config.calibration_records
    groups = similar_lengths(mixed(bench.sources, bench.config.seed), AT_ONCE, 4, bench.config.seed)
    prompt = bench.prompt_at(0.0)
    taken = itertools.islice(groups, -(-count // AT_ONCE))
    return [batches(group, bench.encoder, prompt)[0].to(bench.accelerator.device) for group in taken]


def followed(given: Sequence[Batch], what: str = "calibrating") -> Iterator[Batch]:
    """The batches, with a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(given), note="")
        for batch in given:
            yield batch
            bar.advance(task)


def real_tokens(batch: Batch) -> Tensor:
    """Which entries of the rows (B, T) are no padding: those up to the last target, with which a record ends."""
    targets = (batch.labels != IGNORE).int()
    return targets.flip(1).cumsum(1).flip(1) > 0


def output_paths(model: PreTrainedModel) -> Iterator[tuple[int, str, str]]:
    """Layer, kind of unit and path of every matrix whose inputs are what units give: attention outputs, last FFN."""
    family = family_of(model.config.model_type)
    for i, layer in enumerate(model.get_submodule(family.layers)):
        for unit, path in (("kv_group", family.attention_output), ("intermediate", family.mlp_output)):
            if has(layer, path):
                yield i, unit, f"{family.layers}.{i}.{path}"


@torch.no_grad()
def _watch(
    model: PreTrainedModel,
    given: Sequence[Batch],
    modules: dict[str, nn.Module],
    see: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run the batches; `see` gets name, inputs (N, in) and outputs (N, out) of each module, padding left out."""
    real = torch.empty(0)

    def rows(tensor: Tensor) -> Tensor:
        return tensor[real] if tensor.shape[:2] == real.shape else tensor.flatten(0, 1)  # else: the shared prompt

    def hook(name: str, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        see(name, rows(args[0]), rows(out if isinstance(out, Tensor) else out[0]))

    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: hook(name, args, out))
        for name, module in modules.items()
    ]
    try:
        for batch in followed(given):
            real = real_tokens(batch)
            hidden_before_targets(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def input_moments(
    model: PreTrainedModel, given: Sequence[Batch], paths: Sequence[str], gram: bool = False
) -> dict[str, Moments]:
    """Moments of the inputs of these linear modules over the batches' tokens; a shared prompt counts once a batch."""
    found: dict[str, Moments] = {}

    def see(name: str, x: Tensor, out: Tensor) -> None:
        if name not in found:
            zeros = torch.zeros(x.shape[-1], device=x.device)
            square = torch.zeros(x.shape[-1], x.shape[-1], device=x.device) if gram else None
            found[name] = Moments(0, zeros, zeros.clone(), zeros.clone(), square)
        moments, exact = found[name], x.float()
        moments.tokens += len(x)
        moments.total += exact.sum(0)
        moments.squares += exact.square().sum(0)
        moments.absolute += exact.abs().sum(0)
        if moments.gram is not None:
            moments.gram += exact.T @ exact

    _watch(model, given, {path: model.get_submodule(path) for path in paths}, see)
    return found


def output_norms(model: PreTrainedModel, given: Sequence[Batch], paths: Sequence[str]) -> dict[str, Tensor]:
    """Mean over tokens of the absolute outputs of these modules, the root of its squares' sum over batches: (out,).

    The aggregation of Minitron (arXiv 2407.14679, section 2.2): mean along the sequence, norm along the batch.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, out: Tensor) -> None:
        found[name] = found.get(name, 0) + out.float().abs().mean(0).square()

    _watch(model, given, {path: model.get_submodule(path) for path in paths}, see)
    return {name: value.sqrt() for name, value in found.items()}


def block_influence(model: PreTrainedModel, given: Sequence[Batch]) -> Tensor:
    """1 - cos(input, output) of every decoder layer, mean over tokens: (L,).

    ShortGPT, arXiv 2403.03853, equation 1.
    """
    layers = model.get_submodule(family_of(model.config.model_type).layers)
    total, tokens = torch.zeros(len(layers)), 0

    def see(name: str, x: Tensor, out: Tensor) -> None:
        nonlocal tokens
        total[int(name)] += float((1 - functional.cosine_similarity(x.float(), out.float(), dim=-1)).sum())
        tokens += len(x) if name == "0" else 0

    _watch(model, given, {str(i): layer for i, layer in enumerate(layers)}, see)
    return total / tokens


def weight_gradients(
    model: PreTrainedModel, given: Sequence[Batch], names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the mean loss with respect to these parameters, and the means over batches of their squares."""
    parameters = {name: model.get_parameter(name) for name in names}
    first = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(name in parameters)
        for batch in followed(given):
            (target_loss(model, batch) / max(batch.targets, 1)).backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    gradient = p.grad.float()
                    first[name] += gradient / len(given)
                    second[name] += gradient.square() / len(given)
                p.grad = None
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(wanted[name])
    return first, second
