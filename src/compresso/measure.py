"""One figure of one model: a task of lm-eval, or the perplexity of a text."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.batches import Encoder
from compresso.bridge import SEED, PromptedLM, run_task
from compresso.config import EvaluateConfig
from compresso.paired import standard_error
from compresso.perplexity import WINDOW, perplexity, text_windows, window_nats
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.tasks import Wanted, build
from compresso.texts import find_text, read_text

CPU_BATCH = 8
PERPLEXITY_VERSION = 1  # of how texts are cut and averaged here


@dataclass
class Subject:
    """A loaded model under measurement, with the prompt that it is asked with."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    prompt: CollaborativePrompt
    stored_bytes: int = 0
    """Of the weights, in the number format of the checkpoint."""
    bridges: dict[bool, PromptedLM] = field(default_factory=dict)
    """Of zero-shot and of few-shot tasks, whose prompts differ."""


def settings_of(subject: Subject, wanted: Wanted, config: EvaluateConfig) -> dict[str, Any]:
    """What a figure depends on besides the weights; a figure made with the same need not be made again."""
    prompt = _prompt(subject, wanted, config)
    files = [Path(file) for file in wanted.files.values()] + [path for path in [wanted.definition] if path]
    if not wanted.registered and config.folder is not None:
        files = [path for path in [find_text(wanted.name.partition("@")[0], config.folder)] if path]
    return {
        "prompt": prompt.name,
        "prompt_format": prompt.format,
        "prompt_digest": _digest(prompt.body),
        "chat_template": config.chat_template,
        "limit": config.limit,
        "precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(subject.model.dtype)[6:]],
        "source": files[0].name if files else "hub",
        "source_digest": _digest(b"".join(path.read_bytes() for path in files)) if files else None,
        "seed": SEED,
        "lm_eval": version("lm-eval"),
        "group": wanted.group,
    }


def measure(
    subject: Subject,
    wanted: Wanted,
    manager: TaskManager | None,
    config: EvaluateConfig,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """The figure with its error and the score of every document; `advance` is told how many requests were answered.

    Raises whatever the task, its data or its code raise.
    """
    if not wanted.registered:
        return _measure_text(subject, wanted, config)
    assert manager is not None
    lm = _bridge(subject, wanted, config)
    lm.advance = advance
    paper_form = bool(subject.prompt.body) and subject.prompt.format == "alpaca"
    task = build(wanted, manager, paper_form)
    system = subject.prompt.system
    samples, aggregated = run_task(lm, task, config.limit, system=system, chat_template=config.chat_template)
    metrics = _metrics(samples, aggregated)
    return {
        **headline(metrics, wanted.metric),
        "n": len({sample["doc_id"] for sample in samples}),
        "shots": task.get_config("num_fewshot"),
        "version": (task.get_config("metadata") or {}).get("version"),
        "window": lm.window,
        "cut": len(lm.cut),
        "documents": _digest("".join(f"{s['doc_hash']}{s['target_hash']}" for s in samples)),
        "equal_parts": wanted.equal_parts,
        "metrics": metrics,
    }


def headline(metrics: dict[str, dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    """The figure that stands for a task: of the metric wanted, if it has it."""
    metric = wanted if wanted in metrics else next(iter(metrics))
    if "exact_match,strip" in metrics:
        metric = "exact_match,strip"
    return {"metric": metric, "value": metrics[metric]["value"], "stderr": metrics[metric]["stderr"]}


def _prompt(subject: Subject, wanted: Wanted, config: EvaluateConfig) -> CollaborativePrompt:
    """Texts are read without a prompt unless one is named."""
    if not wanted.registered and config.prompt is None:
        return find_prompt("none", subject.prompt.format)
    return subject.prompt


def _bridge(subject: Subject, wanted: Wanted, config: EvaluateConfig) -> PromptedLM:
    if wanted.few_shot not in subject.bridges:
        batch: int | str = int(config.batch_size) if config.batch_size != "auto" else "auto"
        if batch == "auto" and subject.model.device.type == "cpu":
            batch = CPU_BATCH
        prompt = subject.prompt
        in_chat = prompt.format == "chat" or config.chat_template
        turn = subject.encoder.system_turn(prompt) if in_chat else ""
        if turn and config.chat_template and prompt.system:  # lm-eval adds a task's description to the turn
            turn = turn[: turn.index(prompt.system) + len(prompt.system)]
        lm = PromptedLM(
            subject.model,
            subject.tokenizer,
            prefix=subject.encoder.tokens_of_prefix(turn or prompt.before_request(wanted.few_shot)),
            batch_size=batch,
            system_turn=turn,
        )
        subject.bridges[wanted.few_shot] = lm
    return subject.bridges[wanted.few_shot]


def _metrics(samples: list[dict[str, Any]], aggregated: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every metric of a task; those that are no mean over documents have lm-eval's value and no scores."""
    metrics: dict[str, dict[str, Any]] = {}
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    for kind in filters:
        rows = [sample for sample in samples if sample["filter"] == kind]
        for metric in rows[0]["metrics"]:
            name = metric if kind == "none" else f"{metric},{kind}"
            values = [row[metric] for row in rows]
            value = aggregated.get(f"{metric},{kind}")
            found: dict[str, Any] = {
                "value": value if value is None else _finite(float(value)),
                "stderr": None,
                "scores": None,
            }
            if all(isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0 for value in values):
                scores = [float(value) for value in values]
                mean = sum(scores) / len(scores)
                if found["value"] is not None and math.isclose(mean, found["value"], rel_tol=1e-6, abs_tol=1e-9):
                    found = {"value": mean, "stderr": _finite(standard_error(scores)), "scores": scores}
            metrics[name] = found
    return metrics


def _measure_text(subject: Subject, wanted: Wanted, config: EvaluateConfig) -> dict[str, Any]:
    name, _, size = wanted.name.partition("@")
    window = int(size)
    text, source = read_text(name, config.folder)
    prompt = _prompt(subject, wanted, config)
    turn = subject.encoder.system_turn(prompt) if prompt.format == "chat" else ""
    prefix = subject.encoder.tokens_of_prefix(turn or prompt.raw_text())
    context = subject.encoder.context
    if context is not None and window + len(prefix) > context:
        raise ValueError(f"windows of {window} tokens after a prompt of {len(prefix)} exceed the context of {context}")
    count = None if config.limit is None else max(1, config.limit * WINDOW // window)
    windows = text_windows(text, subject.tokenizer, count, window)
    nats = window_nats(subject.model, windows, prefix)
    value, error = perplexity(nats), _finite(standard_error(nats))
    found = {"value": value, "stderr": None if error is None else value * error, "scores": nats}
    return {
        "metric": "perplexity",
        "value": value,
        "stderr": found["stderr"],
        "n": len(nats),
        "shots": 0,
        "version": PERPLEXITY_VERSION,
        "window": window,
        "cut": 0,
        "documents": _digest(windows.numpy().tobytes()),
        "text": source,
        "metrics": {"perplexity": found},
    }


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
