"""What learns besides the gates: LoRA adapters, or all weights of the decoder layers.

Small models learn far better with all their weights, and can afford it: float32 copies, moments and gradients take 14
bytes for each (LOG.md, 2026-11-25). Embedding, head and final norm stay as they are.
"""

import math
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel

from compresso.adapters import add_lora
from compresso.config import PruneConfig
from compresso.families import family_of

Tune = Literal["lora", "full"]
LARGEST = 1_000_000_000  # parameters of a model whose weights all learn by default
DISTILL = {"lora": 0.0, "full": 0.5}  # LOG.md, 2026-11-26 and 2026-11-28
LEARNING_RATE: dict[str, float] = {"lora": 1e-3, "full": 2e-4}  # LOG.md, 2026-11-25
SHARE, LONG_SHARE = 0.125, 0.25  # of own texts where all weights learn; after much is gone, in a long recovery
MUCH = 0.4  # of the prunable parameters
LONG = 1000  # steps of recovery; LOG.md, 2026-11-28
MENDING = {"lora": 0.0, "full": 2e-3}  # rate in recovery over the square of the share that is gone (LOG.md, 2026-11-27)
MENDED_IN = 424  # steps of the recovery in which that was measured


def chosen(config: PruneConfig, parameters: int, whole: bool) -> Tune:
    """What learns of a model of so many parameters, whole in its own numbers or not.

    Raises ValueError if all weights are to learn of a model that is not whole.
    """
    if config.tune == "full" and not whole:
        raise ValueError("--tune full needs whole weights in their own numbers; 4-bit or split ones learn by LoRA")
    if config.tune != "auto":
        return config.tune
    return "full" if whole and parameters <= LARGEST else "lora"


def start(model: PreTrainedModel, tune: str, config: PruneConfig, seed: int) -> PreTrainedModel | PeftModel:
    """The model, ready to learn: with adapters around it, or as it is."""
    if tune == "lora":
        return add_lora(model, config, seed)
    model.requires_grad_(False)
    model.get_submodule(family_of(model.config.model_type).layers).requires_grad_(True)
    return model


def distill(config: PruneConfig, tune: str) -> float:
    """Share of the dense model's predictions in what is minimised while gates learn."""
    return DISTILL[tune] if config.distill is None else config.distill


def recovery_distill(config: PruneConfig, tune: str) -> float:
    """The same in recovery. Before much is gone a step without the dense model's pass is cheaper and lowers the loss
    more; a few of its own texts, the aim of which are its predictions, keep what else the model knew."""
    if config.distill is None and config.target_sparsity < MUCH:
        return 0.0
    return distill(config, tune)


def own_share(config: PruneConfig, tune: str) -> float:
    """Share of recovery's records that the dense model writes, for what else the model knew than the records ask for:
    more of them where much is cut out, and the records would lead away from it for long."""
    if config.own_share is not None:
        return config.own_share
    if tune == "lora":
        return 0.0
    return LONG_SHARE if config.target_sparsity >= MUCH and config.recover_steps >= LONG else SHARE


def learning_rate(config: PruneConfig, tune: str, gone: float = 0.0) -> float:
    """The peak, where so large a share of the prunable parameters is gone: the more there is to mend, the longer steps
    pay, and the less the more steps recovery has."""
    mending = MENDING[tune] * gone**2 * min(1.0, math.sqrt(MENDED_IN / max(1, config.recover_steps)))
    return config.learning_rate or max(LEARNING_RATE[tune], mending)
