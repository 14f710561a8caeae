"""The same quality with and without each of the things that make a step cheap.

python benchmarks/tricks.py              # resumes; writes benchmarks/results/tricks.json

Every variant prunes SmolLM2-135M-Instruct on the demo's data with the same seeds, steps and records a step, and differs
in one thing. What counts is the loss on held-out records and the perplexity right after cutting; what they save is
measured by benchmarks/cost.py.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from compresso import PruneConfig, extract, whole_files
from compresso.methods import METHODS
from compresso.perplexity import mean_loss, perplexity, window_nats
from compresso.prepare import prepare, versions

RESULT = Path(__file__).parent / "results" / "tricks.json"
SETTINGS = {"max_length": 96, "batch_size": 4, "steps": 24, "target_sparsity": 0.2}
PATCHES: dict[str, dict[str, object]] = {
    "as it is": {},
    "the prompt in front of every record": {"compresso.batches.SHARED_PREFIX_FROM": 10**9},
    "adapters computed by peft": {"compresso.adapters._Forward": lambda module: module.forward},
    "attention by torch's fused kernel": {"compresso.train.products": lambda model, cpu: nullcontext()},
    "no shrinking": {"compresso.train.EVERY": 10**9},
}


@contextmanager
def patched(values: dict[str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch(name, value))
        yield


def run(seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(PruneConfig(output=f"{folder}/run", seed=seed, **SETTINGS))
        model, plan = METHODS["l0"](bench)
        with torch.no_grad():
            smaller = extract(model, plan)
        del model
        smaller = smaller.to(torch.bfloat16)
        return {
            "loss": mean_loss(smaller, bench.validation(plan.sparsity)),
            "perplexity": perplexity(window_nats(smaller, bench.windows)),
            "sparsity": plan.sparsity,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    cells = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else []
    for seed in seeds:
        for variant, values in PATCHES.items():
            if any((cell["variant"], cell["seed"]) == (variant, seed) for cell in cells):
                continue
            with patched(values):
                cells.append({"variant": variant, "seed": seed, **run(seed)})
            result = {"settings": SETTINGS, "versions": versions(), "cells": cells}
            whole_files.write(RESULT, f"{json.dumps(result, indent=2)}\n".encode())
            print(cells[-1], flush=True)
    plain = {cell["seed"]: cell for cell in cells if cell["variant"] == "as it is"}
    for variant in PATCHES:
        own = [cell for cell in cells if cell["variant"] == variant]
        loss = [cell["loss"] - plain[cell["seed"]]["loss"] for cell in own]
        nats = [torch.tensor(cell["perplexity"] / plain[cell["seed"]]["perplexity"]).log().item() for cell in own]
        print(
            f"{variant:50} loss {statistics.mean(c['loss'] for c in own):.3f} ({min(loss):+.3f} to {max(loss):+.3f})  "
            f"perplexity {statistics.mean(c['perplexity'] for c in own):.1f} "
            f"({min(nats):+.3f} to {max(nats):+.3f} nats)  "
        )


if __name__ == "__main__":
    main()
