"""From a checkpoint to a smaller one: the steps of `compresso prune` and `compresso recover`, in order."""

import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import PreTrainedModel

from compresso import checkpoint, progress, savepoints, setbacks, tuning, whole_files
from compresso import plan as plans
from compresso.config import PruneConfig, changed, nearest, nearest_path, read_yaml
from compresso.cost import measure_costs
from compresso.environment import versions
from compresso.identity import check_unchanged, digest_records
from compresso.launch import check_in_parts
from compresso.measured import score
from compresso.methods import METHODS
from compresso.one_at_a_time import alone_in
from compresso.output_folder import write_config
from compresso.plan import Plan
from compresso.prepare import prepare
from compresso.progress import Progress
from compresso.recovery import recover_smaller
from compresso.schemas import SUMMARY as SUMMARY_SCHEMA
from compresso.schemas import parse
from compresso.shape import count_prunable
from compresso.streamed import count_parameters
from compresso.streams import without
from compresso.summary import show
from compresso.usable_records import read_records
from compresso.verified import cut_files, extract_checked, save_checked
from compresso.workbench import (
    METRICS,
    NO_CHECKPOINTS,
    Workbench,
    compute_dtype,
    console,
    release_memory,
    status,
)

SUMMARY = "summary.json"
ALSO = "also"  # folder in a run: the smaller models on the way, each a run of its own
RECOVERY = (
    *("recover_steps", "preset", "data", "stream", "self_records", "own_share", "batch_size", "accumulation"),
    *("learning_rate", "distill", "clip", "tune", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    *("gradient_checkpointing", "checkpoint_seconds", "checkpoints", "seed", "sample"),
)
"""Settings that a recovery may change; the others are those of the run."""


def prune(config: PruneConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Prune a model as `compresso prune` does and return what summary.json holds.

    Settings are those of `PruneConfig`, by name. Everything that can be wrong with them,
    the checkpoint or the data is raised, as FileNotFoundError or ValueError, before the
    run folder is touched; stopping.Stopped tells what a run that ended early has kept.
    """
    config = PruneConfig(**changed(vars(config) if config else {}, settings))
    with ExitStack() as held:
        return _to_the_end(Path(config.output), lambda: (prepare(config, held=held), _prune))


def resume(run: str) -> dict[str, Any]:
    """Go on with a run that was stopped, by whatever and wherever, as `compresso prune --resume` does.

    On a CPU the result is that of a run that was never stopped, bit for bit. Raises FileNotFoundError or ValueError if
    there is nothing to go on with, or model, records or launch are others than before.
    """
    folder = Path(run)
    whole_files.heal(folder)
    if progress.read(folder).done:
        console.print(f"{folder} is finished; nothing is left to do", markup=False, highlight=False)
        return _read_summary(folder)
    with alone_in(folder):
        return _to_the_end(folder, partial(_again, folder))


Work = tuple[Workbench, Callable[[Workbench], dict[str, Any]]]


def _to_the_end(folder: Path, begin: Callable[[], Work]) -> dict[str, Any]:
    """Do the work of a command; after a setback that can be met, go on from the last checkpoint.

    Nobody else holds the workbench, so that its model is gone before the next one is read.
    """
    bench, work = begin()
    while True:
        try:
            return work(bench)
        except (KeyboardInterrupt, OSError, SafetensorError) as error:
            raise setbacks.stopped(folder, error) from error
        except Exception as error:
            console.print(setbacks.meet(folder, bench.config, error, bench.accelerator), markup=False, highlight=False)
        del bench  # what it holds must go before it is read again
        release_memory()
        bench, work = _again(folder)


def _again(folder: Path) -> Work:
    """What is needed to go on with a run, from its folder alone."""
    now = progress.read(folder)
    config = PruneConfig(**{**read_yaml(folder / "config.yaml"), "output": str(folder)})
    for name in ("cut", "model"):
        whole_files.heal(folder / name)
    if now.doing == "prune" and not (folder / SUMMARY).exists():
        return prepare(config, progress=now), _prune
    return _ready_to_recover(config, now), _recover_again


def _prune(bench: Workbench) -> dict[str, Any]:
    """From the dense model to the smaller one, recovered."""
    config = bench.config
    dense = {**score(bench, bench.model, 0.0), "bytes": bench.parameters * bench.facts["stored_dtype"].itemsize}
    bench.leave = partial(_leave, bench, dense)
    model, plan = METHODS[config.method](bench)
    plan = Plan(plan.shape, broadcast_object_list([plan.gates])[0])  # GPUs round in their own order
    smaller, summary = _cut(bench, model, plan, dense)
    bench.model = model = smaller  # the dense weights are not needed any more
    release_memory()
    summary["operations"] = dict(bench.facts.get("operations", {}))
    summary["seconds"] = time.perf_counter() - bench.began
    summary["checkpoints"] = bench.facts.get("checkpoints", NO_CHECKPOINTS)
    _write(bench, summary)  # from here on a run that stops goes on with its recovery
    if bench.writes:
        savepoints.remove(bench.folder, "prune")
    if config.recover_steps:
        recover_smaller(bench, smaller, plan, summary)
    else:
        _unrecovered(bench, summary)
    return _finish(bench, summary)


def recover(run: str, *, further: bool = False, **settings: Any) -> dict[str, Any]:
    """Train the smaller model of a run again and return the new summary.

    It starts from the cut model, as the run itself did, or with `further` from what the
    last recovery reached. `settings` (of RECOVERY) replace those of the run's config.yaml.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}{nearest_path(folder)}")
    for name in ("config.yaml", SUMMARY, "plan.json", "model" if further else "cut"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder} has no {name}; `compresso recover` needs a run of `compresso prune` whose model has been "
                f"cut. `compresso doctor {folder}` tells what can be continued"
            )
    if unknown := [name for name in settings if name not in RECOVERY]:
        raise ValueError(
            f"a recovery does not take {unknown[0]}{nearest(unknown[0], RECOVERY)}; it may change "
            f"{', '.join(RECOVERY)}, and takes the rest from {folder / 'config.yaml'}"
        )
    of_run = PruneConfig(**{**read_yaml(folder / "config.yaml"), "output": str(folder)})
    wanted = PruneConfig(**changed(vars(of_run), settings))
    settings = {name: getattr(wanted, name) for name in settings}  # in their own types, as they are written
    if not wanted.recover_steps:
        raise ValueError("--recover-steps is 0: there is nothing to do; say how many (--recover-steps 600)")
    if "data" in settings and wanted.records == "self" and not (folder / "self.jsonl").exists():
        raise ValueError(
            f"{folder} has no self.jsonl: its model wrote no records before it was cut, and what is left of it should "
            "not; --own-share 0.5 mixes in texts that the dense model writes"
        )
    now = Progress(doing="recover", settings=settings, further=further)
    with alone_in(folder):
        return _to_the_end(folder, lambda: (_ready_to_recover(of_run, now, begins=True), _recover_again))


def _read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run. Raises ValueError if it is damaged."""
    content = (folder / SUMMARY).read_bytes()
    parse(content, SUMMARY_SCHEMA, str(folder / SUMMARY))
    return json.loads(content)


def _ready_to_recover(of_run: PruneConfig, now: Progress, begins: bool = False) -> Workbench:
    """The smaller model of a run, with all that its recovery needs; `begins` if it is not one that goes on."""
    folder = Path(of_run.output)
    config = PruneConfig(**changed(vars(of_run), now.settings))
    summary = _read_summary(folder)
    base = folder / "cut"
    if now.further:  # the model that it starts from is replaced before it is done
        base = folder / savepoints.FOLDER / "start"
        if begins:
            base = folder / "model"
    bench = prepare(of_run, source=base, progress=now, begins=begins)  # its held-out records stay held out
    if bench.place:
        check_in_parts(config, split=config.precision != "4bit")
    bench.config = config
    if "data" in now.settings:
        with bench.accelerator.main_process_first():
            sources = read_records(config, bench.model, bench.encoder, bench.prompt)
        bench.sources = without(sources, bench.held_out)
        check_unchanged(now, {"records of the recovery": digest_records(bench.sources, [])}, folder)
    bench.parameters, bench.prunable = summary["parameters"]["before"], summary["prunable_parameters"]["before"]
    bench.tune = tuning.chosen(config, bench.parameters, bench.place is None)  # as the run itself chose
    if now.doing == "prune":
        bench.began -= summary["seconds"]
    bench.facts["checkpoints"] = summary.get("checkpoints", NO_CHECKPOINTS)
    bench.facts["vocabulary"] = summary.get("vocabulary")
    if begins and bench.writes:
        _begin_recovery(bench, base)
    bench.accelerator.wait_for_everyone()
    return bench


def _begin_recovery(bench: Workbench, base: Path) -> None:
    """Leave in the run folder what says that it is being recovered, from where."""
    folder, now = bench.folder, bench.progress
    savepoints.remove(folder)
    if now.further:
        with whole_files.new_folder(folder / savepoints.FOLDER / "start") as new:
            shutil.copytree(base, new, copy_function=_link, dirs_exist_ok=True)
    now.rows = _metrics_rows(folder / METRICS, of_recovery=now.further)
    now.write(folder)


def _recover_again(bench: Workbench) -> dict[str, Any]:
    """The recovery of a run whose cut model is there."""
    summary = _read_summary(bench.folder)
    now = bench.progress
    if now.doing == "recover":
        summary["recovery"] = {**now.settings, "further": now.further}
    if bench.config.recover_steps:
        recover_smaller(bench, bench.model, plans.load(bench.folder), summary)
    else:
        _unrecovered(bench, summary)
    return _finish(bench, summary)


def _cut(
    bench: Workbench, model: PreTrainedModel, plan: Plan, dense: dict[str, Any], timed: bool = True
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Save the plan, cut the model by it, check, score and save the smaller one; it and the summary so far."""
    config = bench.config
    if bench.writes:
        plans.save(plan, bench.folder, {"method": config.method, "model": config.model, "seed": config.seed})
    cost: dict[str, Any] = {}
    if bench.place:
        smaller, difference = cut_files(bench, model, plan, plan.sparsity, bench.folder / "cut")
    else:
        checkpoint.cast(model, torch.float32)  # so that a difference is a mistake and no rounding
        smaller, difference = extract_checked(bench, model, plan)
        dtype = compute_dtype(config.precision, bench.accelerator.device)
        checkpoint.cast(model, dtype)
        checkpoint.cast(smaller, dtype)
        if timed:
            with status("measuring tokens/s, dense and pruned in turn"):
                cost = {"cost": measure_costs({"before": model, "after": smaller})}
    cut = score(bench, smaller, plan.sparsity)
    summary: dict[str, Any] = {
        "model": config.model,
        "method": config.method,
        "units": list(config.units),
        "target_sparsity": config.target_sparsity,
        "sparsity": plan.sparsity,
        "parameters": {"before": bench.parameters, "after": count_parameters(smaller.config)},
        "prunable_parameters": {"before": bench.prunable, "after": count_prunable(smaller)},
        "bytes": {"before": dense["bytes"]},
        "max_logit_difference": difference,
        "logit_differences": {"gated_extracted": difference},
        "loss": {"dense": dense["loss"], "cut": cut["loss"]},
        "perplexity": {"dense": dense["perplexity"], "cut": cut["perplexity"]},
        "perplexity_window": bench.windows.shape[1],
        "sample": {"question": config.sample, "dense": dense["answer"], "cut": cut["answer"]},
        **cost,
        "kept_gates": bench.facts.get("kept_gates"),
        "vocabulary": bench.facts.get("vocabulary"),
        "hidden_size": {"before": plan.shape.hidden_size, "after": len(plan.keep["hidden"][0])},
        "widths": plan.widths(),
        "seed": config.seed,
        "versions": versions(),
    }
    if not bench.place:
        save_checked(bench, smaller, bench.folder / "cut", summary)
    return smaller, summary


def _leave(bench: Workbench, dense: dict[str, Any], model: PreTrainedModel, plan: Plan, target: float) -> None:
    """Save what is cut out of a model on its way to the target, as a run of its own.

    One that has been recovered since, while this run was stopped, stays as it is.
    """
    began = time.perf_counter()
    folder = bench.folder / ALSO / f"{target:g}"
    if (folder / progress.FILE).exists():
        console.print(f"{folder} is there, and was recovered; it stays as it is", markup=False, highlight=False)
        return
    config = replace(bench.config, output=str(folder), target_sparsity=target, also=())
    own = replace(bench, config=config, folder=folder, facts=dict(bench.facts))
    if bench.writes:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped here
        folder.mkdir(parents=True)
        write_config(config, folder)
        for name in ("env.json", "metrics.jsonl", "self.jsonl"):
            if (bench.folder / name).exists():
                shutil.copy(bench.folder / name, folder)
    _, summary = _cut(own, model, plan, dense, timed=False)
    summary["operations"] = dict(bench.facts.get("operations", {}))
    _unrecovered(own, summary)
    summary["seconds"] = time.perf_counter() - began
    summary["bytes"]["after"] = checkpoint.weight_bytes(folder / "model")
    summary["peak_memory_bytes"] = _peak_memory(bench.accelerator.device)
    _write(own, summary)
    line = f"{folder}: {100 * plan.sparsity:.1f}% removed, loss {summary['loss']['cut']:.3f}, for `compresso recover`"
    console.print(line, markup=False, highlight=False)


def _unrecovered(bench: Workbench, summary: dict[str, Any]) -> None:
    """The cut model is the result."""
    if bench.writes:
        with whole_files.new_folder(bench.folder / "model") as new:
            shutil.copytree(bench.folder / "cut", new, dirs_exist_ok=True)
    bench.accelerator.wait_for_everyone()
    for key in ("loss", "perplexity", "sample"):
        summary[key]["recovered"] = summary[key]["cut"]


def _finish(bench: Workbench, summary: dict[str, Any]) -> dict[str, Any]:
    summary["bytes"]["after"] = checkpoint.weight_bytes(bench.folder / "model")
    summary["peak_memory_bytes"] = _peak_memory(bench.accelerator.device)
    summary["checkpoints"] = bench.facts.get("checkpoints", NO_CHECKPOINTS)
    summary["setbacks"] = bench.progress.setbacks
    which = "seconds" if bench.progress.doing == "prune" else "recovery_seconds"
    before = summary.get(which, 0.0) if bench.progress.further else 0.0
    summary[which] = before + time.perf_counter() - bench.began
    _write(bench, summary)
    bench.accelerator.end_training()
    show(summary, bench.folder, console)
    if bench.writes:
        _report(bench.folder)
        bench.progress.done = True
        bench.progress.write(bench.folder)
        savepoints.remove(bench.folder)
    return summary


def _report(folder: Path) -> None:
    """Write the page of the run; the run is whole without it."""
    from compresso.report import report  # matplotlib takes a second to import

    try:
        with status("writing the report"):
            page = report([folder])
        console.print(f"The report is {page}", markup=False, highlight=False)
    except (ValueError, OSError) as error:
        console.print(f"No report was written: {error}", markup=False, highlight=False)


def _write(bench: Workbench, summary: dict[str, Any]) -> None:
    if not bench.writes:
        return
    whole_files.write(bench.folder / SUMMARY, f"{json.dumps(summary, indent=2)}\n".encode())


def _metrics_rows(metrics: Path, of_recovery: bool) -> int:
    """Rows that stay when a recovery begins: repeating one replaces its rows; a run that trained nothing has none."""
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    return len(rows) if of_recovery else sum('"stage": "prune"' in row for row in rows)


def _link(source: str, target: str) -> None:
    """A second name for a file, where the disk has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
