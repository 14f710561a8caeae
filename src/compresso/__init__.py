"""Compresso: make large language models physically smaller.

`prune` and `recover` do what the commands of the same name do; the rest are the parts.
Importing this package lets `AutoModelForCausalLM.from_pretrained` load checkpoints whose
layers differ in width, without remote code.
"""

from compresso.checkpoint import load
from compresso.config import PruneConfig
from compresso.extract import extract
from compresso.pipeline import prune, recover
from compresso.plan import Plan
from compresso.shape import describe

__all__ = ["Plan", "PruneConfig", "describe", "extract", "load", "prune", "recover"]
