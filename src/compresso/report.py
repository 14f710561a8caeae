"""The page about one run or several: report.html and its pictures, from the files of run folders alone.

The same files give the same bytes. What is read is checked first, because files may be
damaged or foreign; the template escapes whatever they hold. Paths of the user's machine
appear only where config.yaml names them.
"""

import itertools
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from compresso import charts, whole_files
from compresso import plan as plans
from compresso.charts import Mark
from compresso.config import PruneConfig, read_yaml
from compresso.schemas import EVALUATION, METRICS, SUMMARY, parse

Z = 1.96  # 95 % of a normal distribution
MEAN = "mean of "  # before the name of a suite
FACTS = ("metric", "shots", "n", "window", "version", "lm_eval", "prompt")
PATH = re.compile(r"(?<!\S)(?:[A-Za-z]:)?(?:[/\\][^\s/\\]+)*[/\\]([^\s/\\]+)")  # an absolute one
MOST_PHASES, LONGEST_PHASE = 200, 40  # of a training curve
MOST_ROWS = 300  # of a table and its picture
LARGEST_LOG = 50.0  # of a ratio of perplexities; what is beyond it cannot be drawn


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    name: str
    slug: str
    """Before the names of its pictures."""
    summary: dict[str, Any]
    versions: dict[str, str]
    """Of packages, and the machine."""
    config: PruneConfig
    plan: plans.Plan
    rows: list[dict[str, Any]]
    """Of metrics.jsonl; empty for a method without training."""
    evaluation: dict[str, Any]
    """Empty without eval.json."""

    @property
    def stages(self) -> list[str]:
        """Those that were reached and differ."""
        trained = self.config.recover_steps > 0 or any(row["stage"] == "recover" for row in self.rows)
        whole = all("recovered" in self.summary[key] for key in ("loss", "perplexity", "sample"))
        return ["dense", "cut", *(["recovered"] if trained and whole else [])]

    @property
    def perplexity(self) -> float:
        return self.summary["perplexity"][self.stages[-1]]

    @property
    def speedups(self) -> dict[str, float]:
        """Tokens per second over those of the dense model; empty where they were not measured."""
        if "cost" not in self.summary:
            return {}
        before, after = self.summary["cost"]["before"], self.summary["cost"]["after"]
        keys = {kind: f"{kind}_tokens_per_second" for kind in ("prefill", "decode")}
        return {kind: after[key]["median"] / (before[key]["median"] or math.nan) for kind, key in keys.items()}

    @property
    def dense(self) -> str:
        """Name of the model that it started from."""
        return f"{_ends([self.summary['model']])[0]} (dense)"

    @property
    def yardstick(self) -> tuple[str, int, str]:
        """What perplexities were measured with: runs of another model, window or held-out text do not compare."""
        return self.dense, self.summary["perplexity_window"], f"{self.summary['perplexity']['dense']:.3g}"

    @property
    def kept(self) -> dict[str, list[tuple[int, int]]]:
        """(kept, before) of each kind of unit, in every layer; a sub-layer that was missing before counts 0."""
        sizes = {unit: self.plan.shape.sizes(unit) for unit in self.plan.gates}
        sizes["attention"] = [min(1, size) for size in sizes["kv_group"]]
        sizes["mlp"] = [min(1, size) for size in sizes["intermediate"]]
        return {unit: [*zip(map(len, kept), sizes[unit], strict=True)] for unit, kept in self.plan.keep.items()}


