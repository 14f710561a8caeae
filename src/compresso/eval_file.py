"""eval.json: read, written whole or not at all, and what follows from its figures: groups, averages, comparisons.

The schema is in docs/evaluation.md.
"""

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compresso import whole_files
from compresso.eval_table import markdown
from compresso.paired import Difference, difference, together
from compresso.schemas import EVALUATION, SCHEMA, parse
from compresso.suites import SUITES, averaged, metric_of

PARTS = ("models", "results", "averages", "cost", "left_out", "versions")
POOLED = (
    *("shots", "version", "window", "limit", "precision", "seed", "lm_eval"),
    *("prompt", "prompt_format", "chat_template"),
)
"""What the parts of a group have in common."""
ASKED = ("prompt", "prompt_format", "chat_template", "precision")
"""What the tasks of an average have in common."""
TABLE_HEAD = "| task |"


def read(path: Path) -> dict[str, Any]:
    """The contents of a file of ours; an empty one if there is none.

    Raises ValueError if the file is something else, which is then not replaced.
    """
    if not path.exists():
        return {"schema": SCHEMA, **{part: {} for part in PARTS}, "comparisons": []}
    try:
        text = path.read_bytes()
        parse(text, EVALUATION, str(path))
        found = json.loads(text)
        if any(not isinstance(found[part], dict) for part in PARTS):
            raise KeyError
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not an eval.json of this version ({SCHEMA}), so it is not replaced; choose another --output "
            f"({error})"
        ) from None
    for name in found["models"]:
        found["results"].setdefault(name, {})
    return found


def check_writable(path: Path) -> None:
    """Raise ValueError if the file or the table beside it cannot be written, or the table is somebody else's."""
    table = path.with_suffix(".md")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
        if table.exists() and not table.read_text(encoding="utf-8", errors="replace").startswith(TABLE_HEAD):
            raise ValueError(f"{table}, where the table would go, is another text; choose another --output")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def enter(found: dict[str, Any], name: str, about: dict[str, Any]) -> None:
    """Name a model; figures of other weights under that name are dropped."""
    if found["models"].get(name, {}).get("fingerprint") != about["fingerprint"]:
        found["results"][name] = {}
        found["cost"].pop(name, None)
    found["models"][name] = about


def write(found: dict[str, Any], path: Path) -> None:
    """Derive groups, averages and comparisons, and write the file and the table beside it."""
    for results in found["results"].values():
        _add_groups(results)
    found["averages"] = {name: _averages(results) for name, results in found["results"].items()}
    pairs = itertools.combinations(found["models"], 2)
    found["comparisons"] = [row for a, b in pairs for row in _compare(found, a, b)]
    for target, text in (
        (path, json.dumps(found, indent=1, allow_nan=False)),
        (path.with_suffix(".md"), markdown(found)),
    ):
        whole_files.write(target, f"{text}\n".encode())


