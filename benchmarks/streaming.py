"""Memory that `compresso extract` needs for a checkpoint of S bytes: the peak of its process, and as a share of S.

python benchmarks/streaming.py               # a random checkpoint of 8 GB; needs 16 GB of disk in the temporary folder

The target is a quarter of S. Writes benchmarks/results/streaming.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from compresso import Plan, checkpoint, describe
from compresso import plan as plans
from compresso.environment import versions
from compresso.streamed import shapes_of, write_shards

RESULT = Path(__file__).parent / "results" / "streaming.json"
PEAK = "from compresso.cost import resident; print(resident('VmHWM'))"  # getrusage would tell of this process too
EXTRACT = f"import sys; from compresso.streamed import extract_files; extract_files(*sys.argv[1:]); {PEAK}"


def peak_of(code: str, *words: str) -> int:
    """Largest resident memory of a process of its own, in bytes."""
    done = subprocess.run([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    given = parser.parse_args()
    _, tokenizer = checkpoint.load("demo")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=given.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
    )
    generator = torch.Generator().manual_seed(0)
    model = shapes_of(config)
    with tempfile.TemporaryDirectory() as place:
        old, run, new = Path(place) / "old", Path(place) / "run", Path(place) / "new"
        old.mkdir()
        run.mkdir()
        config.save_pretrained(old)
        tokenizer.save_pretrained(old)
        weights = (
            (n, torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02)) for n, p in model.named_parameters()
        )
        write_shards(old, model, weights, lambda: None)
        shape = describe(model)
        shares = {"kv_group": 0.75, "intermediate": 0.75, "hidden": 0.9}
        gates = {u: (torch.rand(sum(shape.sizes(u)), generator=generator) < s).double() for u, s in shares.items()}
        plans.save(Plan(shape, gates), run, {})
        before = checkpoint.weight_bytes(old)
        began = time.perf_counter()
        peak = peak_of(EXTRACT, str(old), str(run), str(new))
        result = {
            "bytes_before": before,
            "bytes_after": checkpoint.weight_bytes(new),
            "peak_bytes": peak,
            "peak_of_imports_bytes": peak_of(f"import compresso.streamed; {PEAK}"),
            "peak_share": peak / before,
            "seconds": time.perf_counter() - began,
            "versions": versions(),
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print("{bytes_before:,} bytes -> {bytes_after:,}; peak {peak_bytes:,} = {peak_share:.3f} of it".format(**result))


if __name__ == "__main__":
    main()