def report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page about these run folders, and its pictures as PNGs into `report/` beside it.

    `output` is report.html in the first run folder unless given. Returns its path. Raises
    FileNotFoundError for a folder that is no finished run, ValueError for a damaged file.
    """
    folders = {os.path.abspath(run): Path(run) for run in ([runs] if isinstance(runs, (str, Path)) else runs)}
    if not folders:
        raise ValueError("name at least one run folder of `compresso prune`")
    page = Path(output) if output is not None else next(iter(folders.values())) / "report.html"
    if page.suffix != ".html" or page.is_dir():
        raise ValueError(f"output must be an .html file, got {str(page)!r}")
    loaded = []
    for number, (folder, name) in enumerate(zip(folders.values(), _ends([*folders]), strict=True), 1):
        slug = f"{number}-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:40]}-" if len(folders) > 1 else ""
        loaded.append(read_run(folder, name, slug))
    evaluation = _merged(loaded)
    if len(evaluation["tasks"]) > MOST_ROWS:
        raise ValueError(f"the evaluations have {len(evaluation['tasks'])} rows, and a page takes {MOST_ROWS}")
    pictures = {name: charts.picture(draw) for name, draw in _drawings(loaded, evaluation).items()}
    defaults = {field.name: field.default for field in fields(PruneConfig)}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters |= {"interval": _interval, "quote": shlex.quote, "tail": lambda path: _ends([path])[0]}
    template = environment.from_string((files("compresso") / "report.html.jinja").read_text(encoding="utf-8"))
    html = template.render(
        runs=loaded,
        evaluation=evaluation,
        headline=_headline(loaded[0], evaluation),
        costs=_costs(loaded, evaluation),
        answers=_answers(loaded),
        pictures=pictures,
        defaults=defaults,
        changed=[name for name in defaults if any(getattr(run.config, name) != defaults[name] for run in loaded)],
        facts=list(FACTS),
        mean=MEAN,
    )
    (page.parent / "report").mkdir(parents=True, exist_ok=True)
    for name, one in pictures.items():
        whole_files.write(page.parent / "report" / f"{name}.png", one.png)
    whole_files.write(page, html.encode("utf-8", "replace"))
    return page


def read_run(folder: Path, name: str, slug: str) -> Run:
    """Read a run folder and check it. Raises FileNotFoundError or ValueError, naming the file."""
    for needed in ("summary.json", "config.yaml", "env.json"):
        if not (folder / needed).is_file():
            held = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "nothing"
            raise FileNotFoundError(
                f"{folder} has no {needed}, there is {held}. A report needs a folder of `compresso prune`, finished; "
                f"a run that was stopped goes on with `compresso prune --resume {folder}`"
            )
    try:
        config = PruneConfig(**read_yaml(folder / "config.yaml"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.yaml'} is damaged: {error}") from None
    environment = parse((folder / "env.json").read_bytes(), {"versions.*": "text"}, str(folder / "env.json"))
    metrics, evaluation = folder / "metrics.jsonl", folder / "eval.json"
    lines = metrics.read_bytes().splitlines() if metrics.is_file() else []
    rows = [parse(line, METRICS, f"{metrics}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    changes = sum(a["phase"] != b["phase"] for a, b in itertools.pairwise(rows))
    if changes > MOST_PHASES or any(len(row["phase"]) > LONGEST_PHASE for row in rows):
        raise ValueError(
            f"{metrics} has {changes} changes of phase, or names of phases that are no names, expected at most "
            f"{MOST_PHASES} and {LONGEST_PHASE} characters; restore it, or delete it to go without"
        )
    return Run(
        name,
        slug,
        parse((folder / "summary.json").read_bytes(), SUMMARY, str(folder / "summary.json")),
        environment["versions"] | {key: str(value) for key, value in environment.items() if key != "versions"},
        config,
        plans.load(folder),
        rows,
        parse(evaluation.read_bytes(), EVALUATION, str(evaluation)) if evaluation.is_file() else {},
    )


def _ends(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart: a page goes to people whom the rest does not concern."""
    parts = [[part for part in re.split(r"[/\\]", path) if part not in ("", ".")] or [path] for path in paths]
    parts = [part[:-1] if part[-1] == "model" and len(part) > 1 else part for part in parts]
    ends: list[str] = []
    for reach in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(part[-reach - (part[-1] == "cut") :]) for part in parts]
        if len(set(ends)) == len(ends):
            break
    return ends


