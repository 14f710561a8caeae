"""What the dense model does with some records: statistics of activations and gradients, for scores and for repair.

Every process of a launch looks at the same records, so that all of them come to the same plan.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compresso.batches import IGNORE, Batch, batches
from compresso.families import family_of
from compresso.masks import Gates
from compresso.records import Source
from compresso.shape import describe, has
from compresso.streams import mixed
from compresso.train import hidden_before_targets, operations, recomputed, target_loss
from compresso.workbench import Workbench, progress_bar

AT_ONCE = 8  # records, in parts where a step of training has fewer


@dataclass
class Moments:
    """Of the inputs x of a matrix over all tokens that were seen: (in,) each, in float32."""

    tokens: int
    total: Tensor
    squares: Tensor
    gram: Tensor | None = None
    """Sum of x x^T, (in, in), where it was asked for."""

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.tokens - self.mean.square()).clamp(min=0)


def calibration_batches(
    bench: Workbench, backward: bool = False, alone: bool = False, single: bool = False
) -> list[Batch]:
    """The first records of the run's data, `calibration_records` of them, with the prompt of a dense model.

    `alone`: without the prompt, and with nothing that rows share; `single`: each record a batch of its own. The run's
    account is charged with a pass of each process over them, or with a backward one too.
    """
    config = bench.config
    rows = min(AT_ONCE, -(-config.batch_size // (config.accumulation * bench.progress.accumulation)))
    there = [len(source.records) for source in bench.sources if isinstance(source, Source)]
    count = min([config.calibration_records, *([sum(there)] if there else [])])
    records = [*itertools.islice(mixed(bench.sources, config.seed), count)]
    prompt = replace(bench.prompt, name="none", body="") if alone else bench.prompt_at(0.0)
    parts = batches(records, bench.encoder, prompt, count if single else -(-count // rows))
    given = [(part.unshared() if alone or single else part).to(bench.accelerator.device) for part in parts]
    tokens = sum(batch.computed for batch in given) * bench.accelerator.num_processes
    bench.spend("calibration", operations(bench.model, tokens, 3 if backward else 1))
    return given


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


@contextmanager
def _removing(handles: list[RemovableHandle]) -> Iterator[None]:
    """Take hooks away at the end, however it comes."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _watch(
    model: PreTrainedModel,
    given: Sequence[Batch],
    modules: dict[str, nn.Module],
    see: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run the batches; `see` gets name, inputs (N, in) and outputs (N, out) of each module, padding left out."""
    real, prompt = torch.empty(0), False

    def told(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal prompt
        prompt = args[0].shape != real.shape  # the shared one, which is run by itself

    def rows(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if prompt else flat[real.flatten()]

    def hook(name: str, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        see(name, rows(args[0]), rows(out if isinstance(out, Tensor) else out[0]))

    embedding = model.get_submodule(family_of(model.config.model_type).embedding)
    handles = [
        embedding.register_forward_pre_hook(told),
        *(
            module.register_forward_hook(lambda _, args, out, name=name: hook(name, args, out))
            for name, module in modules.items()
        ),
    ]
    with _removing(handles):
        for batch in followed(given):
            real = real_tokens(batch)
            hidden_before_targets(model, batch)


def check_inputs(model_type: str) -> None:
    """Raise ValueError for a mixture: no module of it gets what goes into the last matrix of an expert."""
    if family_of(model_type).router:
        raise ValueError(
            f"experts of a {model_type} do not show what goes into their last matrices, which wanda, flap, minitron "
            "and --refit measure; use --method l0, fisher, taylor, taylor2, magnitude, shortgpt or random"
        )


def input_moments(model: PreTrainedModel, given: Sequence[Batch], gram: bool = False) -> dict[str, Moments]:
    """Moments of the inputs of all output matrices (`output_paths`) over the batches' tokens, by path.

    A shared prompt counts once a batch. Raises as `check_inputs`.
    """
    check_inputs(model.config.model_type)
    found: dict[str, Moments] = {}

    def see(name: str, x: Tensor, out: Tensor) -> None:
        if name not in found:
            zeros = torch.zeros(x.shape[-1], device=x.device)
            square = torch.zeros(x.shape[-1], x.shape[-1], device=x.device) if gram else None
            found[name] = Moments(0, zeros, zeros.clone(), square)
        moments, exact = found[name], x.float()
        moments.tokens += len(x)
        moments.total += exact.sum(0)
        moments.squares += exact.square().sum(0)
        if moments.gram is not None:
            moments.gram += exact.T @ exact

    _watch(model, given, {path: model.get_submodule(path) for _, _, path in output_paths(model)}, see)
    return found


def record_norms(
    model: PreTrainedModel, given: Sequence[Batch], measures: dict[str, Callable[[Tensor, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """Mean over a record's tokens of what a measure makes of a module's inputs and outputs (N, n), the root of its
    squares' sum over records: (n,), by the module's path. Each batch must hold one record.

    The aggregation of Minitron (arXiv 2407.14679, section 2.2): mean along the sequence, norm along the batch.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, out: Tensor) -> None:
        found[name] = found.get(name, 0) + measures[name](x.float(), out.float()).mean(0).square()

    _watch(model, given, {path: model.get_submodule(path) for path in measures}, see)
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


