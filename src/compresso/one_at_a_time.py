"""One command at a time in a run folder: a lock that goes with the process, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another command is at work in {folder}, and two would spoil each other's files; wait until it has "
                "ended, or end it (Ctrl-C, or kill: what it has done is kept), or choose another --output"
            ) from None
        except OSError:  # this file system has no locks
            pass
        yield
