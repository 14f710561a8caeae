"""METHODS: each turns a model and records into a Plan, and may leave the model changed for it.

A method gets the workbench and returns the model with the Plan to apply: the stock model with adapters merged, or,
where it is cut from files to files (`Workbench.place`), the one in training with its adapters.
"""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from compresso import scores
from compresso.allocation import FAR, standardised, uniform, whole_layers
from compresso.calibration import block_influence, calibration_batches, input_moments
from compresso.importance import fisher
from compresso.learned import l0
from compresso.plan import Plan, select
from compresso.repair import add_biases, refit
from compresso.shape import describe
from compresso.workbench import Workbench, console

Method = Callable[[Workbench], tuple[PreTrainedModel, Plan]]


def one_shot(
    bench: Workbench,
    score: Callable[[Workbench], scores.Scores],
    allocation: str,
    comparable: bool = False,
    spared: tuple[float, float] = (0.0, 0.0),
) -> tuple[PreTrainedModel, Plan]:
    """Remove the units of lowest score, layer by layer or (`allocation` global) by one threshold for all.

    Scores that are `comparable` between layers and kinds are not standardised for it. `spared` are the shares of first
    and last layers that stay whole unless an allocation is asked for. With `--refit` the model is changed for the plan.
    """
    config, shape = bench.config, describe(bench.model)
    found = {unit: values for unit, values in score(bench).items() if unit in config.gates}
    allocation = allocation if config.allocation == "auto" else config.allocation
    rules = config.widths
    if rules.uniform or allocation == "local":
        layers, nearest = len(shape.layers), partial(rules.nearest, queries=shape.layers[0].queries_per_group)
        first, last = (round(share * layers) for share in spared)
        by_itself = config.allocation == "auto" and not rules.uniform
        whole = [*range(first), *range(layers - last, layers)] if by_itself else []
        plan = uniform(shape, found, config.target_sparsity, rules.round_to, nearest, whole=whole)
        if not plan.sparsity or abs(plan.sparsity - config.target_sparsity) > FAR:
            otherwise = "" if rules.uniform else "--allocation global, or "
            raise ValueError(
                f"the same share of every layer's {', '.join(found)} can remove {100 * plan.sparsity:.1f} %, and "
                f"{100 * config.target_sparsity:g} % are asked for; use {otherwise}other --units"
            )
    else:
        plan = select(
            shape, found if comparable else standardised(shape, found), config.target_sparsity, rules.round_to
        )
    if config.refit:
        refit(bench.model, plan, input_moments(bench.model, calibration_batches(bench), gram=True))
    return bench.model, plan


def flap(bench: Workbench) -> tuple[PreTrainedModel, Plan]:
    """Fluctuation, one threshold for all layers, and the mean of what was removed as a bias (arXiv 2312.11983)."""
    moments = input_moments(bench.model, calibration_batches(bench))
    model, plan = one_shot(bench, partial(scores.flap, moments=moments), "global", comparable=True)
    if not add_biases(model, plan, {path: found.mean for path, found in moments.items()}):
        console.print(f"{model.config.model_type} has no place for FLAP's biases; its units are removed without them.")
    return model, plan


def shortgpt(bench: Workbench) -> tuple[PreTrainedModel, Plan]:
    """Whole layers, those that change the residual stream least (arXiv 2403.03853)."""
    influence = block_influence(bench.model, calibration_batches(bench))
    return bench.model, whole_layers(describe(bench.model), influence, bench.config.target_sparsity)


_like_llm_pruner = partial(one_shot, allocation="local", spared=(1 / 8, 1 / 16))  # its README: layers 4 to 29 of 32
METHODS: dict[str, Method] = {
    "l0": l0,
    "random": partial(one_shot, score=scores.random, allocation="local"),
    "magnitude": partial(_like_llm_pruner, score=scores.magnitude),
    "wanda": partial(one_shot, score=scores.wanda, allocation="local"),
    "flap": flap,
    "taylor": partial(_like_llm_pruner, score=scores.taylor),
    "taylor2": partial(_like_llm_pruner, score=scores.taylor_second),
    "fisher": partial(one_shot, score=fisher, allocation="global", comparable=True),
    "minitron": partial(one_shot, score=scores.minitron, allocation="local"),
    "shortgpt": shortgpt,
}
