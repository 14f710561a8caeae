"""Two thousand steps: does memory or the number of open files grow, and is a row of metrics lost?

python benchmarks/soak.py                    # writes benchmarks/results/soak.json; some minutes
python benchmarks/soak.py --steps 20000

A tiny random Llama is pruned, with a checkpoint every second. Memory and open files of the process are read four times
a second; what they gain from the second quarter of the run to the last is given, with their spread within a quarter.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import compresso
from compresso import whole_files
from compresso.environment import versions
from tiny import QUICK, tiny_model, tiny_tokenizer, write_records

RESULT = Path(__file__).parent / "results" / "soak.json"


def watch(samples: list[tuple[int, int]], ended: threading.Event) -> None:
    """Append bytes of resident memory and the number of open files until the end."""
    process = psutil.Process()
    while not ended.wait(0.25):
        samples.append((process.memory_info().rss, process.num_fds()))


def growth(values: list[int]) -> dict[str, float]:
    """Median of the last quarter less that of the second, and the spread (standard deviation) of the second."""
    quarter = len(values) // 4
    second, last = values[quarter : 2 * quarter], values[-quarter:]
    return {
        "median": statistics.median(second),
        "growth": statistics.median(last) - statistics.median(second),
        "spread": statistics.stdev(second),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    samples: list[tuple[int, int]] = []
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tiny_model("llama", max_position_embeddings=512).save_pretrained("dense")
        tiny_tokenizer().save_pretrained("dense")
        records = write_records(Path("records.jsonl"))
        settings = {**QUICK, "steps": given.steps, "recover_steps": 0, "checkpoint_seconds": 1.0, "shrink": False}
        watcher = threading.Thread(target=watch, args=(samples, ended))
        watcher.start()
        began = time.perf_counter()
        try:
            summary = compresso.prune(model="dense", data=str(records), output="run", **settings)
        finally:
            ended.set()
            watcher.join()
        seconds = time.perf_counter() - began
        steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    result = {
        "steps": given.steps,
        "seconds": seconds,
        "rows_complete": steps == list(range(1, given.steps + 1)),
        "checkpoints": summary["checkpoints"],
        "memory_bytes": growth([memory for memory, _ in samples]),
        "open_files": growth([files for _, files in samples]),
        "versions": versions(),
    }
    whole_files.write(RESULT, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
