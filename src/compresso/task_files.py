"""Task files that lie beside local documents: settings to us, where lm-eval would let them run code.

lm-eval imports what `!function` names and renders templates without a sandbox; a folder may come from anyone.
"""

from pathlib import Path
from typing import Any

import lm_eval.utils
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST = 1_000_000  # bytes


def sandbox_templates() -> None:
    """Let lm-eval render the templates of task files in a sandbox, from now on."""
    own = lm_eval.utils.env
    if not isinstance(own, ImmutableSandboxedEnvironment):
        sandboxed = ImmutableSandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=True)
        sandboxed.filters |= own.filters
        lm_eval.utils.env = sandboxed


def check(folder: Path) -> bool:
    """Whether there are task files in a folder. Raises ValueError for one that is more than settings."""
    files = sorted(folder.rglob("*.yaml"))
    for file in files:
        if not file.is_file() or file.stat().st_size > LARGEST:
            raise ValueError(f"{file} is no task file: expected a file of at most {LARGEST:,} bytes")
        try:
            settings: Any = yaml.safe_load(file.read_bytes())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{file} is more than settings: {str(error)[:200]}. Tags such as !function run code, which is not done "
                "for files in --data-dir; if you trust it, add it to lm-eval itself"
            ) from None
        included = settings.get("include", []) if isinstance(settings, dict) else []
        for name in included if isinstance(included, list) else [included]:
            if not (file.parent / str(name)).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{file} includes {str(name)[:80]!r}, expected a file in {folder}")
    return bool(files)
