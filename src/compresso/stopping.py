"""How a run is stopped from outside: by Ctrl-C, or by SIGTERM (Slurm, spot instances, torchrun) in the same way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED, TERMINATED, DIVERGED, DISCONNECTED = 130, 143, 3, 4  # exit codes


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Stopped(RuntimeError):
    """Training ended early; the message says why and what is kept."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def raise_on_sigterm() -> None:
    """From here on SIGTERM raises Terminated in the main thread."""

    def terminate(signal_number, frame):
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """No signal stops what is inside: the state is being saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
