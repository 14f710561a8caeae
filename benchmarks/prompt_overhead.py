"""What the collaborative prompt costs an evaluation: seconds with it over seconds without, the two alternating.

python benchmarks/prompt_overhead.py --data-dir my-data     # writes benchmarks/results/prompt_overhead.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from compresso import checkpoint
from compresso.batches import Encoder
from compresso.bridge import PromptedLM, run_task
from compresso.environment import versions
from compresso.prompts import find_prompt
from compresso.tasks import build, plan_tasks, task_manager

RESULT = Path(__file__).parent / "results" / "prompt_overhead.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", nargs="+", default=["piqa", "hellaswag", "boolq"])
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    model, tokenizer = checkpoint.load(given.model, torch.float32)
    manager = task_manager(given.data_dir)
    encoder = Encoder(tokenizer, 0, model.config.max_position_embeddings)
    ids = encoder.tokens_of_prefix(find_prompt("long", "alpaca").before_request())
    rows = []
    for task in plan_tasks(given.tasks, manager, given.data_dir)[0]:
        ratios = []
        for repeat in range(given.repeats + 1):  # the first round warms up
            seconds = []
            for prefix in (None, ids):
                began = time.perf_counter()
                lm = PromptedLM(model, tokenizer, prefix=prefix)  # the prompt is run here, once
                run_task(lm, build(task, manager, prefix is not None), given.limit)
                seconds.append(time.perf_counter() - began)
            if repeat:
                ratios.append(seconds[1] / seconds[0])
        rows.append({"task": task.name, "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)})
        print("{task}: {ratio:.3f} ({min:.3f} to {max:.3f})".format(**rows[-1]), flush=True)
    facts = {"model": given.model, "limit": given.limit, "repeats": given.repeats, "prompt_tokens": len(ids)}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**facts, "rows": rows, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
