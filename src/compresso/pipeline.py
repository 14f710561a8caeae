"""From a checkpoint to a smaller one: the steps of `compresso prune` and `compresso recover`, in order."""

import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compresso import checkpoint, demo
from compresso import plan as plans
from compresso.batches import Encoder
from compresso.config import PruneConfig, nearest, read_yaml
from compresso.evaluate import answer, mean_loss, speeds, text_windows
from compresso.extract import extract
from compresso.families import family_of
from compresso.masks import gated
from compresso.methods import METHODS, add_lora, inside, merge
from compresso.plan import Plan
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.records import Source, hold_out, read_sources
from compresso.self_data import write_records
from compresso.shape import ModelShape, count_prunable, describe, prunable_parameters
from compresso.summary import show
from compresso.train import fit
from compresso.workbench import Workbench, compute_dtype, console, progress_bar, release_memory

PACKAGES = ("compresso-llm", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
RUN_MARKS = ("config.yaml", "env.json")
RELATIVE_TOLERANCE = 1e-3  # of the largest logit, in float32; rounding stays below it, a wrong fold is far above


def prune(config: PruneConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Prune a model as `compresso prune` does and return what summary.json holds.

    Settings are those of `PruneConfig`, by name. Everything that can be wrong with them,
    the checkpoint or the data is raised, as FileNotFoundError or ValueError, before the
    run folder is touched; workbench.Stopped tells what a run that ended early has kept.
    """
    config = replace(config, **settings) if config else PruneConfig(**settings)
    began = time.perf_counter()
    bench = prepare(config)
    dense = _score(bench, bench.model, 0.0)
    dense["bytes"] = sum(p.numel() for p in bench.model.parameters()) * bench.facts["stored_dtype"].itemsize
    shape = describe(bench.model)
    model, plan = METHODS[config.method](bench)
    plans.save(plan, bench.folder, {"method": config.method, "model": config.model, "seed": config.seed})
    smaller, difference = _extract_checked(bench, model, plan)
    with _status("measuring tokens/s, dense and pruned in turn"):
        dtype = compute_dtype(config.precision, bench.accelerator.device)
        checkpoint.cast(model, dtype)
        checkpoint.cast(smaller, dtype)
        speed = speeds({"before": model, "after": smaller})
    bench.model = model = smaller  # the dense weights are not needed any more
    release_memory()
    cut = _score(bench, smaller, plan.sparsity)
    summary: dict[str, Any] = {
        "model": config.model,
        "method": config.method,
        "units": list(config.units),
        "target_sparsity": config.target_sparsity,
        "sparsity": plan.sparsity,
        "parameters": {"before": bench.parameters, "after": sum(p.numel() for p in smaller.parameters())},
        "prunable_parameters": {"before": bench.prunable, "after": count_prunable(smaller)},
        "bytes": {"before": dense["bytes"]},
        "max_logit_difference": difference,
        "logit_differences": {"gated_extracted": difference},
        "loss": {"dense": dense["loss"], "cut": cut["loss"]},
        "perplexity": {"dense": dense["perplexity"], "cut": cut["perplexity"]},
        "perplexity_window": bench.windows[0].ids.shape[1],
        "sample": {"question": config.sample, "dense": dense["answer"], "cut": cut["answer"]},
        "speed": speed,
        "kept_gates": bench.facts.get("kept_gates"),
        "hidden_size": {"before": shape.hidden_size, "after": len(plan.keep["hidden"][0])},
        "widths": plan.widths(),
        "seed": config.seed,
        "versions": _versions(),
    }
    _save_checked(bench, smaller, bench.folder / "cut", summary)
    summary["seconds"] = time.perf_counter() - began
    _write(summary, bench.folder)  # so that a recovery that stops can be repeated
    if config.recover_steps:
        smaller = _recover(bench, smaller, plan, summary)
        _save_checked(bench, smaller, bench.folder / "model", summary)
    else:
        shutil.copytree(bench.folder / "cut", bench.folder / "model", dirs_exist_ok=True)
        for key in ("loss", "perplexity", "sample"):
            summary[key]["recovered"] = summary[key]["cut"]
    summary["seconds"] = time.perf_counter() - began
    return _finish(bench, summary)


def recover(run: str, *, further: bool = False, **settings: Any) -> dict[str, Any]:
    """Train the smaller model of a run again and return the new summary.

    It starts from the cut model, as the run itself did, or with `further` from what the
    last recovery reached. `settings` replace those of the run's config.yaml.
    """
    folder = Path(run)
    for name in ("config.yaml", "summary.json", "plan.json", "cut"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder} has no {name}; `compresso recover` needs a finished run of `compresso prune`"
            )
    of_run = PruneConfig(**{**read_yaml(folder / "config.yaml"), "output": str(folder)})
    config = replace(of_run, **settings)
    if not config.recover_steps:
        raise ValueError("--recover-steps is 0: there is nothing to do")
    summary = json.loads((folder / "summary.json").read_text())
    plan = plans.load(folder)
    bench = prepare(of_run, start=folder / ("model" if further else "cut"))  # its held-out records stay held out
    bench.config = config
    if "data" in settings:
        bench.sources = _usable(read_sources(config.records), bench.encoder, bench.prompt)
    summary["recovery"] = {**settings, "further": further}
    bench.parameters, bench.prunable = summary["parameters"]["before"], summary["prunable_parameters"]["before"]
    if not further:
        _drop_recovery(folder / "metrics.jsonl")
    model = _recover(bench, bench.model, plan, summary)
    _save_checked(bench, model, folder / "model", summary)
    return _finish(bench, summary)


def prepare(config: PruneConfig, start: Path | None = None) -> Workbench:
    """Load and check everything, then make the run folder. With `start`, the folder is there already."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = Path(config.output)
    if start is None:
        _check_output(config)
    prompt = find_prompt(config.prompt, config.prompt_format)
    accelerator = _accelerator(config)
    set_seed(config.seed)
    dtype = compute_dtype(config.precision, accelerator.device)
    with _status(f"loading {start or config.model}"):
        model, tokenizer = checkpoint.load(str(start or config.model))
        stored = model.dtype
        model = checkpoint.cast(model, dtype).to(accelerator.device)
    shape = describe(model)
    if start is None:
        _check_target(config, shape)
    if prompt.format == "auto":
        prompt = replace(prompt, format="chat" if tokenizer.chat_template else "alpaca")
    context = getattr(model.config, "max_position_embeddings", None)
    encoder = Encoder(tokenizer, config.max_length, context)
    encoder.room(prompt)
    _check_lora_targets(config, model)
    text = _text(config)
    if config.records == "self":
        if start is None:
            _make_folder(config, accelerator)
        sources = _own_records(config, model, encoder)
    else:
        with _status("reading records"):
            sources = [demo.records()] if config.records == "demo" else read_sources(config.records)
    sources = _usable(sources, encoder, prompt)
    sources, held_out = hold_out(sources, config.validation_records, config.seed)
    text = text or "\n\n".join(record.response for record in held_out)
    windows = text_windows(text, tokenizer, config.perplexity_windows, context)
    if start is None and config.records != "self":
        _make_folder(config, accelerator)
    if config.tracker != "none":
        accelerator.init_trackers("compresso")
    parameters = sum(p.numel() for p in model.parameters())
    return Workbench(
        config,
        folder,
        accelerator,
        model,
        tokenizer,
        encoder,
        prompt,
        sources,
        held_out,
        windows,
        parameters,
        count_prunable(model),
        {"stored_dtype": stored},
    )


def _accelerator(config: PruneConfig) -> Accelerator:
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: this torch sees no CUDA device; use --device cpu")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this torch sees no Apple GPU; use --device cpu")
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"--device must be auto, cpu, cuda or mps, got {config.device!r}")
    log_with = None if config.tracker == "none" else config.tracker
    if log_with and find_spec(log_with) is None:
        raise ValueError(f"--tracker {log_with}: its package is not installed (pip install {log_with})")
    try:
        accelerator = Accelerator(cpu=config.device == "cpu", log_with=log_with, project_dir=config.output)
    except (ImportError, ValueError) as error:
        raise ValueError(f"--tracker {config.tracker}: {error}") from error
    if accelerator.num_processes > 1:
        raise ValueError(f"pruning runs in one process so far, this launch has {accelerator.num_processes}")
    return accelerator


