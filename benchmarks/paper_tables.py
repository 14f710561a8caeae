"""The layout of the paper's Tables 5, 6 and 7 (arXiv 2310.05015), filled from evaluations of your own runs.

python benchmarks/paper_tables.py runs/*/eval*.json

Rows are the averages that the paper reports: commonsense, reading, MMLU, BBH. Table 5 has a column for each
training data set, Table 6 for training and inference with and without the prompt, Table 7 for runs before
and after recovery. A column appears for each model of the files that fits; figures that were not measured are "-".

To fill them: `compresso prune` with other --data, --prompt or --recover-steps, then for each run
`compresso evaluate RUN RUN/cut --suite paper`, and `... --prompt none --output RUN/eval-none.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROWS = ("commonsense", "reading", "mmlu", "bbh")
Cell = tuple[float, float | None]
Column = dict[str, Any]


def columns_of(paths: list[Path]) -> list[Column]:
    """One column a model and way of asking it: what it was trained on and with, and its four figures."""
    columns = []
    for path in paths:
        found = json.loads(path.read_text())
        for name, about in found["models"].items():
            results, averages = found["results"].get(name, {}), found["averages"].get(name, {})
            cells = {row: averages.get(row) or results.get(row) for row in ROWS}
            asked = {e["prompt"] for e in results.values() if e["metric"] != "perplexity"}
            if not any(cells.values()):
                continue
            columns.append(
                {
                    "name": name,
                    "sparsity": about["sparsity"],
                    "stage": about["stage"],
                    "data": about["trained_data"],
                    "trained": about["trained_prompt"] or "none",
                    "asked": "/".join(sorted(asked)),
                    "cells": {row: (cell["value"], cell["stderr"]) for row, cell in cells.items() if cell},
                }
            )
    return columns


def shown(cell: Cell | None, reference: Cell | None = None) -> str:
    if cell is None:
        return "-"
    text = f"{100 * cell[0]:.2f}" + ("" if cell[1] is None else f" ±{100 * cell[1]:.2f}")
    return text if reference is None else f"{text} ({100 * (cell[0] - reference[0]):+.2f})"


def table(title: str, columns: list[tuple[str, Column, Column | None]]) -> str:
    """Markdown: a row for each figure; each column with, if there is one, its difference from a reference."""
    lines = [f"**{title}**", ""]
    if not columns:
        return "\n".join([*lines, "no run fits"])
    lines += ["| | " + " | ".join(heading for heading, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in ROWS:
        cells = [shown(c["cells"].get(row), r["cells"].get(row) if r else None) for _, c, r in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(columns: list[Column]) -> list[str]:
    recovered = [c for c in columns if c["stage"] == "recovered"]
    own = [c for c in recovered if c["asked"] == c["trained"]]
    reference = {(c["sparsity"], c["data"]): c for c in own if c["trained"] != "none"}
    by_name = {c["name"]: c for c in own}

    def size(column: Column) -> str:
        return f"{100 * column['sparsity']:.0f} %"

    data = [(f"{c['data'] or 'default'}, {size(c)}", c, None) for c in own if c["trained"] != "none"]
    prompt = []
    for c in recovered:
        full = reference.get((c["sparsity"], c["data"]))
        heading = f"{size(c)}, trained with {c['trained']}, asked with {c['asked']}"
        prompt.append((heading, c, full if full is not c else None))
    steps = []
    for c in columns:
        after = by_name.get(c["name"].rstrip("/").removesuffix("/cut"))
        if c["stage"] == "cut" and after is not None and c["asked"] == after["asked"]:
            steps += [(f"{size(c)}, recovered", after, None), (f"{size(c)}, before recovery", c, after)]
    return [
        table("Table 5: training data", data),
        table("Table 6: the prompt in training and at inference", prompt),
        table("Table 7: without recovery", steps),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="eval.json files of compresso evaluate")
    print("\n\n".join(tables(columns_of(parser.parse_args().files))))


if __name__ == "__main__":
    main()
