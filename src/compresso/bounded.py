"""Texts that a checkpoint's chat template writes: in bounded time, memory and length, or not at all.

transformers runs templates in a sandbox, which keeps them from files and attributes, but not from loops and long texts.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from compresso.stopping import uninterrupted

SECONDS = 5.0
BYTES = 2**30  # beyond what the process has already
CHARACTERS = 100_000  # beyond four times what is to be written
STATM = Path("/proc/self/statm")


class TooMuch(OSError):
    """A template was stopped. It is no matter of one record: none is left out for it, all ends."""


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], generate: bool) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Raises ValueError if the template refuses it, TooMuch if it does not come to an end.
    """
    try:
        with limits():
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    except (TooMuch, ValueError):
        raise
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error
    except Exception as error:  # of the template's own expressions
        raise ValueError(f"the chat template fails: {type(error).__name__}: {str(error)[:200]}") from error
    if len(text) > CHARACTERS + 4 * sum(len(turn["content"]) for turn in turns):
        raise TooMuch(f"the chat template writes {len(text):,} characters for a short text; use a model without it")
    return text


@contextmanager
def limits() -> Iterator[None]:
    """Raise TooMuch after some seconds, or when what runs inside takes a gigabyte more.

    It is the processor's time, of which a busy machine gives no less. It is bounded in the main thread, where alone
    signals arrive, and memory where /proc tells how much there is.
    """
    told = f"the chat template was stopped after {SECONDS:g} s or {BYTES // 2**30} GB on one text; it may have no end"

    def stop(*_: Any) -> None:
        raise TooMuch(told)

    timed = threading.current_thread() is threading.main_thread()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.getsignal(signal.SIGPROF)  # known before anything can be interrupted
    try:
        if STATM.exists():
            most = int(STATM.read_text().split()[0]) * resource.getpagesize() + BYTES
            soft = min(limit for limit in (most, *before) if limit != resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
        if timed:
            signal.signal(signal.SIGPROF, stop)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        yield
    except MemoryError:
        raise TooMuch(told) from None
    finally:
        with uninterrupted():
            if timed:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.signal(signal.SIGPROF, signal.SIG_DFL if handler is None else handler)
            resource.setrlimit(resource.RLIMIT_AS, before)