def _check_output(config: PruneConfig) -> None:
    """An output that exists is replaced only when asked for, only if it is a run, and never with an input in it."""
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not config.overwrite:
        raise ValueError(f"{folder} exists and is not empty; choose another --output, or --overwrite to replace it")
    if not all((folder / name).is_file() for name in RUN_MARKS):
        raise ValueError(f"{folder} is not a run folder ({' and '.join(RUN_MARKS)} are missing), so it is not replaced")
    inputs = [config.model, config.text, config.prompt, *config.records.split(",")]
    for name in filter(None, inputs):
        path = Path(name.strip().rpartition(":")[0] or name.strip())
        if path.exists() and folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{path} lies in {folder}, which --overwrite would replace; choose another --output")


def _make_folder(config: PruneConfig, accelerator: Accelerator) -> None:
    """From here on the run leaves traces; all that can be wrong with its input has been checked."""
    folder = Path(config.output)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "env.json").write_text(json.dumps(_environment(accelerator), indent=2) + "\n")


def _own_records(config: PruneConfig, model: PreTrainedModel, encoder: Encoder) -> list[Source]:
    """Records that the model writes, once a run."""
    path = Path(config.output) / "self.jsonl"
    if not path.exists():
        partial = path.with_name("self.jsonl.partial")
        with progress_bar() as bar:
            task = bar.add_task("the model writes records", total=config.self_records, note="")
            write_records(model, encoder, config.self_records, config.seed, partial, lambda n: bar.advance(task, n))
        partial.rename(path)
    return read_sources(str(path))


