"""Recovery: the smaller model learns again, from the records and from the model that it was."""

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from compresso import checkpoint, tuning, vocabulary
from compresso.adapters import inside, merge
from compresso.config import VOCABULARY
from compresso.few_shapes import few_widths
from compresso.identity import check_unchanged, digest_model
from compresso.launch import load_parts
from compresso.measured import score
from compresso.plan import Plan
from compresso.records import Record
from compresso.self_data import kept_texts, own_length, texts_for
from compresso.streamed import folder_of
from compresso.train import Teacher, fit, operations
from compresso.training import Training
from compresso.verified import cut_files, note_difference, save_checked
from compresso.workbench import Workbench, compute_dtype, status

OWN = "own.jsonl"


def recover_smaller(bench: Workbench, model: PreTrainedModel, plan: Plan, summary: dict[str, Any]) -> None:
    """Train the smaller model, or LoRA on it; score the result and save it."""
    config, folder = bench.config, bench.folder / "model"
    share = tuning.recovery_distill(config, bench.tune)
    dense = _dense(bench) if share or tuning.own_share(config, bench.tune) else None
    own = _own_texts(bench, dense, summary)
    teacher = Teacher(dense, share) if dense and (share or own) else None
    del dense
    found = bench.newest("recover")
    with few_widths(model, wanted=bench.began_on(found) == "cpu" and bench.tune == "full"):
        wrapped = tuning.start(model, bench.tune, config, config.seed + 1)
        training = Training(inside(wrapped), config.seed + 1, sparsity=plan.sparsity)
        bench.begin("recover", training, found)
        rows = fit(
            bench.accelerator,
            training,
            bench.batches(config.seed + 1, training.step, own),
            steps=config.recover_steps,
            learning_rate=tuning.learning_rate(config, bench.tune, plan.sparsity),
            clip=config.clip,
            teacher=teacher,
            recompute=config.gradient_checkpointing,
            slowed=partial(bench.progress.slowed, "recover"),
        )
        bench.follow("recover", training, rows, config.recover_steps)
    if not bench.place:
        model = merge(wrapped)
        checkpoint.cast(model, compute_dtype(config.precision, bench.accelerator.device))
    summary.setdefault("operations", {})["recover"] = bench.facts["operations"]["recover"]
    recovered = score(bench, model, plan.sparsity)
    summary["loss"]["recovered"] = recovered["loss"]
    summary["perplexity"]["recovered"] = recovered["perplexity"]
    summary["sample"]["recovered"] = recovered["answer"]
    if bench.place:
        note_difference(summary, folder, cut_files(bench, model, None, plan.sparsity, folder)[1])
    else:
        save_checked(bench, model, folder, summary)


def _own_texts(bench: Workbench, dense: PreTrainedModel | None, summary: dict[str, Any]) -> list[Record]:
    """What the dense model writes for recovery, once a run; it is accounted for.

    Raises ValueError if such texts were asked for and it writes none.
    """
    account, share = summary.setdefault("operations", {}), tuning.own_share(bench.config, bench.tune)
    if not bench.progress.further:  # else those of the recovery that this one goes on from count as well
        account.pop("own_texts", None)
    if not dense or not share:
        return []
    records = bench.config.recover_steps * bench.config.batch_size * bench.accelerator.num_processes
    count = texts_for(records, share)
    with bench.accelerator.main_process_first():
        texts = kept_texts(dense, bench.encoder, count, bench.config.seed, bench.folder / OWN)
    if not texts and bench.config.own_share:
        raise ValueError(f"{bench.folder / OWN} holds no usable text of the model's own; recover with --own-share 0")
    written = operations(dense, len(texts) * own_length(bench.encoder), 1)
    account["own_texts"] = max(account.get("own_texts", 0), written)
    return texts


def _dense(bench: Workbench) -> PreTrainedModel:
    """The model before it was cut, as it is stored, for a recovery that learns from it."""
    config, device = bench.config, bench.accelerator.device
    with status(f"loading {config.model}, to learn from"):
        if bench.place:
            place = folder_of(config.model)
            model = load_parts(config, place, bench.accelerator)[0]
            _check_dense(bench, digest_model(model, place))
            return model
        model, tokenizer = checkpoint.load(config.model)
        _check_dense(bench, digest_model(model, None))
        if VOCABULARY in config.units:
            vocabulary.cut(model, vocabulary.shared_tokens(tokenizer, bench.tokenizer))
        return checkpoint.cast(model, compute_dtype(config.precision, device)).to(device).requires_grad_(False)


def _check_dense(bench: Workbench, digest: str) -> None:
    """A recovery that goes on learns from the model that it began with. Raises ValueError."""
    check_unchanged(bench.progress, {"model": digest}, bench.folder)
    if bench.writes:
        bench.progress.write(bench.folder)
