"""The paper's method: hard concrete gates trained under a sparsity constraint, together with LoRA or all weights."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from compresso import hard_concrete, tuning
from compresso.adapters import inside, merge
from compresso.allocation import decide
from compresso.importance import fisher
from compresso.lagrangian import Lagrangian, initial_log_alpha, make_schedule, shift
from compresso.masks import Gates, Masks, gated
from compresso.perplexity import mean_loss
from compresso.plan import Plan
from compresso.shape import describe
from compresso.shrink import Shrinking
from compresso.train import Teacher, fit, gate_learning_rate
from compresso.training import Pruning, Training
from compresso.workbench import Workbench

SPREAD = 2.0  # of log_alpha at a warm start, in units of a logistic distribution


def l0(bench: Workbench) -> tuple[PreTrainedModel, Plan]:
    """Hard concrete gates trained with the model under a sparsity constraint (Compresso, arXiv 2310.05015)."""
    config = bench.config
    shape = describe(bench.model)
    schedule = make_schedule(config.steps, config.lora_only, config.hold, config.target_sparsity, config.schedule)
    masks = Masks(shape, {unit: initial_log_alpha(unit, config.target_sparsity) for unit in config.gates})
    found = bench.newest("prune")
    if config.warm_start and not found and {*shape.inner_units} & masks.log_alpha.keys():
        warm_start(masks, broadcast_object_list([fisher(bench)])[0])  # GPUs round in their own order
    teacher, share = None, tuning.distill(config, bench.tune)
    if share and bench.tune == "full":
        teacher = Teacher(copy.deepcopy(bench.model).requires_grad_(False), share)
    wrapped = tuning.start(bench.model, bench.tune, config, config.seed)
    gates = Gates(inside(wrapped), shape)
    if share and isinstance(wrapped, PeftModel):
        teacher = Teacher(inside(wrapped), share, partial(dense, wrapped, gates))
    shrinking = None
    own_teacher = teacher is not None and teacher.model is inside(wrapped)
    rules = config.widths
    # nothing of a teacher, or of layers in parts, is cut; and a uniform plan is known at the end
    if config.shrink and not own_teacher and not bench.place and not rules.uniform:
        shrinking = Shrinking(inside(wrapped), gates, masks, config.target_sparsity, rules.round_to)
    rate = config.gate_learning_rate or gate_learning_rate(schedule.steps - schedule.lora_only)
    pruning = Pruning(masks, gates, Lagrangian(schedule, masks), rate, shrinking, level=rules.uniform)
    training = Training(inside(wrapped), config.seed, pruning)
    bench.begin("prune", training, found)
    rows = fit(
        bench.accelerator,
        training,
        bench.batches(config.seed, training.step),
        steps=config.steps,
        learning_rate=tuning.learning_rate(config, bench.tune),
        clip=config.clip,
        recompute=config.gradient_checkpointing,
        teacher=teacher,
        slowed=partial(bench.progress.slowed, "prune"),
    )
    bench.follow("prune", training, _leaving(bench, wrapped, training, rows), config.steps)
    gates.remove()
    log_alpha = {unit: a.detach() for unit, a in masks.log_alpha.items()}
    plan = decide(shape, log_alpha, config.target_sparsity, rules)
    model = inside(wrapped) if bench.place else merge(wrapped)
    if shrinking:
        shrinking.restore()
    return model, _best_gates(bench, model, plan, log_alpha)


def _leaving(
    bench: Workbench, wrapped: PreTrainedModel | PeftModel, training: Training, rows: Iterator[dict]
) -> Iterator[dict]:
    """The rows; where the run's target passes a sparsity of `--also`, a smaller model is left on the way.

    What its plan removes stays closed from then on, so that plans are nested. A run that goes on begins with those that
    the step before it called for.
    """
    pruning = training.pruning
    assert pruning is not None
    masks, done = pruning.masks, training.row
    passed = pruning.lagrangian.target_after(training.step - 1)
    waiting = [sparsity for sparsity in bench.config.also if sparsity > passed]
    for row in itertools.chain([done] if done else [], rows):
        if row is not done:
            yield row
        while waiting and row["target_sparsity"] >= waiting[0]:
            target = waiting.pop(0)
            log_alpha = {unit: a.detach() for unit, a in masks.log_alpha.items()}
            plan = decide(masks.shape, log_alpha, target, bench.config.widths)
            for unit in log_alpha:
                masks.pin_closed(unit, plan.gates[unit] == 0)
            pruning.lagrangian.wait_here(masks)
            assert bench.leave is not None
            with pruning.gates.opened():
                bench.leave(merge(copy.deepcopy(wrapped)).eval(), plan, target)


@contextmanager
def dense(wrapped: PeftModel, gates: Gates) -> Iterator[None]:
    """Inside, the model in training computes what the dense one did."""
    with wrapped.disable_adapter(), gates.opened():
        yield


@torch.no_grad()
def warm_start(masks: Masks, importance: dict[str, Tensor]) -> None:
    """Spread log_alpha of groups, channels and experts by the rank of their importance.

    `importance` are estimates of what the loss gains, for each parameter, when a unit goes (`fisher`). The ranks of all
    units together, as quantiles of a logistic distribution, leave few gates undecided at any threshold. The expected
    sparsity stays what it was.
    """
    before = float(masks.expected_sparsity())
    known = {unit: values for unit, values in importance.items() if unit in masks.log_alpha}
    ranks = torch.cat([*known.values()]).argsort().argsort()
    quantiles = torch.logit((ranks + 0.5) / len(ranks))
    for unit, own in zip(known, quantiles.split([*map(len, known.values())]), strict=True):
        masks.log_alpha[unit] += SPREAD * own
    shift(masks, before)


def _best_gates(bench: Workbench, model: PreTrainedModel, plan: Plan, log_alpha: dict[str, torch.Tensor]) -> Plan:
    """Kept gates at 1 or at their soft values, whichever has the lower loss on held-out records."""
    soft = plan.scaled({unit: hard_concrete.gate_value(a) for unit, a in log_alpha.items()})
    if bench.config.kept_gates != "auto":
        return soft if bench.config.kept_gates == "soft" else plan
    losses = []
    for candidate in (plan, soft):
        with gated(model, candidate.shape, candidate.gates):
            losses.append(mean_loss(model, bench.validation(candidate.sparsity)))
    bench.facts["kept_gates"] = {"binary": losses[0], "soft": losses[1]}
    return plan if losses[0] <= losses[1] else soft
