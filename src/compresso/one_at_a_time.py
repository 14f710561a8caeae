"""One command at a time in a run folder or at a file: a lock that goes with the process, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCKED = "config.yaml"  # in every run folder, and written once


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other command works on the run in `folder`; nothing is checked where the file system has no locks.

    The lock goes with the file that holds it, so that a folder may be renamed.
    Of a launch of several processes the first one stands for all. Raises ValueError if another command is there.
    """
    if fcntl is None or os.environ.get("RANK", "0") != "0" or not (folder / LOCKED).is_file():
        yield
        return
    with (folder / LOCKED).open("rb") as file:
        _lock(file, f"in {folder}")
        yield


@contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Inside, no other command measures into the file at `path`, which is replaced whenever it is written.

    An empty hidden file beside it holds the lock; one that a killed command has left holds none. Raises ValueError if
    another command is there.
    """
    if fcntl is None:
        yield
        return
    place = path.with_name(f".{path.name}.compresso-lock")
    while True:
        with place.open("ab") as file:
            _lock(file, f"with {path}")
            if not _is_at(file, place):  # its command ended in between, and removed it
                continue
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], where: str) -> None:
    """Raises ValueError if another command holds it; a file system without locks is let be."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another command is at work {where}, and two would spoil each other's files; wait until it has ended, or "
            "end it (Ctrl-C, or kill: what it has done is kept), or choose another --output"
        ) from None
    except OSError:
        pass
