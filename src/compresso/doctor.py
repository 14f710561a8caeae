"""`compresso doctor`: is the machine fit, is a run whole, and what to do where not."""

from pathlib import Path

from rich.console import Console

from compresso import installation, run_folder
from compresso.findings import Finding, show, show_what_to_do


def doctor(run: str | None, console: Console) -> bool:
    """Examine the installation and, if one is named, a run folder; print what was found. Whether nothing is wrong.

    Raises FileNotFoundError or ValueError for a run that is no folder of ours.
    """
    of_run = run_folder.examine(Path(run)) if run is not None else []
    of_machine = installation.examine()
    show("This machine", of_machine, console)
    if run is not None:
        show(f"The run {run}", of_run, console)
    found: list[Finding] = [*of_machine, *of_run]
    show_what_to_do(found, console)
    return all(finding.state != "wrong" for finding in found)
