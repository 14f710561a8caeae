"""Records that chat template and model can take; what is left out is told."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso import demo, whole_files
from compresso.batches import Encoder
from compresso.config import PruneConfig
from compresso.prompts import CollaborativePrompt
from compresso.records import Record, Source, read_file, read_sources
from compresso.self_data import write_records
from compresso.streams import Stream, open_streams
from compresso.workbench import console, progress_bar, status


def read_records(
    config: PruneConfig, model: PreTrainedModel, encoder: Encoder, prompt: CollaborativePrompt
) -> list[Source] | list[Stream]:
    """The records that `config` names, without those that chat template or model cannot take; says what was left out.

    Raises ValueError or FileNotFoundError for a source without a usable record.
    """
    rows = model.config.vocab_size
    larger = max(encoder.tokenizer.get_vocab().values()) >= rows  # only then is a record tokenised here

    def refusal(record: Record) -> str | None:
        try:
            encoder.split_text(record, prompt)
            if larger:
                check_tokens(encoder.encode(record, prompt).ids, encoder.tokenizer, rows)
        except ValueError as error:
            return str(error)
        return None

    match config.records:
        case "self":
            sources = _own_records(config, model, encoder)
        case "demo":
            sources = [demo.records()]
        case _ if config.stream:
            return open_streams(config.records, refusal)
        case _:
            with status("reading records"):
                sources = read_sources(config.records)
    for source in sources:
        kept = []
        places = source.places or [(number, "") for number in range(1, len(source.records) + 1)]
        for (number, where), record in zip(places, source.records, strict=True):
            reason = refusal(record)
            if reason is None:
                kept.append(record)
            else:
                source.skipped.append((number, where + reason))
        source.records, source.places = kept, []
        if source.report():
            console.print(source.report(), markup=False)
        if not kept:
            raise ValueError(f"no usable record: {source.report()}")
    return sources


def check_tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises ValueError if a token has no row in an embedding of so many."""
    if (highest := max(ids, default=0)) >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ValueError(
            f"the tokenizer gives the token {token!r} the number {highest}, and the model's embedding has {rows} rows"
        )


def _own_records(config: PruneConfig, model: PreTrainedModel, encoder: Encoder) -> list[Source]:
    """Records that the model writes, once a run."""
    path = Path(config.output) / "self.jsonl"
    if not path.exists():
        partial = path.with_name("self.jsonl.unfinished")
        with progress_bar() as bar:
            task = bar.add_task("the model writes records", total=config.self_records, note="")
            write_records(model, encoder, config.self_records, config.seed, partial, lambda n: bar.advance(task, n))
        whole_files.write(path, partial.read_bytes())
        partial.unlink()
    return [read_file(path)]