def _merged(runs: Sequence[Run]) -> dict[str, Any]:
    """The evaluations of all runs as one, with names that fit a page.

    `models` (dense ones first), `results` (averages as rows, no parts of groups), `cost`, `left_out` and
    `versions` are as in eval.json. `tasks` holds the FACTS of each row as texts, and its kind: share, perplexity
    or other. `differences`: of each row, by (model, reference), where a perplexity's is relative; the reference
    is a file's first dense model, or its first.
    """
    found = [(run, run.evaluation) for run in runs if run.evaluation.get("models")]
    names: dict[str, str] = {}  # by fingerprint: other files may name the same model otherwise
    abouts: dict[str, tuple[str, dict[str, Any]]] = {}
    for run, file in found:
        abouts |= {_key(file, name): (name, about) for name, about in file["models"].items()}
        after = run.summary["parameters"]["after"]
        ours = (n for n, m in file["models"].items() if m.get("stage") == "recovered" and m["parameters"] == after)
        names |= {_key(file, name): run.name for name in list(ours)[:1]}
    others = [key for key in abouts if key not in names]
    for key, end in zip(others, _ends([abouts[key][0] for key in others]), strict=True):
        end += " (dense)" if abouts[key][1].get("stage") == "dense" else ""
        names[key] = end if end not in names.values() else f"{end} ({len(names)})"
    order = sorted(abouts, key=lambda key: abouts[key][1].get("stage") != "dense")
    whole: dict[str, Any] = {part: {} for part in ("tasks", "differences", "cost", "left_out", "versions")}
    whole |= {"models": {names[key]: abouts[key][1] for key in order}, "results": {names[key]: {} for key in order}}
    for _, file in found:
        _merge(whole, file, {name: names[_key(file, name)] for name in file["models"]})
    rows = {task: 0 for entries in whole["results"].values() for task in entries}
    for task in sorted(rows, key=lambda task: task.startswith(MEAN)):
        entries = [entries[task] for entries in whole["results"].values() if task in entries]
        facts = {fact: " / ".join(dict.fromkeys(str(entry.get(fact, "")) for entry in entries)) for fact in FACTS}
        share = all(0 <= entry["value"] <= 1 for entry in entries)
        kind = "perplexity" if facts["metric"] == "perplexity" else "share" if share else "other"
        whole["tasks"][task] = {**facts, "kind": kind}
    whole["pairs"] = list(dict.fromkeys(pair for rows in whole["differences"].values() for pair in rows))
    return whole


def _key(file: dict[str, Any], name: str) -> str:
    return file["models"][name].get("fingerprint") or name


def _merge(whole: dict[str, Any], file: dict[str, Any], page: dict[str, str]) -> None:
    """Add a file's figures under the names of the page; what is there already stays."""
    averages = file.get("averages", {})
    for name, shown in page.items():
        results = file["results"].get(name, {})
        rows = {task: entry for task, entry in results.items() if entry.get("group") not in results}
        rows |= {MEAN + suite: entry for suite, entry in averages.get(name, {}).items()}
        for task, entry in rows.items():
            value = entry.get("value", math.nan)
            if math.isfinite(value) and (value > 0 or entry["metric"] != "perplexity"):
                whole["results"][shown].setdefault(task, entry)
        if name in file.get("cost", {}):
            whole["cost"].setdefault(shown, file["cost"][name])
    dense = [name for name in page if file["models"][name].get("stage") == "dense"]
    reference = [*dense, *page][0]
    for row in file.get("comparisons", []):
        if reference in (row["a"], row["b"]) and {row["a"], row["b"]} <= set(page):
            model, sign = (row["b"], 1) if row["a"] == reference else (row["a"], -1)
            ends = [sign * row[key] for key in ("difference", "low", "high")]
            if row["metric"] == "perplexity":  # of logarithms
                ends = [math.expm1(min(end, LARGEST_LOG)) for end in ends]
            task = MEAN + row["task"] if any(row["task"] in suites for suites in averages.values()) else row["task"]
            turned = {**row, "difference": ends[0], "low": min(ends), "high": max(ends)}
            whole["differences"].setdefault(task, {}).setdefault((page[model], page[reference]), turned)
    reasons = {task: PATH.sub(r"\1", reason) for task, reason in file.get("left_out", {}).items()}
    whole["left_out"] = reasons | whole["left_out"]
    whole["versions"] = file.get("versions", {}) | whole["versions"]


