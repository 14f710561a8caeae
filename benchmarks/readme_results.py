"""Write the tables and the picture of README.md and of pages in docs/ from committed results in benchmarks/results/.

python benchmarks/readme_results.py                                         # the pages from the results
python benchmarks/readme_results.py --run runs/demo --eval runs/demo/eval.json   # the results from a run first
"""

import argparse
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality
import torch
from PIL import Image, PngImagePlugin
from transformers import AutoConfig

from compresso import charts, eval_table
from compresso.compatibility import verdicts
from compresso.extract import sized_config
from compresso.streamed import shapes_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DEMO, EVALUATION, QUALITY = (RESULTS / f"{name}.json" for name in ("demo", "evaluation", "quality"))
PAGES = {
    "README.md": ("demo", "evaluation", "quality", "prompt", "cost"),
    "docs/large-models.md": ("processes", "growth", "tricks"),
    "docs/deploy.md": ("compatibility", "runtimes"),
}
STAGES = ("dense", "cut", "recovered")
PICTURE = "docs/quality.png"


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


def spread(values: dict[str, float], digits: int = 2, unit: float = 1) -> str:
    return "{:,.{d}f} ({:,.{d}f} to {:,.{d}f})".format(*(values[k] / unit for k in ("median", "min", "max")), d=digits)


def cost_table(found: dict[str, Any]) -> str:
    """A step of ours against one of plain LoRA fine-tuning."""
    lines = ["| | LoRA fine-tuning | pruning | ratio |", "|---|---|---|---|"]
    for prompt, name in (("long", "with the long prompt"), ("none", "without a prompt")):
        plain, ours = found[prompt]["plain"], found[prompt]["ours"]
        ratio, memory = (
            found["ratio_time_prompt" if prompt == "long" else "ratio_time_no_prompt"],
            found["ratio_memory" if prompt == "long" else "ratio_memory_no_prompt"],
        )
        rows = [
            ("seconds a step", "seconds_a_step", 2, 1.0, spread(ratio)),
            ("tokens/s, the prompt counted for each record", "tokens_per_second", 0, 1.0, ""),
            ("peak memory, GB", "peak_memory_bytes", 2, 1e9, spread(memory)),
        ]
        for what, key, digits, unit, last in rows:
            cells = " | ".join(spread(side[key], digits, unit) for side in (plain, ours))
            lines.append(f"| {what}, {name} | {cells} | {last} |")
    versions = found["versions"]
    rates = [100 * found[prompt]["ours"]["share_of_matrix_rate"] for prompt in ("long", "none")]
    text = (
        f"Median (smallest to largest) of {found['repeats']} rounds of {found['steps_a_block']} steps in which both "
        f"take turns on the same records; {found['precision'].removeprefix('torch.')}, {found['threads']} threads, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}. Of the "
        f"machine's measured rate of matrix products ({found['matrix_products_per_second'] / 1e9:,.0f} GFLOP/s) our "
        f"step reaches {rates[0]:.0f} % with the prompt and {rates[1]:.0f} % without."
    )
    if "late_step_over_early" in found:
        late = found["late_step_over_early"]
        text += (
            f" Once 20 % of the parameters have been cut out, a step takes {spread(late['0.2'])} of the time of a full "
            f"one; after 50 %, {spread(late['0.5'])}."
        )
    return "\n".join([*lines, "", text])


