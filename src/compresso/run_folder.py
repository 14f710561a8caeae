"""A run folder, file by file: what is whole, what is damaged, what can be continued, and what to run next."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compresso import checkpoint, eval_file, progress, savepoints, whole_files
from compresso import plan as plans
from compresso.config import PruneConfig, nearest_path, read_yaml
from compresso.families import FAMILIES, PER_LAYER_PREFIX, Family
from compresso.findings import Finding, command
from compresso.one_at_a_time import alone_in
from compresso.schemas import METRICS, SUMMARY, parse
from compresso.streamed import StoredWeights, shapes_of

ALSO = "also"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError)


@dataclass(frozen=True)
class Part:
    """A file or folder of a run: how it is read, and what mends it."""

    name: str
    read: Callable[[Path], str]
    """A few words about what it holds. Raises one of UNREADABLE if it is damaged."""
    mend: str
    """RUN stands for the folder."""


def examine(folder: Path) -> list[Finding]:
    """What is in a run folder, the last one telling what to run next; or in a checkpoint folder.

    Raises FileNotFoundError or ValueError for a path that is neither.
    """
    if not folder.is_dir():
        what = f"{folder} is a file, no run folder" if folder.exists() else f"no run folder {folder}"
        raise FileNotFoundError(f"{what}{nearest_path(folder)}")
    if (folder / "config.json").is_file():
        return [_look(folder, Part("", _checkpoint, "copy or download it again"))]
    there = [part for part in PARTS if (folder / part.name).exists()]
    if not there:
        raise ValueError(
            f"{folder} is no run folder of `compresso prune`: it holds none of {', '.join(part.name for part in PARTS)}"
        )
    found = {part.name: _look(folder, part) for part in there}
    found |= {finding.name: finding for finding in _leftovers(folder)}
    saved = _saved(folder)
    found |= {finding.name: finding for finding in saved}
    for run in sorted(path for path in (folder / ALSO).glob("*") if path.is_dir()):
        wrong = [finding.name for finding in examine(run) if finding.state == "wrong"]
        name = f"{ALSO}/{run.name}"
        told = f"wrong in it: {', '.join(wrong)}" if wrong else "a run of its own, whole"
        found[name] = Finding(name, "wrong" if wrong else "good", told, command("doctor", run) if wrong else "")
    return [*found.values(), _next(folder, found, [finding.name for finding in saved if finding.state == "good"])]


def _look(folder: Path, part: Part) -> Finding:
    try:
        return Finding(part.name or str(folder), "good", part.read(folder / part.name))
    except UNREADABLE as error:
        mend = part.mend.replace("RUN", command(folder).removeprefix("compresso "))
        return Finding(part.name or str(folder), "wrong", checkpoint.first_line(error), mend)


def _settings(path: Path) -> str:
    config = PruneConfig(**read_yaml(path))
    return f"{config.model}, {config.method}, {100 * config.target_sparsity:g} % to remove"


def _object(path: Path) -> dict[str, Any]:
    found = parse(path.read_bytes(), {}, str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found


def _environment(path: Path) -> str:
    versions = _object(path).get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)


def _metrics(path: Path) -> str:
    lines = path.read_bytes().splitlines()
    rows = [parse(line, METRICS, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    steps = Counter(row["stage"] for row in rows)
    return ", ".join(f"{count} steps of {stage}" for stage, count in steps.items()) or "no step yet"


def _plan(path: Path) -> str:
    return f"{100 * plans.load(path.parent).sparsity:.1f} % removed"


def _checkpoint(folder: Path) -> str:
    """Config, tokenizer, and the headers of all weight files, which must hold every tensor that the config asks for."""
    config = AutoConfig.from_pretrained(checkpoint.find(str(folder), any_family=True), trust_remote_code=False)
    family = FAMILIES.get(config.model_type.removeprefix(PER_LAYER_PREFIX), Family())
    weights, shapes = StoredWeights(folder, family), shapes_of(config)
    tied = set(getattr(shapes, "all_tied_weights_keys", None) or {})
    if missing := [name for name, _ in shapes.named_parameters() if name not in weights and name not in tied]:
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    checkpoint.load_tokenizer(str(folder))
    count = sum(parameter.numel() for parameter in shapes.parameters())
    return f"{count / 1e6:,.1f} M parameters, {checkpoint.weight_bytes(folder) / 1e6:,.0f} MB"


def _progress(path: Path) -> str:
    now = progress.read(path.parent)
    return f"{now.doing} is {'done' if now.done else 'unfinished'}"


def _summary(path: Path) -> str:
    loss = parse(path.read_bytes(), SUMMARY, str(path))["loss"]
    return "loss " + ", ".join(f"{stage} {loss[stage]:.3f}" for stage in ("dense", "cut", "recovered") if stage in loss)


def _page(path: Path) -> str:
    if not path.read_bytes().rstrip().endswith(b"</html>"):
        raise ValueError("it breaks off")
    return "whole"


def _evaluation(path: Path) -> str:
    found = eval_file.read(path)
    return f"{len(found['models'])} models, {sum(map(len, found['results'].values()))} figures"


AGAIN = "compresso prune --config RUN/config.yaml --overwrite"
PARTS = (
    Part("config.yaml", _settings, "restore it; other commands read it"),
    Part("env.json", _environment, "restore it, or write `{}` into it; it tells only about the machine"),
    Part("metrics.jsonl", _metrics, "remove the line that is named; reports need whole ones"),
    Part("progress.json", _progress, f"a run cannot go on without it; run it again: {AGAIN}"),
    Part("plan.json", _plan, f"restore it and plan.safetensors, or run it again: {AGAIN}"),
    Part(
        "cut", _checkpoint, f"restore it, go on without it (compresso recover RUN --further), or run it again: {AGAIN}"
    ),
    Part("model", _checkpoint, "compresso recover RUN"),
    Part("summary.json", _summary, f"restore it, or run it again: {AGAIN}"),
    Part("report.html", _page, "compresso report RUN"),
    Part("eval.json", _evaluation, "remove it, then `compresso evaluate RUN` measures again"),
)
"""In the order in which a run writes them."""


def _leftovers(folder: Path) -> list[Finding]:
    told = "left by a command that was stopped while it wrote"
    return [Finding(path.name, "note", told, f"rm -r {path}") for path in whole_files.leftovers(folder)]


def _saved(folder: Path) -> list[Finding]:
    """The checkpoints to go on from, the newest first."""
    places = [place for place in (folder / savepoints.FOLDER).glob("[!.]*-*") if place.is_dir()]
    unfinished = whole_files.leftovers(folder / savepoints.FOLDER)
    found = [Finding(f"{savepoints.FOLDER}/{p.name}", "note", "unfinished", f"rm -r {p}") for p in unfinished]
    for place in sorted(places, key=lambda place: _age(place), reverse=True):
        name = f"{savepoints.FOLDER}/{place.name}"
        try:
            savepoints.read(place)
            size = sum(file.stat().st_size for file in place.iterdir())
            found.append(Finding(name, "good", f"whole, {size / 1e6:,.0f} MB"))
        except savepoints.Damaged as error:
            found.append(Finding(name, "wrong", str(error), f"rm -r {place}"))
    return found


def _age(place: Path) -> tuple[bool, int]:
    """Recovery follows pruning, and a later step an earlier one."""
    stage, _, step = place.stem.rpartition("-")
    return stage == "recover", int(step) if step.isdecimal() else -1


def _next(folder: Path, found: dict[str, Finding], saved: list[str]) -> Finding:
    """How far the run came, and the command that goes on from there."""
    good = {name for name, finding in found.items() if finding.state == "good"}
    if {"config.yaml", "progress.json"} <= good and not progress.read(folder).done:
        where = f"{saved[0]} is the newest checkpoint that is whole" if saved else "no checkpoint was written yet"
        try:
            with alone_in(folder):
                told = f"the run is unfinished; {where}"
                return Finding("next", "wrong", told, command("prune", "--resume", folder))
        except ValueError:
            return Finding("next", "good", f"a command is at work in it; {where}")
    recovered = "summary.json" in good and "recovered" in json.loads((folder / "summary.json").read_bytes())["loss"]
    if recovered and "model" in good:
        wrong = [name for name, finding in found.items() if finding.state == "wrong"]
        told = f"the run is finished{'; damaged: ' + ', '.join(wrong) if wrong else ''}"
        return Finding("next", "good", f"{told}: {command('chat', folder)}")
    if {"config.yaml", "plan.json", "cut", "summary.json"} <= good:
        what = "the recovered model is damaged or gone" if recovered else "the model is cut and not recovered"
        return Finding("next", "wrong", what, command("recover", folder))
    model = PruneConfig(**read_yaml(folder / "config.yaml")).model if "config.yaml" in good else "MODEL"
    if "plan.json" in good and model != "demo" and not model.endswith(".gguf"):
        told = "it was decided what to remove; the model was not saved, and what its weights learned on the way is lost"
        return Finding("next", "wrong", told, command("extract", model, folder, "--output", f"{folder}-cut"))
    if "config.yaml" in good:
        again = command("prune", "--config", folder / "config.yaml", "--overwrite")
        return Finding("next", "wrong", "the run is unfinished, and nothing of it can be continued", again)
    return Finding("next", "wrong", "nothing of it can be continued", command("prune", "--help"))