def _usable(sources: list[Source], encoder: Encoder, prompt: CollaborativePrompt) -> list[Source]:
    """Leave out records that the chat template refuses, and say what was left out. Raises ValueError if all are."""
    for source in sources:
        kept = []
        for number, record in enumerate(source.records, 1):
            try:
                encoder.split_text(record, prompt)
                kept.append(record)
            except ValueError as error:
                source.skipped.append((number, str(error)))
        source.records = kept
        if source.report():
            console.print(source.report(), markup=False)
        if not kept:
            raise ValueError(f"no usable record: {source.report()}")
    return sources


def _check_lora_targets(config: PruneConfig, model: PreTrainedModel) -> None:
    layers = model.get_submodule(family_of(model.config.model_type).layers)  # a tied head would change the embedding
    known = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    for target in config.lora_targets:
        if target not in {*known, "all-linear"}:
            raise ValueError(
                f"no matrix is called {target!r}{nearest(target, known)}; --lora-targets may name "
                f"{', '.join(sorted(known))}"
            )


def _check_target(config: PruneConfig, shape: ModelShape) -> None:
    """Let the plan's own rules speak before hours of training, on made-up scores."""
    scores = {unit: torch.zeros(sum(shape.sizes(unit))) for unit in config.units}
    plans.select(shape, scores, config.target_sparsity, config.round_to)


def _text(config: PruneConfig) -> str | None:
    if config.text is None:
        return demo.text() if config.records == "demo" else None
    path = Path(config.text)
    if not path.is_file():
        raise FileNotFoundError(f"no text file {path} (--text)")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _score(bench: Workbench, model: PreTrainedModel, sparsity: float) -> dict[str, Any]:
    """Loss on held-out records, perplexity on held-out text, one answer."""
    with _status("measuring loss and perplexity"):
        nats = mean_loss(model, bench.windows)
        return {
            "loss": mean_loss(model, bench.validation(sparsity)),
            "perplexity": float(torch.tensor(nats, dtype=torch.float64).exp()),
            "answer": answer(model, bench.encoder, bench.prompt_at(sparsity), bench.config.sample),
        }


@torch.no_grad()
def _extract_checked(bench: Workbench, model: PreTrainedModel, plan: Plan) -> tuple[PreTrainedModel, float]:
    """Extract in float32; raise RuntimeError unless it computes what the gated model computed."""
    ids = bench.windows[0].ids[:1, :128].to(model.device)
    with _status("extracting the smaller model, and comparing it with the gated one"):
        with gated(model, plan.shape, plan.gates):
            expected = model(ids).logits
        smaller = extract(model, plan)
        difference = _difference(smaller(ids).logits, expected, "the extracted model", "the gated model")
    by_formula = int(prunable_parameters(plan.shape, {u: (g > 0).double() for u, g in plan.gates.items()}))
    if by_formula != count_prunable(smaller):
        raise RuntimeError(
            f"the extracted model has {count_prunable(smaller)} prunable parameters, the plan {by_formula}"
        )
    return smaller, difference