def growth_table(found: dict[str, Any]) -> str:
    """Seconds and memory with one thing larger at a time."""
    lines = [
        "| | | seconds a step, LoRA | pruning | ratio | peak GB, LoRA | pruning | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for axis, rows in found["growth"].items():
        for row in rows:
            seconds, memory = (
                [row[side][key] for side in ("plain", "ours")] for key in ("seconds_a_step", "peak_memory_bytes")
            )
            lines.append(
                f"| {axis} | {row['value']} | {seconds[0]:.2f} | {seconds[1]:.2f} | {row['ratio_time']:.2f} "
                f"| {memory[0] / 1e9:.2f} | {memory[1] / 1e9:.2f} | {row['ratio_memory']:.2f} |"
            )
    return "\n".join(lines)


def processes_table(found: dict[str, Any]) -> str:
    """Two processes against one."""
    first = next(iter(found["runs"]))
    lines = [
        "| | seconds a step | tokens/s | peak memory of the first, GB | difference of a loss | plans differ in |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["runs"].items():
        cells = [spread(row["seconds_a_step"]), f"{row['tokens_per_second']:,.0f}"]
        cells.append(f"{row['peak_memory_bytes_of_the_first'] / 1e9:.2f}")
        if name == first:
            cells += ["", ""]
        else:
            steps = row["differences_of_the_loss"]
            cells.append(f"{steps[0]:.0e} at the first step, {max(steps):.0e} at most")
            cells.append(f"{100 * row['units_on_which_plans_differ']:.2f} % of the units")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"{found['steps']} steps of {found['global_batch']} records, torch {found['versions']['torch']}."]
    return "\n".join(lines)


def tricks_table(found: dict[str, Any]) -> str:
    """Quality with and without each of the things that make a step cheap."""
    lines = []
    for run, settings in found["settings"].items():
        of_run = [cell for cell in found["cells"] if cell["run"] == run]
        seeds = len({cell["seed"] for cell in of_run})
        records = f"{settings['batch_size']} records of at most {settings['max_length']} tokens"
        target = f"{settings['steps']} steps to {100 * settings['target_sparsity']:.0f} %"
        lines += [
            f"{target}, {records}, mean (smallest to largest) of {seeds} seeds, right after cutting:",
            "",
            "| | loss on held-out records | perplexity | parameters gone before the last step |",
            "|---|---|---|---|",
        ]
        for variant in dict.fromkeys(cell["variant"] for cell in of_run):
            cells = [cell for cell in of_run if cell["variant"] == variant]
            shown = []
            for key, digits, unit in (("loss", 2, 1), ("perplexity", 1, 1), ("cut_in_training", 1, 0.01)):
                values = [cell[key] / unit for cell in cells]
                ends = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if unit == 1 else " %"
                shown.append(f"{statistics.mean(values):,.{digits}f}{ends}")
            lines.append(f"| {variant} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join([*lines, f"torch {found['versions']['torch']}."])


METHOD_NAMES = {
    "l0": "Compresso",
    "fisher": "Fisher information of gates",
    "wanda": "Wanda-sp",
    "flap": "FLAP",
    "taylor": "LLM-Pruner (Taylor)",
    "minitron": "Minitron, width",
    "shortgpt": "ShortGPT",
}
RECOVERIES = {"none": "", "lora": "LoRA, next-token loss", "ours": "ours", "before": "ours, of before"}


def method_name(cell: dict[str, Any]) -> str:
    name, _, allocation = cell["method"].partition(" ")
    allocation = allocation or cell.get("settings", {}).get("allocation", "")
    return f"{METHOD_NAMES.get(name, name)}{f', {allocation}' if allocation not in ('', 'auto') else ''}"


def quality_marks(found: dict[str, Any]) -> list[charts.Mark]:
    """Perplexities over the dense model's, of what was recovered with the `small` budget: ours with the default method
    and today's defaults, or those of before, rivals with LoRA. The interval is from the smallest to the largest of the
    seeds."""
    cells = found["cells"]
    dense = next(cell for cell in cells if cell["method"] == "dense")
    shown: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda c: (c["sparsity"], c["method"] != "l0", c["wikitext2_ppl"])):
        ours = cell["method"] == "l0" and cell["recovery"] == "ours"
        if cell["budget"] == "small" and (ours or cell["recovery"] == "lora"):
            shown.setdefault((cell["sparsity"], method_name(cell)), []).append(cell)
    shown = {key: quality.newest(group) for key, group in shown.items()}
    marks = []
    for (sparsity, name), group in shown.items():
        for text, key in (("WikiText-2", "wikitext2_ppl"), ("C4", "c4_ppl")):
            values = [cell[key] / dense[key] for cell in group]
            row = f"{100 * sparsity:.0f} %, {text}"
            with_lora = "" if group[0]["method"] == "l0" else " + LoRA"
            marks.append(charts.Mark(row, name + with_lora, statistics.mean(values), min(values), max(values)))
    return marks


def draw_quality(found: dict[str, Any], file: Path) -> None:
    """A picture of `quality_marks`, which lie in it as text too."""
    marks = quality_marks(found)
    models = {mark.model: False for mark in marks}
    label = "perplexity, times the dense model's"
    image = Image.open(io.BytesIO(charts.picture(lambda theme: charts.dots(theme, marks, models, label)).png))
    figures = PngImagePlugin.PngInfo()
    figures.add_text("Figures", json.dumps(marks))
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True, pnginfo=figures)


