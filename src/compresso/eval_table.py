"""The tables of eval.json, for a terminal and as Markdown."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def _shown(entry: dict[str, Any] | None) -> str:
    """A figure with its standard error: shares in percent."""
    if entry is None or entry["value"] is None:
        return "-"
    scale, digits = (1, 2) if entry["metric"] == "perplexity" else (100, 1)
    if entry["metric"] != "perplexity" and not 0 <= entry["value"] <= 1:
        scale, digits = 1, 3
    error = "" if entry["stderr"] is None else f" ±{scale * entry['stderr']:.{digits}f}"
    return f"{scale * entry['value']:.{digits}f}{error}"


def line(model: str, task: str, entry: dict[str, Any]) -> str:
    """One figure in a line of a log."""
    return f"{model}  {task}  {entry['metric']} {_shown(entry)}  n={entry['n']}  {entry['seconds']} s"


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of all figures: a heading, then a row a task; parts of groups are left out."""
    models = list(found["models"])
    others = models[1:]
    table = [["task", "measured", *models, *(f"{b} against {models[0]} [95 %], p" for b in others)]]
    for task in dict.fromkeys(task for name in models for task in shown_tasks(found["results"][name])):
        entries = [found["results"][name].get(task) for name in models]
        differences = [_difference_shown(found, b, task) for b in others]
        table.append([task, _measured([e for e in entries if e]), *map(_shown, entries), *differences])
    for suite in dict.fromkeys(suite for averages in found["averages"].values() for suite in averages):
        means = [found["averages"][name].get(suite) for name in models]
        metric = _measured_mean([mean for mean in means if mean])
        differences = [_difference_shown(found, b, suite) for b in others]
        table.append([f"mean of {suite}", metric, *map(_shown, means), *differences])
    return table


def shown_tasks(results: dict[str, Any]) -> list[str]:
    """All but the parts of a group that has a figure."""
    return [task for task, entry in results.items() if not entry.get("group") or entry["group"] not in results]


def _measured_mean(means: list[dict[str, Any]]) -> str:
    number = "/".join(dict.fromkeys(str(mean["n"]) for mean in means))
    return f"{means[0]['metric']}, {means[0]['shots']} shots, n {number} in all, prompt {_prompts(means)}"


def _prompts(entries: list[dict[str, Any]]) -> str:
    """One for all, or one for each model in their order."""
    prompts = list(map(_prompt, entries))
    return prompts[0] if len(set(prompts)) == 1 else " / ".join(prompts)


def _measured(entries: list[dict[str, Any]]) -> str:
    """Metric, shots, version, documents, window and prompts of one row, as far as the models have them in common."""

    def all_of(key: str) -> str:
        return "/".join(dict.fromkeys(str(entry[key]) for entry in entries))

    how = f"of {all_of('text')}" if "text" in entries[0] else f"{all_of('shots')} shots"
    return (
        f"{all_of('metric')}, {how}, v{all_of('version')}, n {all_of('n')}, window {all_of('window')}, "
        f"prompt {_prompts(entries)}{_incomplete(entries)}"
    )


def _incomplete(entries: list[dict[str, Any]]) -> str:
    """How much of a group there is, if not all."""
    counts = {(entry.get("parts"), entry.get("group_size")) for entry in entries if "parts" in entry}
    return "".join(f", {parts} of {size} parts" for parts, size in counts if parts != size)


def _prompt(entry: dict[str, Any]) -> str:
    if entry["prompt"] == "none":
        return "none in chat turns" if entry["chat_template"] else "none"
    return f"{entry['prompt']} ({'chat turns' if entry['chat_template'] else entry['prompt_format']})"