@torch.no_grad()
def _save_checked(bench: Workbench, model: PreTrainedModel, folder: Path, summary: dict[str, Any]) -> None:
    """Save in the dtype of the original, reload as a stranger would, compare logits."""
    with _status(f"saving {folder}, and comparing what loads with what was saved"):
        working = model.dtype
        checkpoint.cast(model, bench.facts["stored_dtype"])
        prompt = bench.prompt_at(summary["sparsity"])
        card = checkpoint.model_card(model, bench.config.model, prompt, _card_facts(summary))
        checkpoint.save(model, bench.tokenizer, prompt, folder, card)
        ids = bench.windows[0].ids[:1, :128].to(model.device)
        checkpoint.cast(model, torch.float32)
        expected = model(ids).logits
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        actual = reloaded.to(model.device).eval()(ids).logits
        difference = _difference(actual, expected, f"the model reloaded from {folder}", "the model saved there")
        summary["logit_differences"][f"{folder.name}_reloaded"] = difference
        summary["max_logit_difference"] = max(summary["logit_differences"].values())
        checkpoint.cast(model, working)


def _difference(actual: torch.Tensor, expected: torch.Tensor, what: str, other: str) -> float:
    """Largest logit difference. Raises RuntimeError above the tolerance."""
    difference = float((actual - expected).abs().max())
    tolerance = RELATIVE_TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= tolerance:
        raise RuntimeError(
            f"{what} differs from {other} by {difference:.2e} in a logit, more than {tolerance:.2e}. This is a bug of "
            "compresso, please report it with the run's config.yaml and plan.json; do not use the model"
        )
    return difference


def _recover(bench: Workbench, model: PreTrainedModel, plan: Plan, summary: dict[str, Any]) -> PreTrainedModel:
    """Train LoRA on the smaller model, merge it, and score the result."""
    config = bench.config
    wrapped = add_lora(model, config, config.seed + 1)
    rows = fit(
        bench.accelerator,
        inside(wrapped),
        bench.batches(config.seed + 1),
        steps=config.recover_steps,
        learning_rate=config.learning_rate,
        clip=config.clip,
        seed=config.seed + 1,
        sparsity=plan.sparsity,
    )
    with bench.keeping(wrapped, None):
        bench.follow("recover", rows, config.recover_steps)
    model = merge(wrapped)
    checkpoint.cast(model, compute_dtype(config.precision, bench.accelerator.device))
    recovered = _score(bench, model, plan.sparsity)
    summary["loss"]["recovered"] = recovered["loss"]
    summary["perplexity"]["recovered"] = recovered["perplexity"]
    summary["sample"]["recovered"] = recovered["answer"]
    return model


def _finish(bench: Workbench, summary: dict[str, Any]) -> dict[str, Any]:
    summary["bytes"]["after"] = checkpoint.weight_bytes(bench.folder / "model")
    summary["peak_memory_bytes"] = _peak_memory(bench.accelerator.device)
    _write(summary, bench.folder)
    bench.accelerator.end_training()
    show(summary, bench.folder, console)
    return summary


def _write(summary: dict[str, Any], folder: Path) -> None:
    partial = folder / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    partial.rename(folder / "summary.json")


def _drop_recovery(metrics: Path) -> None:
    """Repeating a recovery replaces its rows."""
    rows = [line for line in metrics.read_text().splitlines(True) if '"stage": "recover"' not in line]
    metrics.write_text("".join(rows))


def _card_facts(summary: dict[str, Any]) -> dict[str, str]:
    before, after = summary["parameters"]["before"], summary["parameters"]["after"]
    return {
        "base model": str(summary["model"]),
        "parameters": f"{before:,} before, {after:,} after",
        "sparsity": f"{100 * summary['sparsity']:.2f} % of the decoder layers' matrices removed",
        "units": ", ".join(summary["units"]),
        "method": summary["method"],
    }


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a repetition would want to know; nothing from the environment variables."""
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "device": str(accelerator.device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def _status(text: str) -> Iterator[None]:
    with console.status(text) if console.is_terminal else _nothing():
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
