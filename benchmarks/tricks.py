"""The same quality with and without each of the things that make a step cheap.

python benchmarks/tricks.py              # resumes; writes benchmarks/results/tricks.json

Every variant prunes SmolLM2-135M-Instruct on the demo's data with the same seeds, steps and records a step, and differs
in one thing; gates all start at one value, and a unit is cut early when its gate is open in less than a tenth of draws,
unless the variant says otherwise. What counts is the loss on held-out records and the perplexity right after cutting;
what they save is measured by benchmarks/cost.py.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from compresso import PruneConfig, extract, whole_files
from compresso.environment import versions
from compresso.methods import METHODS
from compresso.perplexity import mean_loss, perplexity, window_nats
from compresso.prepare import prepare
from compresso.shrink import Shrinking

RESULT = Path(__file__).parent / "results" / "tricks.json"
PATCHES: dict[str, dict[str, object]] = {
    "as it is": {},
    "the prompt in front of every record": {"compresso.batches.SHARED_PREFIX_FROM": 10**9},
    "adapters computed by peft": {"compresso.adapters._Forward": lambda module: module.forward},
    "attention by torch's fused kernel": {"compresso.train.products": lambda model, cpu: nullcontext()},
    "no shrinking": {"compresso.train.EVERY": 10**9},
    "shrinking by a bound of 0.5": {"compresso.shrink.RARELY_OPEN": 0.5},
}
RECORDS = {"prompt": "long", "max_length": 96, "batch_size": 4, "warm_start": False, "tune": "lora"}
RUNS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "short": ({**RECORDS, "steps": 24, "target_sparsity": 0.2}, tuple(PATCHES)[:5]),
    "long": ({**RECORDS, "steps": 80, "target_sparsity": 0.5}, ("as it is", *tuple(PATCHES)[3:])),
}
"""Settings of a run, and the variants that it is made with. Gates are decided enough to be cut in the long one only."""


@contextmanager
def patched(values: dict[str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch(name, value))
        yield


def run(settings: dict[str, object], seed: int) -> dict[str, float]:
    left: list[float] = []
    restore = Shrinking.restore

    def counted(shrinking: Shrinking) -> None:
        left.append(count_parameters(shrinking._layers))
        restore(shrinking)

    with tempfile.TemporaryDirectory() as folder, patch.object(Shrinking, "restore", counted):
        bench = prepare(PruneConfig(output=f"{folder}/run", seed=seed, **settings))
        model, plan = METHODS["l0"](bench)
        whole = count_parameters(bench.model.model.layers)
        with torch.no_grad():
            smaller = extract(model, plan)
        del model
        smaller = smaller.to(torch.bfloat16)
        return {
            "loss": mean_loss(smaller, bench.validation(plan.sparsity)),
            "perplexity": perplexity(window_nats(smaller, bench.windows)),
            "sparsity": plan.sparsity,
            "cut_in_training": 1 - left[0] / whole,
        }


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    cells = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else []
    for length, (settings, variants) in RUNS.items():
        for seed, variant in itertools.product(seeds, variants):
            if any((cell["run"], cell["variant"], cell["seed"]) == (length, variant, seed) for cell in cells):
                continue
            with patched({"compresso.shrink.RARELY_OPEN": 0.1} | PATCHES[variant]):
                cells.append({"run": length, "variant": variant, "seed": seed, **run(settings, seed)})
            result = {"settings": {n: s for n, (s, _) in RUNS.items()}, "versions": versions(), "cells": cells}
            whole_files.write(RESULT, f"{json.dumps(result, indent=2)}\n".encode())
            print(cells[-1], flush=True)


if __name__ == "__main__":
    main()