def quality_table(found: dict[str, Any]) -> str:
    """Methods at equal operations, from `benchmarks/quality.py`."""
    dense = next(cell for cell in found["cells"] if cell["method"] == "dense")
    columns = ("instruction_loss", "wikitext2_ppl", "c4_ppl", "suite")
    lines = [
        "| removed | method | recovery | operations | seeds | held-out loss | WikiText-2 | C4 | tasks, % | less ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, cells: list[dict[str, Any]]) -> str:
        shown = []
        for key in columns:
            values = [cell[key] for cell in cells if key in cell]
            digits, unit = (1, 100) if key == "suite" else (3 if key == "instruction_loss" else 1, 1)
            middle = f"{unit * statistics.mean(values):,.{digits}f}" if values else ""
            ends = f" ({unit * min(values):,.{digits}f} to {unit * max(values):,.{digits}f})" if len(values) > 1 else ""
            shown.append(middle + ends)
        less = quality.less_ours(cells, found["cells"])
        shown.append(f"{100 * less.difference:+.1f} [{100 * less.low:+.1f}, {100 * less.high:+.1f}]" if less else "")
        operations = statistics.mean(cell["flops"] for cell in cells)
        return f"| {name} | {operations:.1e} | {len(cells)} | {' | '.join(shown)} |"

    lines.append(row("0 % | dense | ", [dense]))
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in found["cells"]:
        if cell is not dense and cell["method"] != "dense":
            recovery = cell["recovery"] if quality.as_today(cell) else "before"
            groups.setdefault((cell["sparsity"], cell["budget"], recovery, cell["method"]), []).append(cell)

    def order(key: tuple) -> tuple:
        return (key[0], key[1] == "none", statistics.mean(c["wikitext2_ppl"] for c in groups[key]))

    for key in sorted(groups, key=order):
        sparsity, _, recovery, _ = key
        title = f"{100 * sparsity:.0f} % | {method_name(groups[key][0])} | {RECOVERIES[recovery]}"
        lines.append(row(title, groups[key]))
    versions = found["versions"]
    text = (
        "Mean (smallest to largest); less ours: answers to the same documents less those of Compresso with as many "
        "operations (3e14 for plans without recovery), the mean of the seeds that were asked, 95 % interval of "
        "documents; of before: with other shares of own texts or of the dense model's predictions than are the default "
        "now, or with the tokens that were drawn as the aim of own texts; "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )
    return "\n".join([*lines, "", text])


def compatibility_table() -> str:
    """Which runtimes load SmolLM2-135M with a fifth of its parameters gone, widths equal and not."""
    dense = AutoConfig.for_model(
        "llama",
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    )
    equal = [{"num_key_value_heads": 3, "num_attention_heads": 9, "intermediate_size": 1126}] * 30
    unequal = [{**width, "intermediate_size": width["intermediate_size"] - i} for i, width in enumerate(equal)]
    unequal[3] = {"num_key_value_heads": 2, "num_attention_heads": 6, "intermediate_size": 1200}
    lines = ["| runtime | loads | why | to do | known from |", "|---|---|---|---|---|"]
    for title, widths in (("equal widths (`--shape uniform`)", equal), ("unequal widths", unequal)):
        lines.append(f"| **{title}** | | | | |")
        model = shapes_of(sized_config(dense, (), widths, 576, range(30)), torch.bfloat16)
        for verdict in verdicts(model):
            loads = "yes" if verdict.loads else "after export" if "export" in verdict.do else "no"
            lines.append(f"| {verdict.runtime} | {loads} | {verdict.why} | {verdict.do} | {verdict.known} |")
    return "\n".join(lines)


def prompt_table(found: dict[str, Any]) -> str:
    """Every prompt in training against every prompt in use, from prompt.json."""

    def apart(name: str, cell: dict[str, Any], digits: int, unit: float) -> str:
        d = cell[f"{name}_difference"]
        if cell["in_training"] == cell["in_use"] == "none":
            return ""
        return " [{:+.{d}f}, {:+.{d}f}]".format(unit * d["low"], unit * d["high"], d=digits)

    lines = ["| in training | in use | loss of an answer | two tasks, % |", "|---|---|---|---|"]
    for cell in found["cells"]:
        loss = f"{cell['loss']:.3f}{apart('loss', cell, 3, 1)}"
        suite = f"{100 * cell['suite']:.1f}{apart('suite', cell, 1, 100)}"
        lines.append(f"| {cell['in_training']} | {cell['in_use']} | {loss} | {suite} |")
    given = found["settings"]
    text = (
        f"SmolLM2-135M-Instruct, {100 * given['target_sparsity']:.0f} % removed, {given['steps']} steps of pruning and "
        f"{given['recover_steps']} of recovery each, seed 0; 128 held-out records, {found['documents']} documents of "
        f"{given['suite'].replace(',', ' and ')}. In brackets the 95 % interval of the paired difference from none in "
        f"both; torch {found['versions']['torch']}."
    )
    return "\n".join([*lines, "", text])


def runtimes_table(found: dict[str, Any]) -> str:
    """Dense and pruned in llama.cpp, from runtimes.json."""
    kinds = list(dict.fromkeys(row["type"] for row in found["rows"]))
    rows = {(row["model"], row["type"]): row for row in found["rows"]}
    lines = [
        "| numbers | file, MB | memory, MB | prefill, tokens/s | decode, tokens/s | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        pair = [rows[name, kind] for name in ("dense", "pruned")]
        cells = [
            " → ".join(f"{row['file_bytes'] / 1e6:.0f}" for row in pair),
            " → ".join(f"{row['peak_memory_bytes']['median'] / 1e6:.0f}" for row in pair),
            " → ".join(spread(row["prefill_tokens_per_second"], 0) for row in pair),
            " → ".join(spread(row["decode_tokens_per_second"], 0) for row in pair),
            " → ".join(f"{row['perplexity']:.1f}" for row in pair),
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    exact = [rows[name, "f32"] for name in ("dense", "pruned")]
    apart = max(abs(row["perplexity"] / row["perplexity_transformers"] - 1) for row in exact)
    sizes = " → ".join(f"{found[f'{name}_parameters'] / 1e6:.1f} M" for name in ("dense", "pruned"))
    lines += [
        "",
        f"Dense → pruned ({sizes} parameters), files in turn, medians (smallest to largest) of {found['rounds']} "
        f"rounds, {found['threads']} threads, a prompt of 256 tokens and 64 after it; perplexity on "
        f"{exact[0]['perplexity_tokens']} tokens of Wikipedia in windows of 128. In f32 it is "
        f"within {100 * apart:.2f} % of transformers'.",
    ]
    return "\n".join(lines)


def sections() -> dict[str, str]:
    """The generated parts of the pages, by name."""
    tables: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "demo": ("demo", demo_table),
        "evaluation": ("evaluation", eval_table.markdown),
        "quality": ("quality", quality_table),
        "cost": ("cost", cost_table),
        "growth": ("cost", growth_table),
        "processes": ("processes", processes_table),
        "tricks": ("tricks", tricks_table),
        "runtimes": ("runtimes", runtimes_table),
        "prompt": ("prompt", prompt_table),
    }
    parts = {"compatibility": compatibility_table()}
    for part, (name, table) in tables.items():
        file = RESULTS / f"{name}.json"
        parts[part] = table(json.loads(file.read_text())) if file.exists() else "Not measured yet."
    return parts


def filled(name: str) -> str:
    """A page with its generated parts replaced. Raises ValueError if a mark is missing."""
    page, texts = (ROOT / name).read_text(), sections()
    for part in PAGES[name]:
        begin, end = f"<!-- {part}: written by benchmarks/readme_results.py -->", f"<!-- /{part} -->"
        head, found, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{name} has no {begin} ... {end}")
        page = f"{head}{begin}\n\n{texts[part]}\n\n{end}{tail}"
    return page


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
    for name in PAGES:
        (ROOT / name).write_text(filled(name))
    draw_quality(json.loads(QUALITY.read_text()), ROOT / PICTURE)


if __name__ == "__main__":
    main()
