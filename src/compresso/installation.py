"""Whether this machine can run compresso: packages, devices, memory, disks, speed, the hub."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from compresso import demo
from compresso.findings import Finding
from compresso.workbench import compute_dtype

PACKAGE = "compresso-llm"
EXTRAS = {
    "eval": "compresso evaluate",
    "gguf": ".gguf files",
    "onnx": "compresso export --to onnx",
    "4bit": "--precision 4bit",
}
"""What each optional part of the installation is for."""
SHOWN = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
ENOUGH_MEMORY, ENOUGH_DISK = 4e9, 5e9  # what the demo takes, and a model with what is cut from it
CGROUP = Path("/sys/fs/cgroup")
SECONDS = 0.2  # that a speed is measured for
NOTABLY = 1.5  # times as fast is worth a note, what machines share with others varies less


def examine() -> list[Finding]:
    """All that is to be known before a first run. Needs no network and writes nothing."""
    device = best_device()
    return [*_packages(), *_devices(), *_speed(device), _memory(), *_disks(), *_hub()]


def _packages() -> Iterator[Finding]:
    yield Finding("python", "good", platform.python_version())
    try:
        listed = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
        yield Finding("compresso", "good", importlib.metadata.version(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        what = f"{PACKAGE} is not installed as a package, so that nobody knows which releases it needs"
        yield Finding("compresso", "note", what, f"`pip install {PACKAGE}`, or `pip install -e .` in its sources")
        listed = [Requirement(name) for name in SHOWN]
    needed = [one for one in listed if not one.marker or one.marker.evaluate({"extra": ""})]
    for name in SHOWN:
        if name not in [one.name for one in needed]:
            needed.append(Requirement(name))  # of a package of ours that needs it
    for one in needed:
        if problem := _problem(one):
            yield Finding(one.name, "wrong", problem, f"pip install '{one.name}{one.specifier}'")
        elif one.name in SHOWN:
            yield Finding(one.name, "good", importlib.metadata.version(one.name))
    for extra, use in EXTRAS.items():
        optional = [one for one in listed if one not in needed and one.marker and one.marker.evaluate({"extra": extra})]
        problems = [f"{one.name} {problem}" for one in optional if (problem := _problem(one))]
        install = f"pip install '{PACKAGE}[{extra}]'"
        if problems:
            yield Finding(f"[{extra}]", "note", f"{'; '.join(problems)} (for {use}: {install})")
        elif optional:
            found = ", ".join(f"{one.name} {importlib.metadata.version(one.name)}" for one in optional)
            yield Finding(f"[{extra}]", "good", f"{found} (for {use})")


def _problem(needed: Requirement) -> str:
    """What is wrong with an installed package; nothing if it meets what is needed."""
    try:
        found = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return "" if needed.specifier.contains(found, prereleases=True) else f"{found}, needed {needed.specifier}"


def best_device() -> torch.device:
    """The one that `--device auto` takes."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _devices() -> Iterator[Finding]:
    cores, threads = psutil.cpu_count(logical=False) or os.cpu_count(), torch.get_num_threads()
    yield Finding("cpu", "good", f"{platform.processor() or platform.machine()}, {cores} cores, torch uses {threads}")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        about = torch.cuda.get_device_properties(number)
        told = f"{about.name}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free, capability {about.major}.{about.minor}"
        do = "" if free > total / 2 else "`nvidia-smi` tells which process holds its memory"
        yield Finding(f"cuda:{number}", "note" if do else "good", told, do)
    if torch.backends.mps.is_available():
        yield Finding("mps", "good", f"Apple GPU, {torch.mps.recommended_max_memory() / 1e9:.1f} GB for it")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("cuda", "note", "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs", "unset it to use them")
    elif not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        built = f"is built for CUDA {torch.version.cuda} and sees none" if torch.version.cuda else "is built for CPUs"
        what = f"nvidia-smi is here, but this torch ({torch.__version__}) {built}"
        yield Finding("cuda", "note", what, "`nvidia-smi` tells the driver's CUDA; install a torch built for it")


def _speed(device: torch.device) -> Iterator[Finding]:
    """Matrix products, which nearly all of a run's time goes into."""
    chosen = compute_dtype("auto", device)
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates[name] = rate(device, dtype)
        taken = ", what --precision auto takes" if dtype == chosen else ""
        yield Finding(f"{device.type} {name}", "good", f"{rates[name] / 1e9:,.0f} GFLOP/s{taken}")
    own, other = ("bf16", "fp32") if chosen == torch.bfloat16 else ("fp32", "bf16")
    if rates[other] > NOTABLY * rates[own]:
        what = f"{other} is {rates[other] / rates[own]:.1f} times as fast as {own}, which auto takes"
        yield Finding("precision", "note", what, f"--precision {other}")


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product, the best of a few."""
    best, size = 0.0, 256
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        a = torch.ones(size, size, dtype=dtype, device=device)
        _wait_for(device)
        start = time.perf_counter()
        a @ a
        _wait_for(device)
        took = time.perf_counter() - start
        best = max(best, 2 * size**3 / took)
        if took < SECONDS / 40 and size < 8192:
            size *= 2
    return best


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    total, free, where = memory.total, memory.available, ""
    try:  # of a container or a job, which may have less than the machine
        limit = int((CGROUP / "memory.max").read_text())
        if limit < total:
            total, free = limit, min(free, limit - int((CGROUP / "memory.current").read_text()))
            where = " that this container or job may take"
    except (OSError, ValueError):
        pass
    do = "close other programs, or take a smaller model; `compresso estimate` tells what one needs"
    scarce = free < ENOUGH_MEMORY
    told = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB{where}"
    return Finding("memory", "note" if scarce else "good", told, do if scarce else "")


def _disks() -> Iterator[Finding]:
    places = [("this folder", Path(), "--output on another disk")]
    places.append(("hub's cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder on another disk"))
    places.append(("demo's cache", demo.cache(), "set COMPRESSO_CACHE to a folder on another disk"))
    for name, place, elsewhere in places:
        place = place.expanduser().absolute()
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        told = f"{place}: {free / 1e9:.1f} GB free"
        if not os.access(there, os.W_OK):
            yield Finding(name, "wrong", f"{told}, and it cannot be written", elsewhere)
        else:
            do = elsewhere if free < ENOUGH_DISK else ""
            yield Finding(name, "note" if do else "good", told, do)


def _hub() -> Iterator[Finding]:
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: only what the cache holds is found")
    elif constants.ENDPOINT != "https://huggingface.co":
        yield Finding("hub", "note", f"HF_ENDPOINT is set: models come from {constants.ENDPOINT}")
    told = "there is one" if get_token() else "none; only gated and private models need one (`hf auth login`)"
    yield Finding("hub token", "good", told)
