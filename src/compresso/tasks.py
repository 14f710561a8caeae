"""What a user asks for as lm-eval's tasks: its own task files, with its documents or local ones.

`plan_tasks` turns names into a list of `Wanted`, without building or downloading
anything; `build` makes lm-eval's task object of one of them.
"""

import difflib
import functools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from compresso import hub, task_files
from compresso.prompts import MMLU_SENTENCE
from compresso.suites import ALIASES, SUITES, metric_of

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Wanted:
    """One figure to measure: a task of lm-eval, or the perplexity of a text."""

    name: str
    """In results: of a part of a group, GROUP/TASK."""
    registered: str = ""
    """In lm-eval; empty for a text."""
    group: str | None = None
    """The name, in results, of the group that it is part of."""
    parts: tuple[int, int] = (0, 0)
    """How many parts of the group are measured, and how many it has."""
    equal_parts: bool = False
    """Whether each part of the group counts the same, whatever its size."""
    metric: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Local documents, by split."""
    definition: Path | None = None
    """A task file of the user's."""

    @property
    def few_shot(self) -> bool:
        """Whether it is of MMLU or BBH, before which the paper put its prompt in another form."""
        return self.group in ("mmlu", "bbh")


class Unknown(ValueError):
    """No suite, task, group or tag of that name."""


def task_manager(data_dir: Path | None) -> TaskManager:
    """lm-eval's index of tasks, with the task files that lie in `data_dir`. Raises ValueError if one would run code."""
    task_files.sandbox_templates()
    if data_dir is not None and task_files.check(data_dir):
        return TaskManager(include_path=str(data_dir))
    return _official()


@functools.cache
def _official() -> TaskManager:
    """Thousands of files are read for it."""
    return TaskManager()


def plan_tasks(
    asked: list[str], manager: TaskManager | None, data_dir: Path | None
) -> tuple[list[Wanted], dict[str, str]]:
    """What to measure for the suites and tasks asked for, and what is left out for lack of a file, with the reason.

    Raises Unknown, with the nearest names. `manager` may be None if only texts are asked for.
    """
    wanted: dict[str, Wanted] = {}
    left_out: dict[str, str] = {}
    for name in asked:
        for task in SUITES.get(name, (name,)):
            metric = metric_of(name, task)
            for part in [Wanted(task)] if "@" in task else _parts(task, metric, manager):
                found = part
                if data_dir is not None and part.registered:
                    try:
                        found = _with_local_files(part, data_dir, manager)
                    except (OSError, ValueError) as error:
                        left_out[part.name] = str(error)
                        continue
                wanted.setdefault(part.name, found)
    there = Counter(part.group for part in wanted.values())
    planned = [
        replace(part, parts=(there[part.group], part.parts[1])) if part.group else part for part in wanted.values()
    ]
    return planned, _by_group(left_out, there)


def _by_group(left_out: dict[str, str], there: Counter[str | None]) -> dict[str, str]:
    """One reason for a group all or some of whose parts are left out."""
    found: dict[str, str] = {}
    for name, reason in left_out.items():
        group, slash, _ = name.partition("/")
        if not slash:
            found[name] = reason
        elif group not in found:
            missing = sum(other.startswith(group + "/") for other in left_out)
            found[group] = f"{missing} of its {missing + there[group]} parts; the first: {reason}"
    return found


def check_names(asked: list[str], manager: TaskManager | None) -> None:
    """Raise Unknown for the first name that is nothing, with the nearest ones."""
    for name in asked:
        text, at, window = name.partition("@")
        if at and (text not in ("wikitext2", "ptb", "c4") or not window.isdecimal() or int(window) < 16):
            raise Unknown(
                f"{name!r} is no perplexity; write wikitext2, ptb or c4, @, and the window in tokens, at least 16"
            )
        if at or name in SUITES or name in ALIASES or (manager is not None and name in manager.task_index):
            continue
        known = list(dict.fromkeys([*SUITES, *ALIASES, *(manager.all_tasks if manager else [])]))
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise Unknown(f"unknown suite or task {name!r}{hint}. Suites are {', '.join(SUITES)}")


