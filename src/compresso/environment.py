"""Versions and machine, as a repetition of a run would want to know them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import Accelerator

PACKAGES = ("compresso-llm", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a repetition would want to know; nothing from the environment variables."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": str(accelerator.device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
