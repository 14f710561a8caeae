"""Two processes against one on the same global batch: what they reach, and how fast.

python benchmarks/processes.py           # writes benchmarks/results/processes.json

One process with two threads, two with one thread each, and two with the weights split over them, on
SmolLM2-135M-Instruct in float32: `compresso prune` as it is, with few steps. Seconds are medians over the steps.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from compresso import load
from compresso.cost import spread
from compresso.environment import versions

RESULT = Path(__file__).parent / "results" / "processes.json"
STEPS, BATCH = 6, 8
SETTINGS = {
    "data": "demo",
    "steps": STEPS,
    "tune": "lora",
    "recover-steps": 0,
    "max-length": 128,
    "validation-records": 8,
    "perplexity-windows": 2,
    "precision": "fp32",
    "device": "cpu",
}
ONE, TWO, SPLIT = "one process, two threads", "two processes, a thread each", "two processes, weights split"


def run(model: Path, output: Path, processes: int, *flags: str) -> dict:
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["--model", str(model), "--output", str(output), "--batch-size", str(BATCH // processes), *flags]
    command = [*launcher, "-m", "compresso.cli", "prune", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows[2:]]
    return {
        "losses": [row["loss"] for row in rows],
        "seconds_a_step": spread(seconds),
        "tokens_per_second": sum(row["tokens"] for row in rows[2:]) / sum(seconds),
        "peak_memory_bytes_of_the_first": json.loads((output / "summary.json").read_text())["peak_memory_bytes"],
    }


def differing(first: Path, second: Path) -> float:
    """Share of the units on which two plans differ."""
    one, two = (load_file(folder / "plan.safetensors") for folder in (first, second))
    units = sum(len(gates) for gates in one.values())
    return sum(int(((one[unit] > 0) != (two[unit] > 0)).sum()) for unit in one) / units


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, tokenizer = load("demo", torch.float32)
        model.save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
        del model
        found = {}
        for name, processes, flags in ((ONE, 1, ["--no-shrink"]), (TWO, 2, ["--no-shrink"]), (SPLIT, 2, ["--sharded"])):
            found[name] = run(folder / "dense", folder / name.replace(" ", "-"), processes, *flags)
            print(name, found[name], flush=True)
        for name in (TWO, SPLIT):
            pairs = list(zip(found[ONE]["losses"], found[name]["losses"], strict=True))
            found[name]["differences_of_the_loss"] = [abs(a - b) for a, b in pairs]
            found[name]["units_on_which_plans_differ"] = differing(
                folder / ONE.replace(" ", "-"), folder / name.replace(" ", "-")
            )
    result = {"steps": STEPS, "global_batch": BATCH, "runs": found, "versions": versions()}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for name in (TWO, SPLIT):
        print(name, {key: value for key, value in found[name].items() if key != "losses"})


if __name__ == "__main__":
    main()