def _parts(task: str, metric: str | None, manager: TaskManager | None) -> Iterator[Wanted]:
    """The leaves of a task, group or tag of lm-eval."""
    assert manager is not None
    registered = ALIASES[task].lm_eval if task in ALIASES else task
    leaves = list(_leaves(registered, manager))
    if leaves == [registered]:
        yield Wanted(task, registered, metric=metric)
        return
    equal = task == "bbh" or not _weighted(registered, manager)
    for leaf in leaves:
        yield Wanted(f"{task}/{leaf}", leaf, task, (len(leaves), len(leaves)), equal, metric)


def _leaves(name: str, manager: TaskManager) -> Iterator[str]:
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _leaves(task, manager)
    elif entry.kind.name == "GROUP":
        for child in (entry.cfg or {}).get("task", []):
            if isinstance(child, dict):
                child = child.get("task") or child.get("group")
            if child not in manager.task_index:
                raise ValueError(f"group {name!r} of lm-eval defines {child!r} inside itself; ask for single tasks")
            yield from _leaves(child, manager)
    else:
        yield name


def _weighted(group: str, manager: TaskManager) -> bool:
    metrics = (manager.task_index[group].cfg or {}).get("aggregate_metric_list") or [{}]
    metrics = metrics if isinstance(metrics, list) else [metrics]
    return bool(metrics[0].get("weight_by_size", True))


def _with_local_files(part: Wanted, data_dir: Path, manager: TaskManager | None) -> Wanted:
    """The task with its files by split; one that the folder itself defines says where they are.

    Raises FileNotFoundError if there is none, ValueError if one is damaged.
    """
    assert manager is not None
    path = manager.task_index[part.registered].yaml_path
    if path is not None and path.resolve().is_relative_to(data_dir.resolve()):
        return replace(part, definition=path)
    folders = [data_dir, data_dir / "eval"]
    own = part.name.rpartition("/")[2]
    names = list(dict.fromkeys([f"{own}.jsonl", f"{part.registered}.jsonl"]))
    dev = None
    if part.group == "mmlu" or part.registered.startswith("mmlu_"):
        subject = part.registered.removeprefix("mmlu_")
        names, dev = [f"mmlu/{subject}.jsonl"], f"mmlu_dev/{subject}.jsonl"
    elif part.registered.startswith("bbh_fewshot_"):
        names = [f"bbh/{part.registered.removeprefix('bbh_fewshot_')}.jsonl"]
    for folder in folders:
        for name in names:
            if (folder / name).is_file() and (dev is None or (folder / dev).is_file()):
                files = {"test": str(folder / name), **({"dev": str(folder / dev)} if dev else {})}
                for file in files.values():
                    _check_documents(Path(file))
                return replace(part, files=files)
    wanted = " or ".join(names) + (f", and {dev}," if dev else "")
    raise FileNotFoundError(f"no file {wanted} in the folder of --data-dir or its eval/")


def _check_documents(file: Path) -> None:
    """Raise ValueError, naming the line, unless a file holds an object in JSON a line."""
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError
            except (ValueError, RecursionError):
                raise ValueError(f"{file.name}, line {number} is not an object in JSON") from None
    if not number:
        raise ValueError(f"{file.name} is empty")


def build(wanted: Wanted, manager: TaskManager, prompted: bool) -> Task:
    """lm-eval's task, with local documents and, after a prompt in the paper's form, the paper's words about it."""
    changes: dict[str, Any] = {"task": wanted.registered}
    if wanted.files:
        changes |= {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": wanted.files},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": "dev" if "dev" in wanted.files else None,
        }
    if wanted.group == "mmlu":
        changes["num_fewshot"] = 5
        if prompted:
            introduction = (manager.task_index[wanted.registered].cfg or {})["description"]
            changes["description"] = introduction.rstrip("\n") + MMLU_SENTENCE + "\n\n"
    if wanted.group == "bbh":
        changes["filter_list"] = [
            {"name": "none", "filter": [{"function": "take_first"}]},
            {"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        ]
    place = str((manager.task_index[wanted.registered].cfg or {}).get("dataset_path"))

    def load() -> Task:
        (task,) = manager.load([{"group": "one", "task": [changes]}])["tasks"].values()
        return task

    task = load() if wanted.files or "/" not in place else hub.fetch(place, load, "dataset")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    return task
