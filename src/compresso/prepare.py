"""Before anything is computed: load and check settings, checkpoint and data, then make the run folder."""

import itertools
import math
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from compresso import allocation, checkpoint, demo, hard_concrete, launch, tuning, vocabulary
from compresso.adapters import linear_names
from compresso.batches import Encoder
from compresso.calibration import check_inputs
from compresso.config import SCORED, VOCABULARY, PruneConfig, nearest
from compresso.families import UNITS, family_of
from compresso.identity import check_processes, check_unchanged, digest_model, digest_records, digest_text
from compresso.output_folder import check_output, make_folder
from compresso.perplexity import WINDOW, text_windows
from compresso.progress import Progress
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.records import Source, files_of, parts_of
from compresso.shape import ModelShape, count_prunable, describe
from compresso.streamed import count_parameters, folder_of
from compresso.streams import Stream, take_held_out
from compresso.usable_records import check_tokens, read_records
from compresso.workbench import Workbench, compute_dtype, console, status


def prepare(
    config: PruneConfig,
    source: Path | None = None,
    progress: Progress | None = None,
    begins: bool = False,
    held: ExitStack | None = None,
) -> Workbench:
    """Load and check everything, then make the run folder, whose lock stays until `held` ends.

    With `progress` the folder is there already; `source` is then a model to take instead of the run's. What goes on in
    it, rather than `begins`, must find model, records and launch as they were: raises ValueError otherwise.
    """
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = Path(config.output)
    new = progress is None
    if new:
        check_output(config)
    prompt = find_prompt(config.prompt, config.prompt_format)
    text = _text(config)
    if config.records not in ("self", "demo"):
        for name, _ in parts_of(config.records):
            files_of(name)  # raises for one that is not there, before a model is loaded
    accelerator = launch.start(config)
    if progress and not begins:
        check_processes(progress, accelerator, folder)
    set_seed(config.seed)
    model, tokenizer, stored, place, digest = _load(config, str(source or config.model), accelerator)
    config = with_units(config, model.config.model_type)
    if new:
        _check_target(config, describe(model))
    if prompt.format == "auto":
        prompt = replace(prompt, format="chat" if tokenizer.chat_template else "alpaca")
    if prompt.format == "chat" and not tokenizer.chat_template:
        raise ValueError("--prompt-format chat: the tokenizer has no chat template; use alpaca, or leave it out")
    context = getattr(model.config, "max_position_embeddings", None)
    encoder = Encoder(tokenizer, config.max_length, context)
    encoder.room(prompt)
    _check_lora_targets(config, model)
    cuts_vocabulary = VOCABULARY in config.units and source is None  # a smaller model has lost its tokens already
    if cuts_vocabulary:
        vocabulary.check(model, tokenizer)
    progress = progress or Progress()
    progress.processes = accelerator.num_processes
    held = held or ExitStack()
    if new and config.records == "self":
        make_folder(config, accelerator, progress, held)
    with accelerator.main_process_first():
        sources = read_records(config, model, encoder, prompt)
    facts: dict[str, Any] = {"stored_dtype": stored}
    parameters = count_parameters(model.config)
    if cuts_vocabulary:
        encoder, facts["vocabulary"] = _cut_vocabulary(config, model, encoder, sources, prompt, parameters)
        tokenizer = encoder.tokenizer
    sources, held_out = take_held_out(sources, config.validation_records, config.seed)
    text = text or "\n\n".join(record.response for record in held_out)
    windows = text_windows(text, tokenizer, config.perplexity_windows, min(WINDOW, context or WINDOW), shorter=True)
    check_tokens(windows.flatten().tolist(), tokenizer, model.config.vocab_size)
    if new and config.records != "self":
        make_folder(config, accelerator, progress, held)
    which = "smaller model" if source else "model"
    found = {which: digest, "records": digest_records(sources, held_out), "prompt": digest_text(prompt.body)}
    check_unchanged(progress, found, folder)
    if accelerator.is_main_process and (new or not begins):
        progress.write(folder)
    if config.tracker != "none":
        accelerator.init_trackers("compresso")
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
        tuning.chosen(config, parameters, place is None),
        facts,
        progress,
        began,
        place=place,
    )


def _load(
    config: PruneConfig, source: str, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype, Path | None, str]:
    """Model, tokenizer, the dtype it is stored in, its folder if the model here is not whole, and its digest."""
    with status(f"loading {source}"):
        if launch.in_parts(config, accelerator):
            launch.check_in_parts(config, launch.splits(config, accelerator))
            with accelerator.main_process_first():
                place = folder_of(source)
            tokenizer = checkpoint.load_tokenizer(str(place))
            model, stored = launch.load_parts(config, place, accelerator)
            return model, tokenizer, stored, place, digest_model(model, place)
        with accelerator.main_process_first():
            model, tokenizer = checkpoint.load(source)
        stored, digest = model.dtype, digest_model(model, None)  # of its own numbers, whatever this machine computes in
        dtype = compute_dtype(config.precision, accelerator.device)
        return checkpoint.cast(model, dtype).to(accelerator.device), tokenizer, stored, None, digest


