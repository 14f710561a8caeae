"""`compresso evaluate`: measure models on suites of tasks, keep every figure at once, compare in pairs."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

try:
    from lm_eval.tasks import TaskManager
except ImportError:
    raise ValueError("evaluating needs lm-eval: pip install 'compresso-llm[eval]'") from None

from compresso import checkpoint, demo, eval_file, eval_table
from compresso.batches import Encoder
from compresso.chat import prompt_for
from compresso.config import EvaluateConfig, changed, read_yaml
from compresso.cost import fitting, measure_costs
from compresso.environment import versions
from compresso.families import PER_LAYER_PREFIX
from compresso.measure import Subject, headline, measure, settings_of
from compresso.one_at_a_time import alone_at
from compresso.schemas import SUMMARY, parse
from compresso.suites import SUITES
from compresso.tasks import Wanted, check_names, plan_tasks, task_manager
from compresso.texts import find_text
from compresso.workbench import compute_dtype, console, progress_bar, release_memory, status

WEIGHED = ("*.safetensors", "config.json", "*.jinja", "tokenizer*")
"""Files of a checkpoint that its figures depend on."""


def evaluate(models: str | Sequence[str], config: EvaluateConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Measure models as `compresso evaluate` does and return what eval.json holds.

    Settings are those of `EvaluateConfig`, by name. Raises ValueError or FileNotFoundError for
    what a user can mend; what was measured before is in the file by then.
    """
    config = EvaluateConfig(**changed(vars(config) if config else {}, settings))
    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise ValueError("name at least one model: a run folder, a checkpoint folder, a .gguf file or a hub id")
    places = [str(Path(checkpoint.of_run(name)).resolve()) for name in names]
    if len(set(places)) < len(places):
        raise ValueError(f"a model is named twice: {' '.join(names)}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = _device(config.device)
    for name in names:
        checkpoint.find(checkpoint.of_run(name), any_family=True)
    tasks = _wanted(config)
    path = _output(names, config)
    eval_file.check_writable(path)
    with alone_at(path):
        return _evaluate(names, config, device, tasks, path)


def _evaluate(
    names: list[str],
    config: EvaluateConfig,
    device: torch.device,
    tasks: tuple[TaskManager | None, list[Wanted], dict[str, str]],
    path: Path,
) -> dict[str, Any]:
    manager, wanted, left_out = tasks
    found = eval_file.read(path)
    measurable = {task.group or task.name for task in wanted}
    tried = {"cost", *measurable, *(task.name for task in wanted)}
    found["left_out"] = {k: v for k, v in found["left_out"].items() if k not in tried} | left_out
    found["versions"] = versions()
    failed = {name: left_out[name] for name in config.asked if name in left_out and name not in measurable}
    loaded: dict[str, PreTrainedModel] = {}
    for name in names:
        subject = _load(name, config, device)
        eval_file.enter(found, name, _describe(subject))
        for task, reason in _measure_all(subject, wanted, manager, config, found, path).items():
            failed[task] = f"{failed[task]}; {reason}" if task in failed else reason
        if config.cost:
            loaded[name] = subject.model
        del subject
        release_memory()
    found["models"] = {name: found["models"][name] for name in names} | found["models"]
    if config.cost and not _cost_known(found, names, config, loaded):
        try:
            with status("measuring size, speed and memory, the models in turn"):
                costs = measure_costs(loaded, config.cost_batch, config.cost_context)
        except Exception as error:  # any model of the hub: what it cannot do is not known beforehand
            failed["cost"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            costs = {}
        for name, cost in costs.items():
            weights = found["models"][name]["weight_bytes"]
            found["cost"][name] = {**cost, "weight_bytes": weights, "together": sorted(names)}
    found["left_out"] |= failed
    eval_file.write(found, path)
    eval_table.show(found, path, console)
    if failed:
        listed = "; ".join(f"{task}: {reason}" for task, reason in failed.items())
        raise ValueError(f"not measured: {listed}. The rest is in {path}; the same command tries these again")
    return found


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: this torch sees no CUDA device (`compresso doctor` tells more); use --device cpu"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {device!r}") from error


def _wanted(config: EvaluateConfig) -> tuple[TaskManager | None, list[Wanted], dict[str, str]]:
    """What to measure; all that can be wrong with names and local files is said before a model is loaded."""
    with status("reading lm-eval's list of tasks"):
        texts_only = all("@" in task for name in config.asked for task in SUITES.get(name, (name,)))
        manager = None if texts_only else task_manager(config.folder)
        check_names(config.asked, manager)
        wanted, left_out = plan_tasks(config.asked, manager, config.folder)
    if config.folder is not None:
        datasets.disable_progress_bars()
        for text in [task for task in wanted if not task.registered]:
            if find_text(text.name.partition("@")[0], config.folder) is None:
                left_out[text.name] = "no such text in the folder of --data-dir or its text/"
        wanted = [task for task in wanted if task.name not in left_out]
    if not wanted:
        missing = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise FileNotFoundError(f"nothing to measure. {missing}. docs/evaluation.md tells how files are named")
    for task, reason in left_out.items():
        console.print(f"left out: {task}: {reason}", markup=False, highlight=False)
    return manager, wanted, left_out


def _output(names: Sequence[str], config: EvaluateConfig) -> Path:
    if config.output is not None:
        return Path(config.output)
    runs = [Path(name) for name in names if checkpoint.of_run(name) != name]
    return (runs or [Path()])[0] / "eval.json"


def _load(name: str, config: EvaluateConfig, device: torch.device) -> Subject:
    with status(f"loading {name}"):
        model, tokenizer = checkpoint.load(checkpoint.of_run(name), any_family=True)
        prompt = prompt_for(model, tokenizer, config.prompt, config.prompt_format)
        if config.chat_template and not tokenizer.chat_template:
            raise ValueError(f"{name} has no chat template; evaluate without --chat-template")
        stored_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        model = checkpoint.cast(model, _dtype(config.precision, model.dtype, device)).to(device).eval()
    context = getattr(model.config, "max_position_embeddings", None)
    return Subject(name, model, tokenizer, Encoder(tokenizer, 0, context), prompt, stored_bytes)


def _dtype(precision: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cpu" and (stored != torch.bfloat16 or compute_dtype("auto", device) != torch.bfloat16):
        return torch.float32
    return stored


def _describe(subject: Subject) -> dict[str, Any]:
    """What eval.json tells about a model."""
    place = Path(checkpoint.of_run(subject.name))
    run = next((p for p in (Path(subject.name), Path(subject.name).parent) if (p / "summary.json").is_file()), None)
    summary = parse((run / "summary.json").read_bytes(), SUMMARY, str(run / "summary.json")) if run else {}
    settings = read_yaml(run / "config.yaml") if run and (run / "config.yaml").is_file() else {}
    stored = checkpoint.prompt_of(subject.model.config)
    return {
        "folder": str(place) if place.is_dir() else None,
        "model_type": subject.model.config.model_type,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "weight_bytes": checkpoint.weight_bytes(place) if place.is_dir() else subject.stored_bytes,
        "sparsity": summary.get("sparsity"),
        "base": summary.get("model"),
        "stage": _stage(subject, place, bool(run)),
        "trained_prompt": settings.get("prompt", stored.name if stored else None),
        "trained_data": settings.get("data") or ("demo" if settings.get("model") == "demo" else None),
        "fingerprint": _fingerprint(subject, place),
    }


def _stage(subject: Subject, place: Path, of_run: bool) -> str:
    if of_run:
        return "cut" if place.name == "cut" else "recovered"
    config = subject.model.config
    ours = config.model_type.startswith(PER_LAYER_PREFIX) or checkpoint.prompt_of(config) is not None
    return "pruned" if ours else "dense"


def _fingerprint(subject: Subject, place: Path) -> str:
    """Changes when the weights do: names, sizes and times of the files, or the hub's commit."""
    if subject.name == "demo":
        return demo.MODEL_WHEEL.sha256[:16]
    if place.exists():
        files = [file for pattern in WEIGHED for file in sorted(place.glob(pattern))] if place.is_dir() else [place]
        state = str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    else:
        state = f"{subject.name} {getattr(subject.model.config, '_commit_hash', None)}"
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def _measure_all(
    subject: Subject,
    wanted: list[Wanted],
    manager: TaskManager | None,
    config: EvaluateConfig,
    found: dict[str, Any],
    path: Path,
) -> dict[str, str]:
    """Measure what is not known yet and write the file after each figure; what failed, and why."""
    known = found["results"][subject.name]
    failed: dict[str, str] = {}
    with progress_bar() as bar:
        bar_task = bar.add_task(subject.name, total=len(wanted), note="")
        answered = 0

        def advance(count: int) -> None:
            nonlocal answered
            answered += count
            bar.update(bar_task, note=f"{task.name}: {answered} requests")

        for task in wanted:
            group = dict(zip(("group_parts", "group_size"), task.parts, strict=True)) if task.group else {}
            settings = settings_of(subject, task, config)
            if any(known.get(task.name, {}).get(key) != value for key, value in settings.items()):
                answered, began = 0, time.perf_counter()
                bar.update(bar_task, note=task.name)
                try:
                    entry = measure(subject, task, manager, config, advance)
                except Exception as error:  # tasks are other people's code and data
                    reason = (str(error).strip().splitlines() or [""])[0]
                    kind = "" if isinstance(error, (ValueError, FileNotFoundError)) else f"{type(error).__name__}: "
                    failed[task.name] = f"{kind}{reason} ({subject.name})"
                    continue  # an older figure, made with other settings, stays
                seconds = round(time.perf_counter() - began, 2)
                known[task.name] = {**entry, **settings, **group, "seconds": seconds}
                eval_file.write(found, path)
                if not console.is_terminal:
                    console.print(eval_table.line(subject.name, task.name, known[task.name]), markup=False)
            elif task.registered:
                known[task.name] |= {**group, **headline(known[task.name]["metrics"], task.metric)}
            if (cut := known[task.name]["cut"]) > 0:
                console.print(
                    f"{task.name}: {cut} of {known[task.name]['n']} documents are longer than the window of "
                    f"{known[task.name]['window']} tokens and were cut on the left",
                    markup=False,
                )
            bar.advance(bar_task)
    return failed


def _cost_known(
    found: dict[str, Any], names: list[str], config: EvaluateConfig, loaded: dict[str, PreTrainedModel]
) -> bool:
    """Whether all models took turns in an earlier run of the same settings: only then do their speeds compare."""
    context = {name: fitting(model, config.cost_context)[0] for name, model in loaded.items()}
    known = found["cost"]
    return all(
        name in known
        and known[name]["together"] == sorted(names)
        and (known[name]["batch"], known[name]["context"]) == (config.cost_batch, context[name])
        and known[name]["device"] == str(loaded[name].device)
        and known[name]["precision"] == str(loaded[name].dtype).removeprefix("torch.")
        for name in names
    )
