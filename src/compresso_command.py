"""The command `compresso`: it can be stopped from its first moment on, before anything heavy is imported.

It lies beside the package, because importing anything of the package imports torch and transformers.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run a command as `compresso.cli.main` does; Ctrl-C and SIGTERM while it is being imported end it quietly."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, _leave)
    try:
        from compresso.cli import main as run
    except ImportError as error:
        sys.stderr.write(
            f"compresso: {error}. `pip check` tells what is missing; `pip install compresso-llm` mends it\n"
        )
        return 1
    for number, handler in before.items():
        signal.signal(number, handler)
    return run()


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing has been begun. An exception would pass through half of an import, which may turn it into another one."""
    os.write(2, b"compresso: interrupted\n" if number == signal.SIGINT else b"compresso: terminated\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
