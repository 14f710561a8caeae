"""Write the README's tables from committed results: benchmarks/results/demo.json and evaluation.json.

python benchmarks/readme_results.py                                         # README.md from the results
python benchmarks/readme_results.py --run runs/demo --eval runs/demo/eval.json   # the results from a run first
"""

import argparse
import json
from pathlib import Path
from typing import Any

from compresso import eval_table

ROOT = Path(__file__).parent.parent
DEMO, EVALUATION = (Path(__file__).parent / "results" / name for name in ("demo.json", "evaluation.json"))
STAGES = ("dense", "cut", "recovered")


def demo_table(summary: dict[str, Any]) -> str:
    """Before and after of a run, from its summary.json."""
    before, after = "before", "after"

    def counted(key: str, unit: float, suffix: str) -> str:
        values = summary[key]
        change = 100 * (values[after] / values[before] - 1)
        smaller = f"{values[after] / unit:.1f} {suffix}"
        return f"{values[before] / unit:.1f} {suffix} | {smaller} | {smaller} ({change:+.1f} %)"

    def measured(key: str, digits: int) -> str:
        return " | ".join(f"{summary[key][stage]:.{digits}f}" for stage in STAGES)

    def speed(key: str) -> str:
        dense, pruned = (
            "{:.0f} ({:.0f} to {:.0f})".format(*(summary["cost"][stage][key][end] for end in ("median", "min", "max")))
            for stage in (before, after)
        )
        return f"{dense} | {pruned} |"

    rows = [
        ("parameters", counted("parameters", 1e6, "M")),
        ("prunable parameters", counted("prunable_parameters", 1e6, "M")),
        ("weights on disk", counted("bytes", 1e6, "MB")),
        ("loss on held-out records", measured("loss", 2)),
        (f"perplexity, Wikipedia, {summary['perplexity_window']}-token windows", measured("perplexity", 1)),
        ("tokens/s, prefill of 256, batch 1", speed("prefill_tokens_per_second")),
        ("tokens/s, decode, batch 1", speed("decode_tokens_per_second")),
        ("largest logit difference, gated to extracted to reloaded", f"| {summary['max_logit_difference']:.0e} |"),
    ]
    lines = ["| | dense | after cutting | after recovery |", "|---|---|---|---|"]
    lines += [f"| {name} | {cells} |" for name, cells in rows]
    versions = summary["versions"]
    conditions = (
        f"Seed {summary['seed']}, torch {versions['torch']}, transformers {versions['transformers']}; one run, "
        f"{summary['seconds'] / 60:.0f} minutes, {summary['peak_memory_bytes'] / 1e9:.1f} GB at most; speeds as median "
        "(smallest to largest)."
    )
    return "\n".join([*lines, "", conditions])


def sections() -> dict[str, str]:
    """The generated parts of the README, by name."""
    return {
        "demo": demo_table(json.loads(DEMO.read_text())),
        "evaluation": eval_table.markdown(json.loads(EVALUATION.read_text())),
    }


def filled(readme: str) -> str:
    """The README with its generated parts replaced. Raises ValueError if a mark is missing."""
    for name, text in sections().items():
        begin, end = f"<!-- {name}: written by benchmarks/readme_results.py -->", f"<!-- /{name} -->"
        head, found, rest = readme.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md has no {begin} ... {end}")
        readme = f"{head}{begin}\n\n{text}\n\n{end}{tail}"
    return readme


def without_scores(found: dict[str, Any]) -> dict[str, Any]:
    """Figures without the scores of single documents and without parts of groups, small enough to commit."""
    for results in found["results"].values():
        for task in [task for task, entry in results.items() if entry.get("group")]:
            del results[task]
        for entry in results.values():
            for metric in entry["metrics"].values():
                metric.pop("scores", None)
    shown = {task for part in ("results", "averages") for tasks in found[part].values() for task in tasks}
    found["comparisons"] = [row for row in found["comparisons"] if row["task"] in shown]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--eval", type=Path)
    given = parser.parse_args()
    if given.run:
        DEMO.write_text((given.run / "summary.json").read_text())
    if given.eval:
        EVALUATION.write_text(json.dumps(without_scores(json.loads(given.eval.read_text())), indent=1) + "\n")
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
