"""The same model and documents by `compresso evaluate` and by lm-eval's own `hf` model: are the figures equal?

python benchmarks/against_lm_eval.py --data-dir my-data     # writes benchmarks/results/against_lm_eval.json

lm-eval loads the checkpoint by itself, with dtype=float32 and its defaults; it gets its own task files with nothing
changed but where the documents are. It resumes: what is in the result is not measured again.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import lm_eval
import torch

import compresso
from compresso import checkpoint
from compresso.environment import versions
from compresso.suites import SUITES
from compresso.tasks import build, plan_tasks, task_manager

RESULT = Path(__file__).parent / "results" / "against_lm_eval.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=[*SUITES["commonsense"], *SUITES["reading"], "mmlu_anatomy"])
    parser.add_argument("--limit", type=int, default=20)
    given = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    manager = task_manager(given.data_dir)
    with tempfile.TemporaryDirectory() as place:
        model, tokenizer = checkpoint.load("demo", torch.float32)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        ours = compresso.evaluate(
            place,
            suite=",".join(given.tasks),
            data_dir=str(given.data_dir),
            limit=given.limit,
            precision="fp32",
            prompt="none",
            cost=False,
            output=f"{place}/eval.json",
        )["results"][place]
        for wanted in plan_tasks(given.tasks, manager, given.data_dir)[0]:
            if any((row["task"], row["limit"]) == (wanted.name, given.limit) for row in rows):
                continue
            theirs = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": place, "dtype": "float32"},
                tasks=[build(wanted, manager, False)],
                batch_size=8,
                limit=given.limit,
                device="cpu",
            )["results"][wanted.registered]
            entry = ours[wanted.name]
            for metric, found in entry["metrics"].items():
                row = {"task": wanted.name, "limit": given.limit, "n": entry["n"], "metric": metric}
                row |= {"compresso": found["value"], "lm_eval": theirs[f"{metric},none"]}
                row |= {"stderr": found["stderr"], "lm_eval_stderr": theirs[f"{metric}_stderr,none"]}
                rows.append(row)
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=2) + "\n")
    for row in rows:
        print("{task:16} {metric:9} n {n:4}  compresso {compresso:.4f}  lm-eval {lm_eval:.4f}".format(**row))
    unequal = [row["task"] for row in rows if abs(row["compresso"] - row["lm_eval"]) > 1e-9]
    print(
        f"{len(rows) - len(unequal)} of {len(rows)} figures are equal{': not ' + ', '.join(unequal) if unequal else ''}"
    )


if __name__ == "__main__":
    main()
