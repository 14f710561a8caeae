"""What is fetched from the hub: tried again where that helps, and told with the command to run where it does not."""

import errno
import time
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from rich.console import Console

WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
PATIENCE = 300.0  # seconds that the hub may ask for before the next try
TIMEOUT = 10.0  # seconds in which it must answer the first request
HTTP_ERROR: type[Exception] = errors.HTTPError  # of httpx or httpx2, as the release of the hub's client has it
FULL = (errno.ENOSPC, errno.EDQUOT)
LOOKED_AT = {"model": "config.json", "dataset": "README.md"}
T = TypeVar("T")


class Unavailable(FileNotFoundError):
    """The hub does not give what was asked for; the message says why, and what to run."""


def fetch(name: str, call: Callable[[], T], kind: str = "model") -> T:
    """What `call` returns, which loads the model or dataset `name` and may fetch it from the hub.

    What can pass by itself (no connection, no answer, a busy server, half a file) is tried again after a while, which
    the user is told. Raises Unavailable for what does not pass, and as `call` does for all that is not the hub's.
    """
    if Path(name).exists():
        return call()

    def attempt(number: int) -> T:
        if number > 1 or not _cached(name, kind):
            _knock(name, kind)
        return call()

    try:
        return patiently(attempt, lambda error: explain(error, name, kind) is None and _passing(error), name)
    except Exception as error:
        told, cause = explain(error, name, kind), _passing(error)
        if told is None and cause is None:
            raise
        told = told or _given_up(cause, name, kind)
        raise Unavailable(told) from error


def patiently(attempt: Callable[[int], T], passing: Callable[[Exception], Any], name: str) -> T:
    """What `attempt` returns, given the number of the try; tried again after errors that are passing.

    `passing` gives the error that may pass, or something false. Raises what the last try raised.
    """
    for number, pause in enumerate(WAITS, 1):
        try:
            return attempt(number)
        except Exception as error:
            cause = passing(error)
            asked = _asked_for(cause)
            if not cause or asked > PATIENCE:
                raise
            pause = max(asked, pause)
            Console(stderr=True).print(
                f"{name}: {_short(cause)}; trying again in {pause:g} s ({number + 1} of {len(WAITS) + 1})",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            time.sleep(pause)
    return attempt(len(WAITS) + 1)


def explain(error: Exception, name: str, kind: str = "model") -> str | None:
    """What a user can do about an error of the hub that will not pass by itself; None for any other error."""
    place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    download = f"hf download {name}" + (" --repo-type dataset" if kind == "dataset" else "")
    for part in _chain(error):
        told = str(part)
        if isinstance(part, OSError) and part.errno in FULL:
            return (
                f"no room for {name}: the disk of {constants.HF_HOME} is full. `hf cache ls` lists what can go, or set "
                "HF_HOME to a folder on a larger disk"
            )
        if isinstance(part, PermissionError):
            return f"{part.filename or constants.HF_HOME} cannot be written; set HF_HOME to a folder of your own"
        if constants.HF_HUB_OFFLINE and isinstance(part, (EntryNotFoundError, ConnectionError)):
            return (
                f"HF_HUB_OFFLINE is set, and the cache has no {kind} {name!r} ({constants.HF_HUB_CACHE}). Unset it; or "
                f"run `{download}` on a machine with a network, and copy its cache here"
            )
        if isinstance(part, GatedRepoError) or (type(part).__name__ == "DatasetNotFoundError" and "gated" in told):
            return (
                f"{name} is gated, and this machine may not read it. Accept its conditions at {place}, then run "
                "`hf auth login`, or set HF_TOKEN, with a token of that account"
            )
        if isinstance(part, RepositoryNotFoundError) or type(part).__name__ == "DatasetNotFoundError":
            return (
                f"the hub has no {kind} {name!r}. Check the spelling at {constants.ENDPOINT}/{kind}s?search="
                f"{name.rpartition('/')[2]}; a private one looks the same: `hf auth login`, or set HF_TOKEN"
            )
        if _status(part) in (401, 403):
            return (
                f"the hub refuses {name} ({_short(part)}): the token of this machine is not accepted. "
                f"`hf auth whoami` tells whose it is, `hf auth login` makes a new one; {place} tells who may read it"
            )
        if "CERTIFICATE_VERIFY_FAILED" in told:
            return (
                f"the certificate of {constants.ENDPOINT} is not trusted here. Behind a proxy that reads along, set "
                "SSL_CERT_FILE to its certificate"
            )
    return None


def _given_up(cause: BaseException | None, name: str, kind: str) -> str:
    download = f"hf download {name}" + (" --repo-type dataset" if kind == "dataset" else "")
    asked = _asked_for(cause)
    if asked > PATIENCE:
        return f"the hub asks to wait for {asked:g} s before it gives {name}; run this again then"
    return (
        f"{constants.ENDPOINT} did not give {name} in {len(WAITS) + 1} tries: {_short(cause)}. Check the network "
        "(behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT) and run this again, it goes on from what has "
        f"arrived; or run `{download}` where there is a network, and copy its cache to {constants.HF_HUB_CACHE}"
    )


def _cached(name: str, kind: str) -> bool:
    """Whether the cache holds anything of it, maybe all; the hub's client then needs no hub to be there."""
    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir()


def _knock(name: str, kind: str) -> None:
    """One request that fails at once and by its own name; later ones fail late, or wrapped in something else."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, LOOKED_AT[kind], repo_type=kind), timeout=TIMEOUT)
    except (EntryNotFoundError, errors.HFValidationError):
        return  # it is there, or was no hub id; what loads it says so in its own words


def _passing(error: Exception) -> BaseException | None:
    """The error in a chain of them that may be gone at the next try."""
    for part in _chain(error):
        if status := _status(part):
            return part if status in (408, 429) or status >= 500 else None
        if isinstance(part, (HTTP_ERROR, ConnectionError, TimeoutError, IncompleteRead)):
            return part
        if "Consistency check failed" in str(part) or type(part).__name__ == "XetDownloadError":
            return part
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in seen:
        yield inner
        seen.append(inner)
        inner = inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__)


def _asked_for(cause: Any) -> float:
    """Seconds that a server asks to wait."""
    response = getattr(cause, "response", None)
    told = response.headers.get("Retry-After", "") if response is not None else ""
    return float(told) if told.isdigit() else 0.0


def _status(error: BaseException) -> int:
    """The server's answer that an error is about, else 0."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _short(error: Any) -> str:
    if _status(error):
        return f"HTTP {_status(error)} {error.response.reason_phrase}".rstrip()
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    return lines[0] if lines and kind == "ConnectionError" else f"{kind}: {lines[0]}" if lines else kind
