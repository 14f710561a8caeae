"""Compresso: make large language models physically smaller.

`prune`, `resume`, `recover`, `evaluate` and `export` do what the commands of the same name do; the rest are the parts.
Importing this package lets `AutoModelForCausalLM.from_pretrained` load checkpoints whose
layers differ in width, without remote code.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a remark on import about a kernel that is not needed

from compresso.checkpoint import load
from compresso.config import PruneConfig
from compresso.export import export
from compresso.extract import extract
from compresso.pipeline import prune, recover, resume
from compresso.plan import Plan
from compresso.shape import describe

__all__ = ["Plan", "PruneConfig", "describe", "evaluate", "export", "extract", "load", "prune", "recover", "resume"]


def __getattr__(name: str):
    if name == "evaluate":  # lm-eval takes seconds to import, and is not always installed
        from compresso.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module 'compresso' has no attribute {name!r}")
