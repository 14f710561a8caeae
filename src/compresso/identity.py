"""Whether a run goes on with the model, records and launch that it began with."""

import hashlib
import itertools
import json
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from compresso.progress import Progress
from compresso.records import Record, Source
from compresso.streams import Stream


def check_processes(progress: Progress, accelerator: Accelerator, folder: Path) -> None:
    """Each process takes its share of the records of a step; with others a step would be another one. Raises
    ValueError if they are not as many as at the beginning."""
    if progress.processes != accelerator.num_processes:
        raise ValueError(
            f"{folder} was begun by {progress.processes} processes, and this launch has {accelerator.num_processes}; "
            f"its steps take --batch-size records in each. Launch it with {progress.processes}"
        )


def check_unchanged(progress: Progress, found: dict[str, str], folder: Path) -> None:
    """Hold `found`, digests by name, against those that the run began with; new names are entered.

    Raises ValueError if one is another.
    """
    for name, digest in found.items():
        if progress.inputs.setdefault(name, digest) != digest:
            raise ValueError(
                f"the {name} of {folder}: not what the run began with, so that it cannot go on as it was. Bring back "
                "what was there, or start again with --overwrite"
            )


def digest_model(model: PreTrainedModel, place: Path | None) -> str:
    """Of the shapes of its parameters, and of a few numbers of each; where it is not whole, of its files' sizes."""
    digest = hashlib.sha256()
    if place:
        files = {file.name: file.stat().st_size for file in sorted(place.glob("*.safetensors"))}
        digest.update(json.dumps(files).encode())
        return digest.hexdigest()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64]
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def digest_text(text: str) -> str:
    """SHA-256 of its UTF-8, half surrogate pairs included."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_records(sources: list[Source] | list[Stream], held_out: list[Record]) -> str:
    """Of all records; of a stream, of those held out."""
    digest = hashlib.sha256()
    for record in itertools.chain(held_out, *(s.records for s in sources if isinstance(s, Source))):
        digest.update(repr(record).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
