"""The sparsity constraint: its schedule, its two multipliers, and how they move log_alpha.

The penalty is that of Compresso (arXiv 2310.05015, equation 5),

    lambda_1 (s - t) + lambda_2 (s - t)^2,        s expected sparsity, t its target.

In the published code its gradient is added to the task's and passes through one Adam. What
it does then depends on the noise of the task, on how saturated the gates are and on the
number of steps; with its step sizes it takes thousands of steps to act at all, and lambda_2
can only grow. Here the penalty has a step of its own after the task's:

- its direction is the sign of its gradient, which is what Adam would make of it: every
  gate the same way;
- its length comes from a line search, such that a pressure of 0.01 moves s by 0.01. With
  the gain known, lambda_2 = 1/2 is the value that closes a gap in one step;
- lambda_1 ascends on what is left of the gap after that.

So the constraint holds at every step, in 60 steps as in 60,000 (LOG.md, 2026-11-22).
"""

from dataclasses import dataclass

import torch

from compresso import hard_concrete
from compresso.masks import Masks
from compresso.shape import sparsity

ASCENT = 0.1  # step size of lambda_1
LAMBDA_2 = 0.5  # (s - t) - 2 lambda_2 (s - t) = 0
OPEN_START = 6.0  # log_alpha at which a gate is closed once in 2,000 draws
SEARCH, PRECISION = 40, 1e-9  # of the line search: evaluations, and sparsity


@dataclass(frozen=True)
class Schedule:
    """The phases of a pruning run, in optimizer steps, and the target at each step."""

    steps: int
    lora_only: int
    ramp: int
    target_sparsity: float
    form: str = "linear"
    """`linear`, or `cubic`: fast first, slow near the target."""

    def phase(self, step: int) -> str:
        if step < self.lora_only:
            return "lora"
        return "ramp" if step < self.lora_only + self.ramp else "hold"

    def target(self, step: int, start: float) -> float:
        """Expected sparsity wanted after this step (from 0); it rises from `start`."""
        progress = min(1.0, max(0.0, (step - self.lora_only + 1) / max(self.ramp, 1)))
        if self.form == "cubic":
            progress = 1 - (1 - progress) ** 3
        return start + (self.target_sparsity - start) * progress


def make_schedule(steps: int, lora_only: float, hold: float, target_sparsity: float, form: str) -> Schedule:
    """Turn shares of the steps into steps."""
    before, after = int(steps * lora_only), int(steps * hold)
    return Schedule(steps, before, steps - before - after, target_sparsity, form)


def initial_log_alpha(unit: str, target_sparsity: float) -> float:
    """Where the gates of a kind start.

    Groups and channels: 5 % expected to be closed, or a quarter of a smaller target. The
    published 4.6 closes 0.2 %, but there P(gate > 0) and the gates are so flat that hardly
    a unit gets a gradient. Hidden channels and whole sub-layers, each of which the whole
    network feels, start at the open end.
    """
    if unit in ("hidden", "attention", "mlp"):
        return OPEN_START
    closed = torch.tensor(min(0.05, target_sparsity / 4), dtype=torch.float64)
    zero = hard_concrete.prob_zero(torch.zeros((), dtype=torch.float64))
    return float(torch.logit(zero) - torch.logit(closed))


class Lagrangian:
    """The multipliers. `step` is called after each optimizer step of the masks."""

    def __init__(self, schedule: Schedule, masks: Masks):
        self.schedule = schedule
        self.lambda_1 = 0.0
        self.lambda_2 = LAMBDA_2
        self.start = min(float(masks.expected_sparsity().detach()), schedule.target_sparsity)
        self.floor = 0.0
        """Expected sparsity below which gates are not moved, since some units were closed for good."""

    def target_after(self, steps: int) -> float:
        """The target of the last of so many steps; 0 while no gate acts."""
        return self.schedule.target(steps - 1, self.start) if steps > self.schedule.lora_only else 0.0

    def state(self) -> dict[str, float]:
        return {"lambda_1": self.lambda_1, "start": self.start, "floor": self.floor}

    def restore(self, state: dict[str, float]) -> None:
        self.lambda_1, self.start, self.floor = state["lambda_1"], state["start"], state.get("floor", 0.0)

    @torch.no_grad()
    def wait_here(self, masks: Masks) -> None:
        """Let the target reach what is expected to go now before the penalty acts again.

        Called when units have been closed for good: those that are left would have to open as far as these were open
        before, most of them up to the limit, where they forget which matters more.
        """
        self.floor = min(float(masks.expected_sparsity()), self.schedule.target_sparsity)

    @torch.no_grad()
    def step(self, masks: Masks, step: int) -> tuple[float, float]:
        """Let the penalty move the gates, then ascend on lambda_1.

        Returns the expected sparsity reached and its target.
        """
        scheduled = self.schedule.target(step, self.start)
        target = max(scheduled, self.floor)
        before = float(masks.expected_sparsity())
        shift(masks, before - self.lambda_1 - 2 * self.lambda_2 * (before - target))
        reached = float(masks.expected_sparsity())
        self.lambda_1 += ASCENT * (reached - target)
        return reached, scheduled


@torch.no_grad()
def shift(masks: Masks, wanted: float) -> None:
    """Move every log_alpha by the same amount, within its limits, until the expected sparsity is as wanted.

    A bracket is widened until it holds the answer, then narrowed by false position
    (the Illinois variant); the expected sparsity rises with the shift. Nothing moves if
    less is wanted than goes with all of them open, where they would all be alike.
    """
    flat = {unit: a.double() for unit, a in masks.log_alpha.items()}

    def moved(by: float) -> dict[str, torch.Tensor]:
        return {unit: masks.limited(unit, a - by) for unit, a in flat.items()}

    def gap(by: float) -> float:
        probabilities = {unit: hard_concrete.prob_open(a) for unit, a in moved(by).items()}
        return float(sparsity(masks.shape, probabilities)) - wanted

    low, low_gap = 0.0, gap(0.0)
    direction, reach = (-1.0 if low_gap > 0 else 1.0), 0.05
    high, high_gap = low, low_gap
    while low_gap * high_gap > 0 and reach < 4 * hard_concrete.LIMIT:
        low, low_gap = high, high_gap
        high = direction * reach
        high_gap = gap(high)
        reach *= 2
    if low_gap > 0 and high_gap > PRECISION:
        return
    for _ in range(SEARCH):
        if abs(high_gap) < PRECISION or low_gap * high_gap > 0:
            break
        middle = (low * high_gap - high * low_gap) / (high_gap - low_gap)
        middle_gap = gap(middle)
        if middle_gap * high_gap < 0:
            low, low_gap = high, high_gap
        else:
            low_gap /= 2
        high, high_gap = middle, middle_gap
    for unit, a in moved(high).items():
        masks.log_alpha[unit].copy_(a)
