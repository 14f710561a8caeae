"""All that changes while the loop runs: what a checkpoint must hold so that a run goes on as if it had not stopped."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.exact_adamw import ExactAdamW
from compresso.lagrangian import Lagrangian
from compresso.masks import Gates, Masks
from compresso.shrink import Shrinking

NOISE_SEED = 1_000_003  # keeps the gates' noise apart from the seeds of the data


@dataclass(frozen=True)
class Pruning:
    """What the loop needs besides the model while gates are learned."""

    masks: Masks
    gates: Gates
    lagrangian: Lagrangian
    learning_rate: float
    shrinking: Shrinking | None = None
    level: bool = False
    """Layers are to keep as many units each."""


@dataclass
class Training:
    """A model in training after `step` optimizer steps.

    A step changes all of it at its end and at once, so that what is here is whole whenever a step is cut short.
    """

    model: PreTrainedModel
    seed: int
    pruning: Pruning | None = None
    sparsity: float = 0.0
    """So far, for prompts that show it."""
    step: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    """The metrics of the last step."""
    first_loss: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = ExactAdamW(self.trainable(), 0.0)  # the loop sets the rate of every step
        self.noise = torch.Generator().manual_seed(self.seed * NOISE_SEED)
        self.noise_before = self.noise.get_state()  # before the step that is next, or under way
        self.gate_optimizer = torch.optim.Adam(self.pruning.masks.parameters(), lr=0.0) if self.pruning else None

    def trainable(self) -> list[Tensor]:
        """The parameters that learn, the gates aside; others than before, once the model has shrunk."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def facts(self) -> dict[str, Any]:
        """The part that is no tensor, for JSON."""
        of_constraint = self.pruning.lagrangian.state() if self.pruning else {}
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "row": self.row,
            "first_loss": self.first_loss,
            "constraint": of_constraint,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The part that is tensors, by name: weights that learn and their moments, gates, the state of the noise."""
        found = {"noise": self.noise_before}
        for name, parameter in self._named():
            exact, moments = self.optimizer.held(parameter)
            found |= {f"weight/{name}": exact, **{f"{key}/{name}": value for key, value in moments.items()}}
        if self.pruning and self.gate_optimizer:
            masks = self.pruning.masks
            for unit, log_alpha in masks.log_alpha.items():
                found |= {f"log_alpha/{unit}": log_alpha, f"pinned/{unit}": masks.pinned[unit]}
                moments = self.gate_optimizer.state.get(log_alpha, {})
                found |= {f"gate_{key}/{unit}": value for key, value in moments.items()}
            if self.pruning.shrinking:
                found |= self.pruning.shrinking.kept()
        return found

    @torch.no_grad()
    def restore(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Become what `facts` and `tensors` told, on a model as it is before training.

        Raises ValueError if they are of another model or other settings.
        """
        self.step, self.sparsity, self.row = facts["step"], facts["sparsity"], facts["row"]
        self.first_loss = facts["first_loss"]
        self.noise.set_state(tensors["noise"])
        self.noise_before = tensors["noise"]
        if self.pruning and self.gate_optimizer:
            self.pruning.lagrangian.restore(facts["constraint"])
            masks = self.pruning.masks
            for unit, log_alpha in masks.log_alpha.items():
                log_alpha.copy_(_found(tensors, f"log_alpha/{unit}", log_alpha))
                masks.pinned[unit] = tensors[f"pinned/{unit}"]
                if moments := _moments(tensors, unit, "gate_"):
                    self.gate_optimizer.state[log_alpha] = moments
            if self.pruning.shrinking:
                self.pruning.shrinking.narrow_to(tensors, self.optimizer)
        for name, parameter in self._named():
            exact = _found(tensors, f"weight/{name}", parameter)
            self.optimizer.take(parameter, exact, _moments(tensors, name))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def _found(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in tensors or tensors[name].shape != like.shape:
        shape = tuple(tensors[name].shape) if name in tensors else "nothing"
        raise ValueError(f"the checkpoint holds {shape} for {name}, expected {tuple(like.shape)}: another model")
    return tensors[name]


def _moments(tensors: dict[str, Tensor], name: str, prefix: str = "") -> dict[str, Tensor]:
    """What Adam keeps of a parameter; nothing if it has had no step."""
    names = {key: f"{prefix}{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
    return {key: tensors[found] for key, found in names.items() if found in tensors}
