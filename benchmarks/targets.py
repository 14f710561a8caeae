"""Expected and real sparsity against the target, in short runs on the demo's model.

python benchmarks/targets.py --steps 20             # writes benchmarks/results/targets.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import compresso

RESULT = Path(__file__).parent / "results" / "targets.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    given = parser.parse_args()
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for target in given.targets:
        if any((row["target"], row["steps"]) == (target, given.steps) for row in rows):
            continue  # measured already
        with tempfile.TemporaryDirectory() as folder:
            summary = compresso.prune(
                output=f"{folder}/run",
                target_sparsity=target,
                steps=given.steps,
                recover_steps=0,
                max_length=64,
                batch_size=4,
                validation_records=8,
                perplexity_windows=4,
            )
            last = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        rows.append(
            {
                "target": target,
                "steps": given.steps,
                "expected": last["expected_sparsity"],
                "real": summary["sparsity"],
                "max_logit_difference": summary["max_logit_difference"],
                "seconds": summary["seconds"],
            }
        )
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"seed": 0, "rows": rows, "versions": summary["versions"]}, indent=2) + "\n")
    for row in rows:
        print(
            f"target {row['target']:.2f}  expected {row['expected']:.4f}  real {row['real']:.4f}  {row['steps']} steps"
        )


if __name__ == "__main__":
    main()
