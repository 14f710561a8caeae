"""How a run is stopped from outside: by Ctrl-C, or by SIGTERM (Slurm, spot instances, torchrun) in the same way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED, TERMINATED, DIVERGED, DISCONNECTED, NO_ROOM, NO_MEMORY = 130, 143, 3, 4, 5, 6  # exit codes
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Stopped(RuntimeError):
    """A run ended early; the message says why, what is kept, and how to go on."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def raise_on_sigterm() -> None:
    """From here on SIGTERM raises Terminated in the main thread."""

    def terminate(signal_number, frame):
        raise Terminated

    if _in_main_thread():
        signal.signal(signal.SIGTERM, terminate)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """No signal stops what is inside, which must be short: one that comes is delivered at the end."""
    if not _in_main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
