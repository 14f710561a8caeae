"""Files and folders that appear under their name only when they are whole, and stay so when the power fails.

What is new is written beside the old under another name, brought to the disk (fsync), and takes the name in one step.
These other names are hidden and end like nothing that a user would call a file: what has one is ours to replace.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OLD, PARTIAL = ".compresso-old", ".compresso-partial"


def write(path: Path, content: bytes) -> None:
    """Write or replace a file; one that is there stays until the new one is complete. Raises OSError."""
    partial = _beside(path, PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def leftovers(folder: Path) -> list[Path]:
    """What a command that was stopped while it wrote has left in a folder."""
    return sorted(folder.glob(f".*{PARTIAL}"))


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}{what}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to fill inside, which takes its name when that has ended well, or goes.

    Where `folder` is a link to one, that one is replaced. Raises OSError.
    """
    folder = folder.resolve()
    partial = _beside(folder, PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _take_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # its room may be what others lack
        raise


def _take_place(partial: Path, folder: Path) -> None:
    """Let a finished folder take the name of one that may be there. Raises OSError.

    Folders have no replacement in one step: the one before has another name for a moment. `heal` gives its own back
    where something ended in between.
    """
    for path in sorted(partial.rglob("*"), reverse=True):
        _sync(path)
    _sync(partial)
    old = _beside(folder, OLD)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def heal(folder: Path) -> None:
    """Undo a `new_folder` that was cut short after the old folder had given up its name, or end it."""
    folder = folder.resolve()
    old = _beside(folder, OLD)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring a file, or the list of a folder's files, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
