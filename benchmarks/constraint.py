"""How close the expected sparsity is to its target at the end of runs of 60 to 60,000 steps, on a noisy toy task.

python benchmarks/constraint.py                     # minutes; prints a table
"""

import torch

from compresso.lagrangian import Lagrangian, initial_log_alpha, make_schedule
from compresso.masks import Masks
from compresso.shape import LayerShape, ModelShape
from compresso.train import gate_learning_rate

SHAPE = ModelShape(40, 3, (LayerShape(4, 2, 8, 100),) * 6)
UNITS = ("kv_group", "intermediate", "hidden")


def toy_run(steps: int, target: float, units=UNITS, form="linear") -> tuple[list[tuple[str, float, float]], Masks]:
    """A noisy task that wants every unit open, some much more than others."""
    torch.manual_seed(0)
    schedule = make_schedule(steps, 0.1, 0.35, target, form)
    masks = Masks(SHAPE, {unit: initial_log_alpha(unit, target) for unit in units})
    lagrangian = Lagrangian(schedule, masks)
    optimizer = torch.optim.Adam(masks.parameters(), lr=gate_learning_rate(steps - schedule.lora_only))
    noise = torch.Generator().manual_seed(0)
    worth = {unit: torch.rand(a.shape) ** 4 for unit, a in masks.log_alpha.items()}
    rows = []
    for step in range(schedule.lora_only, steps):
        z = masks.sample(noise)
        loss = sum((w * (1 - z[u]) ** 2).sum() + (0.3 * torch.randn(z[u].shape) * z[u]).sum() for u, w in worth.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        masks.clamp()
        rows.append((schedule.phase(step), *lagrangian.step(masks, step)))
    return rows, masks


def worst_in_hold(steps: int, target: float) -> float:
    """Largest distance from the target over the hold phase."""
    return max(abs(reached - wanted) for phase, reached, wanted in toy_run(steps, target)[0] if phase == "hold")


def main() -> None:
    torch.set_num_threads(1)
    for steps in (60, 600, 6_000, 60_000):
        for target in (0.2,) if steps == 60_000 else (0.05, 0.2, 0.5, 0.8):
            points = 100 * worst_in_hold(steps, target)
            print(f"{steps:6d} steps, target {target:.2f}: at most {points:.5f} points off in the hold", flush=True)


if __name__ == "__main__":
    main()
