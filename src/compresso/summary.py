"""The table that a run ends with, from the contents of summary.json."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Print before and after, the checks, and the answers."""
    removed, target = 100 * summary["sparsity"], 100 * summary["target_sparsity"]
    table = Table(title=f"{summary['model']}: {removed:.2f}% removed (target {target:g}%)")
    table.add_column("")
    for column in ("before", "after cutting", "after recovery", "change"):
        table.add_column(column, justify="right")

    def counted(name: str, values: dict[str, int], unit: float, suffix: str) -> None:
        change = values["after"] / values["before"] - 1
        after = f"{values['after'] / unit:.1f}{suffix}"
        table.add_row(name, f"{values['before'] / unit:.1f}{suffix}", after, after, f"{100 * change:+.1f}%")

    counted("parameters", summary["parameters"], 1e6, " M")
    counted("prunable parameters", summary["prunable_parameters"], 1e6, " M")
    if summary.get("vocabulary"):
        counted("tokens of the vocabulary", summary["vocabulary"]["tokens"], 1e3, " k")
    counted("weights on disk", summary["bytes"], 1e6, " MB")
    for name, key in (
        ("loss, held-out records", "loss"),
        (f"perplexity, {summary['perplexity_window']}-token windows", "perplexity"),
    ):
        dense, cut, recovered = (summary[key][stage] for stage in ("dense", "cut", "recovered"))
        table.add_row(name, f"{dense:.3f}", f"{cut:.3f}", f"{recovered:.3f}", f"{100 * (recovered / dense - 1):+.1f}%")
    for kind in ("prefill", "decode") if "cost" in summary else ():
        before, after = (summary["cost"][stage][f"{kind}_tokens_per_second"]["median"] for stage in ("before", "after"))
        table.add_row(
            f"tokens/s, {kind}",
            f"{before:,.0f}",
            f"{after:,.0f}",
            f"{after:,.0f}",
            f"{100 * (after / before - 1):+.1f}%",
        )
    console.print(table)
    checks = ", ".join(f"{name.replace('_', ' ')} {value:.1e}" for name, value in summary["logit_differences"].items())
    console.print(f"largest logit difference: {checks}", markup=False)
    if summary.get("vocabulary"):
        console.print("loss and perplexity are per token of the smaller vocabulary, before and after")
    answers = Table(title=Text(f"“{summary['sample']['question']}”"), show_lines=True)
    answers.add_column("dense", ratio=1)
    answers.add_column("pruned and recovered", ratio=1)
    answers.add_row(Text(summary["sample"]["dense"]), Text(summary["sample"]["recovered"]))
    console.print(answers)
    minutes = summary["seconds"] / 60
    memory = summary["peak_memory_bytes"] / 2**30
    console.print(
        f"{minutes:.1f} minutes, {memory:.1f} GiB at most. The model is in {folder / 'model'}; ask it something:"
    )
    console.print(f'  compresso chat {folder} --message "{summary["sample"]["question"]}"', markup=False)