def _groups(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Parts of each group, in order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in results.values():
        if entry.get("group"):
            groups.setdefault(entry["group"], []).append(entry)
    return groups


def _add_groups(results: dict[str, Any]) -> None:
    for name in [name for name, entry in results.items() if "parts" in entry]:
        del results[name]  # made anew, if all its parts are there
    for name, parts in _groups(results).items():
        if len(parts) != parts[0].get("group_parts") or any(p[key] != parts[0][key] for p in parts for key in POOLED):
            continue
        metrics: dict[str, Any] = {}
        for metric in parts[0]["metrics"]:
            values = [part["metrics"].get(metric) for part in parts]
            if all(value is not None and value["scores"] for value in values):
                metrics[metric] = _pooled(parts, values)
        if not metrics:
            continue
        metric = parts[0]["metric"] if parts[0]["metric"] in metrics else next(iter(metrics))
        results[name] = {
            "metric": metric,
            "value": metrics[metric]["value"],
            "stderr": metrics[metric]["stderr"],
            "n": sum(part["n"] for part in parts),
            "cut": sum(part["cut"] for part in parts),
            "parts": len(parts),
            "group_size": parts[0]["group_size"],
            "equal_parts": parts[0]["equal_parts"],
            "seconds": round(sum(part["seconds"] for part in parts), 2),
            **{key: parts[0][key] for key in POOLED},
            "metrics": metrics,
        }


def _pooled(parts: list[dict[str, Any]], values: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over parts that count the same, or over documents, and its standard error."""
    weights = _weights(parts)
    shares = [weight / sum(weights) for weight in weights]
    value = sum(share * v["value"] for share, v in zip(shares, values, strict=True))
    errors = [v["stderr"] for v in values]
    stderr = None if None in errors else sum((s * e) ** 2 for s, e in zip(shares, errors, strict=True)) ** 0.5
    return {"value": value, "stderr": stderr}


def _weights(parts: Sequence[dict[str, Any]]) -> list[float]:
    return [1.0 if part["equal_parts"] else float(part["n"]) for part in parts]


def _averages(results: dict[str, Any]) -> dict[str, Any]:
    """Of the suites all of whose tasks were measured."""
    found = {}
    for suite in SUITES:
        tasks = averaged(suite)
        if not tasks or any(task not in results for task in tasks):
            continue
        asked = [results[task] for task in tasks]
        entries = [entry["metrics"].get(metric_of(suite, task)) for entry, task in zip(asked, tasks, strict=True)]
        if None in entries or any(entry[key] != asked[0][key] for entry in asked for key in ASKED):
            continue
        errors = [entry["stderr"] for entry in entries]
        found[suite] = {
            "value": sum(entry["value"] for entry in entries) / len(entries),
            "stderr": None if None in errors else sum(e**2 for e in errors) ** 0.5 / len(errors),
            "metric": "acc_norm where it exists" if suite == "llm-pruner" else "acc",
            "tasks": list(tasks),
            "n": sum(entry["n"] for entry in asked),
            "shots": "/".join(dict.fromkeys(str(entry["shots"]) for entry in asked)),
            **{key: asked[0][key] for key in ASKED},
        }
    return found


def _compare(found: dict[str, Any], a: str, b: str) -> list[dict[str, Any]]:
    """Paired differences of two models in all that both were measured on alike."""
    first, second = found["results"].get(a, {}), found["results"].get(b, {})
    rows = []
    pairs = {task: (first[task], second[task]) for task in first if task in second}
    single = {task: _difference(x, y, y["metric"]) for task, (x, y) in pairs.items() if "documents" in y}
    for task, (x, y) in pairs.items():
        done: Difference | None = single.get(task)
        if "parts" in y:
            names = [t for t, e in second.items() if e.get("group") == task]
            differences = [single.get(t) for t in names]
            if x.get("parts") == y["parts"] and all(differences):
                done = together([d for d in differences if d], _weights([second[t] for t in names]))
        if done:
            rows.append(_row(a, b, task, y["metric"], done))
    for suite in found["averages"].get(a, {}):
        if suite in found["averages"].get(b, {}):
            tasks = averaged(suite)
            parts = [_difference(first[task], second[task], metric_of(suite, task)) for task in tasks]
            if all(parts):
                metric = found["averages"][a][suite]["metric"]
                rows.append(_row(a, b, suite, metric, together([d for d in parts if d], [1.0] * len(parts))))
    return rows


def _difference(a: dict[str, Any], b: dict[str, Any], metric: str | None) -> Difference | None:
    """None unless both were scored by the same metric on the same documents."""
    if a.get("documents") != b.get("documents") or metric not in a["metrics"] or metric not in b["metrics"]:
        return None
    x, y = a["metrics"][metric]["scores"], b["metrics"][metric]["scores"]
    return difference(x, y) if x and y and len(x) == len(y) > 1 else None


def _row(a: str, b: str, task: str, metric: str, found: Difference) -> dict[str, Any]:
    facts = asdict(found)
    del facts["variance"]
    return {"a": a, "b": b, "task": task, "metric": metric, **facts}
