"""The paper's method: hard concrete gates trained together with LoRA under a sparsity constraint."""

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from compresso import hard_concrete
from compresso.adapters import add_lora, inside, merge
from compresso.lagrangian import Lagrangian, initial_log_alpha, make_schedule
from compresso.masks import Gates, Masks, gated
from compresso.perplexity import mean_loss
from compresso.plan import Plan, select
from compresso.shape import describe
from compresso.shrink import Shrinking
from compresso.train import Pruning, fit, gate_learning_rate
from compresso.workbench import Workbench


def l0(bench: Workbench) -> tuple[PreTrainedModel, Plan]:
    """Hard concrete gates trained with LoRA under a sparsity constraint (Compresso, arXiv 2310.05015)."""
    config = bench.config
    shape = describe(bench.model)
    schedule = make_schedule(config.steps, config.lora_only, config.hold, config.target_sparsity, config.schedule)
    masks = Masks(shape, {unit: initial_log_alpha(unit, config.target_sparsity) for unit in config.units})
    wrapped = add_lora(bench.model, config, config.seed)
    gates = Gates(inside(wrapped), shape)
    shrinking = None
    if config.shrink and not bench.place:  # parts of layers in several processes are not cut
        shrinking = Shrinking(inside(wrapped), gates, masks, config.target_sparsity, config.round_to)
    rate = config.gate_learning_rate or gate_learning_rate(schedule.steps - schedule.lora_only)
    rows = fit(
        bench.accelerator,
        inside(wrapped),
        bench.batches(config.seed),
        steps=config.steps,
        learning_rate=config.learning_rate,
        clip=config.clip,
        seed=config.seed,
        recompute=config.gradient_checkpointing,
        pruning=Pruning(masks, gates, Lagrangian(schedule, masks), rate, shrinking),
    )
    with bench.keeping(wrapped, masks):
        bench.follow("prune", rows, config.steps)
    gates.remove()
    log_alpha = {unit: a.detach() for unit, a in masks.log_alpha.items()}
    plan = select(shape, log_alpha, config.target_sparsity, config.round_to)
    model = inside(wrapped) if bench.place else merge(wrapped)
    if shrinking:
        shrinking.restore()
    return model, _best_gates(bench, model, plan, log_alpha)


def _best_gates(bench: Workbench, model: PreTrainedModel, plan: Plan, log_alpha: dict[str, torch.Tensor]) -> Plan:
    """Kept gates at 1 or at their soft values, whichever has the lower loss on held-out records."""
    soft = plan.scaled({unit: hard_concrete.gate_value(a) for unit, a in log_alpha.items()})
    if bench.config.kept_gates != "auto":
        return soft if bench.config.kept_gates == "soft" else plan
    losses = []
    for candidate in (plan, soft):
        with gated(model, candidate.shape, candidate.gates):
            losses.append(mean_loss(model, bench.validation(candidate.sparsity)))
    losses = broadcast_object_list(losses)  # all processes must take the same
    bench.facts["kept_gates"] = {"binary": losses[0], "soft": losses[1]}
    return plan if losses[0] <= losses[1] else soft
