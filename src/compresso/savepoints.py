"""States of a training on disk: numbered folders, each with a manifest of checksums; the newest whole one counts.

RUN/checkpoints/prune-000120/ holds safetensors files, facts.json, and manifest.json with the bytes and the SHA-256 of
each. A folder gets its name when all of it is on the disk. One that has been damaged since is named, and passed over.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresso import whole_files

FOLDER = "checkpoints"
MANIFEST, FACTS = "manifest.json", "facts.json"
AT_ONCE = 256 * 2**20  # bytes of tensors in a file, which are in memory a second time while it is written


class Damaged(ValueError):
    """A state is not what was written; the message names the file."""


@dataclass(frozen=True)
class Savepoint:
    """A whole state: `facts` as they were given, and tensors that are read when they are asked for."""

    folder: Path
    facts: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            found |= load_file(file)
        return found


def save(run: Path, stage: str, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int) -> None:
    """Write the state after `step` steps of a stage; only the `keep` newest of the stage stay.

    Raises OSError if the disk does not take it; what was there before is whole then.
    """
    folder = run / FOLDER / f"{stage}-{step:06d}"
    try:
        with whole_files.new_folder(folder) as partial:
            for number, part in enumerate(_parts(tensors), 1):
                save_file(part, partial / f"state-{number:05d}.safetensors")
            (partial / FACTS).write_text(json.dumps(facts))
            written = sorted(partial.iterdir())
            files = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in written}
            (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=2))
    except (OSError, SafetensorError) as error:
        raise OSError(f"the checkpoint {folder} could not be written: {error}") from error
    for old in _folders(run, stage)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(run: Path, stage: str) -> tuple[Savepoint | None, list[str]]:
    """The newest whole state of a stage, if there is one, and what is wrong with newer ones."""
    wrong: list[str] = []
    for folder in _folders(run, stage):
        try:
            return read(folder), wrong
        except Damaged as error:
            wrong.append(str(error))
    return None, wrong


def remove(run: Path, stage: str | None = None) -> None:
    """Delete the states of a stage, or all."""
    for folder in (run / FOLDER).glob(f"{stage}-*") if stage else [run / FOLDER]:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(run: Path, stage: str) -> list[Path]:
    """Newest first."""
    found = [path for path in (run / FOLDER).glob(f"{stage}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def read(folder: Path) -> Savepoint:
    """One state. Raises Damaged, naming the file, unless all of it is what was written."""
    manifest = folder / MANIFEST
    try:
        files = dict(json.loads(manifest.read_bytes())["files"])
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{manifest} is damaged or missing") from error
    for name, (size, digest) in listed.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise Damaged(f"{file} is missing")
        if file.stat().st_size != size:
            raise Damaged(f"{file} has {file.stat().st_size:,} bytes, {size:,} were written")
        if _digest(file) != digest:
            raise Damaged(f"{file} is not what was written (its SHA-256 differs)")
    if FACTS not in listed:
        raise Damaged(f"{manifest} does not list {FACTS}")
    return Savepoint(folder, json.loads((folder / FACTS).read_bytes()))


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _parts(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in portions of about `AT_ONCE` bytes, on the CPU."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        part[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        if size >= AT_ONCE:
            yield part
            part, size = {}, 0
    if part:
        yield part