@contextmanager
def _learning_only(model: PreTrainedModel, names: Collection[str]) -> Iterator[None]:
    """Inside, gradients go to these parameters and no others; afterwards to those that had them before."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(name in names)
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(wanted[name])


def weight_gradients(
    model: PreTrainedModel, given: Sequence[Batch], names: Sequence[str], squares: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the mean loss with respect to these parameters, and with `squares` the means over batches of their
    squares."""
    parameters = {name: model.get_parameter(name) for name in names}
    first = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    second = {name: torch.zeros_like(sums) for name, sums in first.items()} if squares else {}
    with _learning_only(model, parameters):
        for batch in followed(given):
            (target_loss(model, batch) / max(batch.targets, 1)).backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    gradient = p.grad.float()
                    first[name] += gradient / len(given)
                    if squares:
                        second[name] += gradient.square() / len(given)
                p.grad = None
    return first, second


def gate_gradients(
    model: PreTrainedModel, given: Sequence[Batch], recompute: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the loss with respect to the gates of groups, channels and experts: their mean over records, and
    that of their squares.

    A record's loss is its sum over targets, divided by the mean number of targets. Both results are flat tensors by
    kind of unit; half the mean square estimates what the loss of a trained model gains when the unit goes (Optimal
    Brain Damage, LeCun et al. 1989, with the Fisher information for the Hessian). `recompute` saves memory, as in
    training.
    """
    records = sum(len(batch.ids) for batch in given)
    targets = sum(batch.targets for batch in given) / records
    each = _of_a_record if family_of(model.config.model_type).router else _of_all_rows
    sums: dict[str, Tensor] = {}
    with _learning_only(model, ()), recomputed(model, recompute):
        for found in each(model, given, lambda batch: target_loss(model, batch) / targets):
            for unit, gradient in found.items():
                sums[unit] = sums.get(unit, 0) + torch.stack([gradient.sum(0), gradient.square().sum(0)]) / records
    if not all(torch.isfinite(both).all() for both in sums.values()):
        raise ValueError("the model's gradients are not numbers (NaN or infinite); its weights may be damaged")
    first, second = ({unit: both[k] for unit, both in sums.items()} for k in range(2))
    return first, second


Gradients = Iterator[dict[str, Tensor]]
"""By kind of unit, of some records: (records, units)."""


def _of_a_record(model: PreTrainedModel, given: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> Gradients:
    """One record after the other: in the experts, rows of all records are mixed."""
    shape = describe(model)
    gates = Gates(model, shape)
    try:
        for batch in followed(given):
            for record in batch.unshared().rows():
                leaves = {unit: torch.ones(sum(shape.sizes(unit)), requires_grad=True) for unit in shape.inner_units}
                gates.set(leaves)
                loss(record).backward()
                yield {unit: leaf.grad[None] for unit, leaf in leaves.items() if leaf.grad is not None}
    finally:
        gates.remove()


def _of_all_rows(model: PreTrainedModel, given: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> Gradients:
    """All records of a batch together: each row has gates of its own."""
    shape = describe(model)
    places = list(output_paths(model))
    leaves: dict[str, Tensor] = {}

    def multiply(path: str, each: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate = leaves[path].repeat_interleave(each, -1).to(args[0].dtype)
        by_row = args[0].view(len(gate), -1, gate.shape[-1])  # OPT has all rows in one
        return ((by_row * gate).view_as(args[0]), *args[1:])

    handles = []
    for i, unit, path in places:
        hook = partial(multiply, path, shape.layers[i].columns(unit))
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    with _removing(handles):
        for batch in followed(given):
            for i, unit, path in places:
                gate = torch.ones(len(batch.ids), 1, shape.sizes(unit)[i], device=batch.ids.device)
                leaves[path] = gate.requires_grad_()
            loss(batch.unshared()).backward()
            found: dict[str, list[Tensor]] = {"kv_group": [], "intermediate": []}
            for _, unit, path in places:
                gradient = leaves[path].grad
                assert gradient is not None
                found[unit].append(gradient[:, 0].float().cpu())
            yield {unit: torch.cat(parts, 1) for unit, parts in found.items() if parts}