def _headline(run: Run, evaluation: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The first average of a suite in which a run was compared with its reference."""
    means = ((task, rows) for task, rows in evaluation["differences"].items() if task.startswith(MEAN))
    return next(((task, row) for task, rows in means for (model, _), row in rows.items() if model == run.name), None)


def _answers(runs: Sequence[Run]) -> dict[str, dict[tuple[str, str], str]]:
    """Of each question, what each model said, by name and stage."""
    answers: dict[str, dict[tuple[str, str], str]] = {}
    for run in runs:
        texts = answers.setdefault(run.summary["sample"]["question"], {})
        for stage in run.stages:
            texts.setdefault((run.dense if stage == "dense" else run.name, stage), run.summary["sample"][stage])
    return answers


def _interval(entry: dict[str, Any]) -> tuple[float, float]:
    """95 %; the value itself where there is no standard error."""
    value, error = entry["value"], entry.get("stderr", 0.0)
    if not math.isfinite(error):
        return value, value
    if entry["metric"] == "perplexity":
        reach = math.exp(min(Z * error / value, LARGEST_LOG))
        return value / reach, value * reach
    return value - Z * error, value + Z * error


def _costs(runs: Sequence[Run], evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each model: what the evaluation measured, else what the run itself did."""
    costs = {name: evaluation["cost"][name] for name in evaluation["models"] if name in evaluation["cost"]}
    for run in runs:
        if run.name not in costs and "cost" in run.summary:
            costs.setdefault(run.dense, run.summary["cost"]["before"])
            costs[run.name] = run.summary["cost"]["after"]
    return costs


def _drawings(runs: Sequence[Run], evaluation: dict[str, Any]) -> dict[str, Callable]:
    """What draws each picture, by its name."""
    dense = [name for name, about in evaluation["models"].items() if about.get("stage") == "dense"]
    models = dict.fromkeys([*(run.dense for run in runs), *dense], True)
    models |= dict.fromkeys([run.name for run in runs], False)
    models |= {name: False for name in evaluation["models"] if name not in models}
    drawings = {f"{run.slug}{name}": draw for run in runs for name, draw in _of_run(run).items()}
    sizes: dict[str, float] = {}
    marks: dict[str, Mark] = {}
    for run in runs:
        for name, size, stage in ((run.dense, "before", "dense"), (run.name, "after", run.stages[-1])):
            value = run.summary["perplexity"][stage]
            if math.isfinite(value) and value > 0:
                sizes.setdefault(name, run.summary["parameters"][size])
                marks.setdefault(name, Mark("", name, value, value, value))
    if len(marks) > 2 and len({run.yardstick for run in runs}) == 1:
        label = f"perplexity, {runs[0].summary['perplexity_window']}-token windows"
        drawings["size-perplexity"] = partial(
            charts.size_quality, marks=[*marks.values()], sizes=sizes, models=models, label=label, low_is_good=True
        )
    return drawings | _of_scores(evaluation, models, "share") | _of_scores(evaluation, models, "perplexity")


def _of_run(run: Run) -> dict[str, Callable]:
    names = {"kv_group": "key/value groups", "intermediate": "FFN channels", "expert": "experts"}
    columns = {name: run.kept[unit] for unit, name in names.items() if unit in run.kept}
    drawings: dict[str, Callable] = {"plan": partial(charts.kept_shares, columns=columns)}
    if (hidden := run.plan.gates["hidden"]).min() == 0:
        drawings["hidden"] = partial(charts.hidden_channels, kept=hidden.bool().tolist())
    if gating := [row for row in run.rows if "expected_sparsity" in row and "target_sparsity" in row]:
        drawings["sparsity"] = partial(charts.sparsity_steps, rows=gating)
    if run.rows:
        drawings["loss"] = partial(charts.loss_steps, rows=run.rows)
    return drawings


def _of_scores(evaluation: dict[str, Any], models: dict[str, bool], kind: str) -> dict[str, Callable]:
    """Scores of one kind, their paired differences, and some of them against size."""
    marks: dict[str, list[Mark]] = {}
    changes: list[Mark] = []
    for task in (task for task, about in evaluation["tasks"].items() if about["kind"] == kind):
        entries = {model: rows[task] for model, rows in evaluation["results"].items() if task in rows}
        scale = 100 if kind == "share" else 1
        values = {model: (entry["value"], *_interval(entry)) for model, entry in entries.items()}
        marks[task] = [Mark(task, model, *(scale * value for value in found)) for model, found in values.items()]
        for (model, _), row in evaluation["differences"].get(task, {}).items():
            changes.append(Mark(task, model, *(100 * row[key] for key in ("difference", "low", "high"))))
    name, label, changed, change = {
        "share": ("scores", "score, %", "differences", "difference, points"),
        "perplexity": ("perplexities", "perplexity", "perplexity-changes", "change of perplexity, %"),
    }[kind]
    drawings: dict[str, Callable] = {}
    if marks:
        every = [mark for of_task in marks.values() for mark in of_task]
        drawings[name] = partial(charts.dots, marks=every, models=models, label=label)
    if changes:
        drawings[changed] = partial(charts.dots, marks=changes, models=models, label=change, zero=True)
    sizes = {model: about["parameters"] for model, about in evaluation["models"].items()}
    for task in list(marks)[:1] if kind == "perplexity" else [task for task in marks if task.startswith(MEAN)]:
        of_task = [rows[task].get("documents") for rows in evaluation["results"].values() if task in rows]
        if len(marks[task]) > 2 and len({*of_task}) == 1:
            label, low_is_good = (f"{task}, %", False) if kind == "share" else (f"perplexity, {task}", True)
            drawings["size-" + re.sub(r"[^A-Za-z0-9]+", "-", task)] = partial(
                charts.size_quality, marks=marks[task], sizes=sizes, models=models, label=label, low_is_good=low_is_good
            )
    return drawings