def _difference_shown(found: dict[str, Any], b: str, task: str) -> str:
    """Of model `b` and the first."""
    first = next(iter(found["models"]))
    ours = (row for row in found["comparisons"] if (row["a"], row["b"], row["task"]) == (first, b, task))
    row = next(ours, None)
    if row is None:
        return "-"
    scale, digits = (1, 3) if row["metric"] == "perplexity" else (100, 1)
    unit = " nats" if row["metric"] == "perplexity" else ""
    low, high, middle = (f"{scale * row[key]:+.{digits}f}" for key in ("low", "high", "difference"))
    return f"{middle}{unit} [{low}, {high}], {row['p_value']:.2g}"


def cost_rows(found: dict[str, Any]) -> list[list[str]]:
    """What the models cost, a column each; speeds as median (smallest to largest)."""
    names = [name for name in found["models"] if name in found["cost"]]
    if not names:
        return []
    costs = [found["cost"][name] for name in names]
    shape = f"{costs[0]['batch']} x {costs[0]['context']} tokens, {costs[0]['precision']}, {costs[0]['device']}"

    def spread(key: str, unit: float, digits: int) -> list[str]:
        return [
            "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(
                *(c[key][end] / unit for end in ("median", "min", "max")), d=digits
            )
            if c.get(key)
            else "-"
            for c in costs
        ]

    return [
        [shape, *names],
        ["parameters, millions", *(f"{c['parameters'] / 1e6:.1f}" for c in costs)],
        ["weights on disk, MB", *(f"{c['weight_bytes'] / 1e6:.0f}" for c in costs)],
        ["KV cache, bytes per token", *(f"{c['kv_bytes_per_token']:,}" for c in costs)],
        ["prefill, tokens/s", *spread("prefill_tokens_per_second", 1, 0)],
        ["decode, tokens/s", *spread("decode_tokens_per_second", 1, 1)],
        ["first token, ms", *spread("first_token_seconds", 1e-3, 0)],
        ["peak memory, MB", *spread("peak_memory_bytes", 1e6, 0)],
    ]


def caption(found: dict[str, Any]) -> str:
    """What holds for the whole table."""
    entries = [entry for results in found["results"].values() for entry in results.values()]
    limits = " / ".join(dict.fromkeys(str(entry["limit"] or "all") for entry in entries))
    precisions = " / ".join(dict.fromkeys(entry["precision"] for entry in entries))
    seeds = " / ".join(dict.fromkeys(str(entry["seed"]) for entry in entries))
    harness = " / ".join(dict.fromkeys(entry["lm_eval"] for entry in entries))
    return (
        f"Shares in percent, ± is a standard error. Differences are paired on the same documents, 95 % intervals in "
        f"brackets; of perplexities, those of the logarithm. lm-eval {harness}, seed {seeds}, {precisions}, documents "
        f"a task: {limits}."
    )


def markdown(found: dict[str, Any]) -> str:
    """All tables as Markdown."""
    lines = [*_markdown_table(rows(found)), "", caption(found), ""]
    lines += [f"Left out: {task}: {reason}" for task, reason in found["left_out"].items()]
    if costs := cost_rows(found):
        lines += ["", *_markdown_table(costs)]
    return "\n".join(lines)


def _markdown_table(table: list[list[str]]) -> list[str]:
    clean = [[cell.replace("|", "\\|") for cell in row] for row in table]
    head, *body = [f"| {' | '.join(row)} |" for row in clean]
    return [head, "|---" * len(table[0]) + "|", *body]


def show(found: dict[str, Any], path: Path, console: Console) -> None:
    """Print the tables: as Markdown where nobody watches."""
    if console.is_terminal:
        for table in filter(None, (rows(found), cost_rows(found))):
            shown = Table()
            for i, heading in enumerate(table[0]):
                shown.add_column(Text(heading), justify="left" if i < 2 else "right", overflow="fold")
            for row in table[1:]:
                shown.add_row(*map(Text, row))
            console.print(shown)
        console.print(caption(found), markup=False, highlight=False)
        for task, reason in found["left_out"].items():
            console.print(f"left out: {task}: {reason}", markup=False, highlight=False)
    else:
        console.print(markdown(found), markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {path} and {path.with_suffix('.md')}", markup=False, highlight=False, soft_wrap=True)
