"""What equal widths cost: layers free, equally wide while gates learn, and made equal afterwards.

python benchmarks/widths.py --data records.jsonl --data-dir my-data

SmolLM2-135M-Instruct, as many parameters and as many operations in each row, right after cutting, as
benchmarks/quality.py measures. It resumes.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

from quality import COMMON, OURS, Lab

import compresso
from compresso import progress, whole_files
from compresso.environment import versions
from compresso.masks import Masks

RESULT = Path(__file__).parent / "results" / "widths.json"
ROWS = ("free", "uniform", "uniform afterwards")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records, a .jsonl file")
    parser.add_argument("--data-dir", type=Path, required=True, help="texts, as for compresso evaluate")
    parser.add_argument("--work", type=Path, default=Path("runs/widths"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    lab = Lab(given)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    result["versions"] = versions()
    for seed in range(given.seeds):
        for row in ROWS:
            key = {"row": row, "sparsity": given.sparsity, "steps": given.steps, "seed": seed}
            if not any(key.items() <= done.items() for done in result["rows"]):
                result["rows"].append({**key, **_measure(lab, given, row, seed)})
                whole_files.write(RESULT, f"{json.dumps(result, indent=2)}\n".encode())
    for done in result["rows"]:
        print(" ".join(f"{done[name]:>18}" if isinstance(done[name], str) else f"{done[name]:10.4g}" for name in done))


def _measure(lab: Lab, given: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    folder = given.work / f"{row.replace(' ', '-')}-{given.sparsity:g}-{given.steps}-{seed}"
    settings = {**COMMON, **OURS, "model": "demo", "data": str(lab.train), "output": str(folder), "overwrite": True}
    settings |= {"shape": row.split()[0], "steps": given.steps, "recover_steps": 0, "seed": seed}
    leave = mock.patch.object(Masks, "level", return_value=None) if "afterwards" in row else mock.patch.dict({})
    if (folder / "progress.json").exists() and progress.read(folder).done:
        summary = json.loads((folder / "summary.json").read_text())
    else:
        with leave:
            summary = compresso.prune(**settings, target_sparsity=given.sparsity)
    figures = lab.measure_folder(folder / "model", summary)
    return {"parameters": figures["parameters"], "prunable_sparsity": summary["sparsity"]} | {
        name: figures[name] for name in ("instruction_loss", "wikitext2_ppl", "c4_ppl")
    }


if __name__ == "__main__":
    main()
