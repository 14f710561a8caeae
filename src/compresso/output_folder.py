"""The folder of a new run: whether it may be written, and its first files."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from compresso import progress, whole_files
from compresso.config import PruneConfig
from compresso.environment import environment
from compresso.one_at_a_time import alone_in

RUN_MARKS = ("config.yaml", "env.json")


def check_output(config: PruneConfig) -> None:
    """An output that exists is replaced only when asked for, only if it is a run, and never with an input in it.

    Raises ValueError otherwise.
    """
    folder = Path(config.output)
    whole_files.heal(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; name a folder that is to be written")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not config.overwrite:
        go_on = f"; `compresso prune --resume {folder}` goes on with the run in it" if _unfinished(folder) else ""
        raise ValueError(
            f"{folder} exists and is not empty; choose another --output, or --overwrite to replace it{go_on}"
        )
    if not all((folder / name).is_file() for name in RUN_MARKS):
        marks = " and ".join(RUN_MARKS)
        raise ValueError(
            f"{folder} is not a run folder ({marks} are missing), so it is not replaced; choose another --output"
        )
    inputs = [config.model, config.text, config.prompt, *config.records.split(",")]
    for name in filter(None, inputs):
        path = Path(name.strip().rpartition(":")[0] or name.strip())
        if path.exists() and folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{path} lies in {folder}, which --overwrite would replace; choose another --output")
    with alone_in(folder):  # a run that is under way is not replaced
        pass


def _unfinished(folder: Path) -> bool:
    try:
        return not progress.read(folder).done
    except (FileNotFoundError, ValueError):
        return False


def make_folder(config: PruneConfig, accelerator: Accelerator, started: progress.Progress, held: ExitStack) -> None:
    """From here on the run leaves traces; all that can be wrong with its input has been checked.

    Its lock stays until `held` ends. Raises ValueError if something else is there by now.
    """
    accelerator.wait_for_everyone()  # all have looked at what is there
    if not accelerator.is_main_process:
        return
    check_output(config)  # another command may have begun there since
    folder = Path(config.output)
    with whole_files.new_folder(folder) as partial:
        write_config(config, partial)
        (partial / "env.json").write_text(json.dumps(environment(accelerator), indent=2) + "\n")
        (partial / progress.FILE).write_bytes(started.to_json())
        held.enter_context(alone_in(partial))


def write_config(config: PruneConfig, folder: Path) -> None:
    """The settings of a run, without what was asked for once."""
    (folder / "config.yaml").write_text(replace(config, overwrite=False).to_yaml())