def with_units(config: PruneConfig, model_type: str) -> PruneConfig:
    """The settings without units that this family cannot lack, or its stock class where the shape is to be one that
    it takes; raises ValueError if they were asked for. For a mixture with what its experts ask for; raises ValueError
    for a method that has to see what goes into their last matrices."""
    family = family_of(model_type)
    if config.refit or config.method in ("wanda", "flap", "minitron"):
        check_inputs(model_type)
    default = not config.units
    config = replace(config, units=config.units or config.gates)
    scored = SCORED.get(config.method, UNITS)
    if unknown := [unit for unit in config.gates if unit not in scored]:
        known = ",".join(unit for unit in config.gates if unit in scored) or ",".join(scored)
        raise ValueError(
            f"--method {config.method} does not tell which {unknown[0]} may go; use --units {known}, or --method l0"
        )
    if family.router:
        units = (*config.units, "expert") if default and "expert" in scored else config.units
        config = replace(config, units=units, round_to=math.lcm(config.round_to, family.multiple))
        told = f"{model_type}: {', '.join(units)} are removed; widths are multiples of {config.round_to}"
        console.print(told, markup=False, highlight=False)
    elif "expert" in config.units:
        raise ValueError(f"a {model_type} has no experts; leave expert out of --units")
    whole = ("kv_group",) if family.derived_head_dim and config.widths.uniform else ()
    fixed = [unit for unit in config.units if unit in (*family.fixed, *whole)]
    if not fixed:
        return config
    left = tuple(unit for unit in config.units if unit not in fixed)
    if not default:
        reason = "and compute the same" if fixed[0] in family.fixed else f"and be a stock one (--shape {config.shape})"
        wanted = ",".join(left if {*left} - {VOCABULARY} else ("intermediate", *left))
        raise ValueError(f"{model_type} cannot lack some of its {fixed[0]} {reason}; use --units {wanted}")
    why = f"exactly and in a stock class (--shape {config.shape})" if whole else "exactly"
    console.print(f"{model_type}: {', '.join(left)} are removed; {', '.join(fixed)} cannot be, {why}", markup=False)
    return replace(config, units=left)


def _check_target(config: PruneConfig, shape: ModelShape) -> None:
    """Let the plan's own rules speak before hours of training, on made-up scores."""
    open_alike = {"hidden": hard_concrete.LIMIT}  # which equal widths take as many of as are expected to be open
    scores = {unit: torch.full((sum(shape.sizes(unit)),), open_alike.get(unit, 0.0)) for unit in config.gates}
    for target in (*config.also, config.target_sparsity):
        allocation.decide(shape, scores, target, config.widths)
    if config.method == "shortgpt":
        layers = torch.zeros(len(shape.layers))
        if not allocation.whole_layers(shape, layers, config.target_sparsity).sparsity:
            raise ValueError(
                f"a layer is {1 / len(layers):.3f} of the prunable parameters, and the nearest that --method shortgpt "
                f"can remove to {config.target_sparsity} is nothing; ask for more, or use another --method"
            )


def _check_lora_targets(config: PruneConfig, model: PreTrainedModel) -> None:
    layers = model.get_submodule(family_of(model.config.model_type).layers)  # a tied head would change the embedding
    known = linear_names(layers)
    for target in config.lora_targets:
        if target not in {*known, "all-linear"}:
            raise ValueError(
                f"no matrix is called {target!r}{nearest(target, known)}; --lora-targets may name "
                f"{', '.join(sorted(known))}"
            )


def _cut_vocabulary(
    config: PruneConfig,
    model: PreTrainedModel,
    encoder: Encoder,
    sources: list[Source] | list[Stream],
    prompt: CollaborativePrompt,
    before: int,
) -> tuple[Encoder, dict[str, Any]]:
    """Leave in the model, of so many parameters, the tokens that the records use; an encoder with these, and the facts
    for the summary."""
    tokenizer = encoder.tokenizer
    records = itertools.chain.from_iterable(source.records for source in sources if isinstance(source, Source))
    filled = prompt.filled(sparsity=0.0, target_sparsity=config.target_sparsity, parameters=before)
    with status("looking for the tokens that records use"):
        used = vocabulary.used_tokens(encoder, records, filled) | vocabulary.special_tokens(model)
        kept = vocabulary.kept_tokens(tokenizer, used)
        smaller = vocabulary.smaller_tokenizer(tokenizer, kept)
        vocabulary.cut(model, kept)
    after = count_parameters(model.config)
    console.print(
        f"vocabulary: {len(kept):,} of {len(tokenizer):,} tokens stay, {(before - after) / 1e6:,.1f} M parameters go. "
        "Losses and perplexities are per token of this vocabulary, before and after",
        markup=False,
    )
    facts = {
        "tokens": {"before": len(tokenizer), "after": len(kept)},
        "parameters": {"before": before, "after": after},
    }
    return Encoder(smaller, encoder.max_length, encoder.context), facts


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
