"""What gates add to the time of a training step: LoRA alone against LoRA with all gates, alternating, same batches.

python benchmarks/gate_overhead.py --repeats 8      # writes benchmarks/results/gate_overhead.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from compresso import PruneConfig
from compresso.adapters import add_lora, inside
from compresso.lagrangian import Lagrangian, initial_log_alpha, make_schedule
from compresso.masks import Gates, Masks
from compresso.prepare import prepare
from compresso.shape import describe
from compresso.train import target_loss

RESULT = Path(__file__).parent / "results" / "gate_overhead.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=8)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        config = PruneConfig(output=f"{folder}/run", max_length=128)
        bench = prepare(config)
    model = inside(add_lora(bench.model, config, 0))
    shape = describe(model)
    masks = Masks(shape, {unit: initial_log_alpha(unit, 0.2) for unit in config.gates})
    gates, noise = Gates(model, shape), torch.Generator().manual_seed(0)
    lagrangian = Lagrangian(make_schedule(1000, 0.0, 0.3, 0.2, "linear"), masks)
    lora = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    alphas = torch.optim.Adam(masks.parameters(), lr=0.01)
    next_batches = bench.batches(0)
    model.train()

    def step(batch, gating: bool) -> float:
        began = time.perf_counter()
        gates.set(masks.sample(noise)) if gating else gates.open()
        (target_loss(model, batch) / batch.targets).backward()
        lora.step()
        lora.zero_grad()
        if gating:
            alphas.step()
            alphas.zero_grad()
            lagrangian.step(masks, 0)
        return time.perf_counter() - began

    ratios = []
    for repeat in range(repeats + 1):
        (batch,) = next_batches(0.0)
        order = (False, True) if repeat % 2 else (True, False)
        seconds = {gating: step(batch, gating) for gating in order}
        if repeat:  # the first warms up
            ratios.append(seconds[True] / seconds[False])
            print(f"LoRA {seconds[False]:.2f} s, with gates {seconds[True]:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    result = {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "repeats": repeats}
    result |= {"units": list(config.gates), "batch_size": config.batch_size, "torch": torch.__version__}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(result)


if __name__ == "__main__":
    main()
