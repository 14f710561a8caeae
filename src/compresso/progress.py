"""progress.json: what a run folder is in the middle of, so that `compresso prune --resume RUN` can go on with it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compresso import whole_files

FILE = "progress.json"
SLOWER = 0.5  # times the step sizes, from the checkpoint on that a diverged run went back to


@dataclass
class Progress:
    """Kept in the run folder, and rewritten when something of it changes."""

    doing: str = "prune"
    """The command: `prune` or `recover`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `compresso recover`, beside those of the run."""
    further: bool = False
    processes: int = 1
    rows: int = 0
    """Rows of metrics.jsonl that were there before."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of model and records."""
    accumulation: int = 1
    """Times that of the settings, since memory ran out."""
    setbacks: list[dict[str, Any]] = field(default_factory=list)
    """Each with `kind` (`diverged` or `memory`), `stage`, and the `step` that it went back to."""
    done: bool = False

    def write(self, folder: Path) -> None:
        whole_files.write(folder / FILE, self.to_json())

    def to_json(self) -> bytes:
        return f"{json.dumps(asdict(self), indent=2)}\n".encode()

    def slowed(self, stage: str, step: int) -> float:
        """Share of the step sizes that a step of a stage, from 0, takes."""
        back = [s for s in self.setbacks if s["kind"] == "diverged" and s["stage"] == stage and s["step"] <= step]
        return SLOWER ** len(back)


def read(folder: Path) -> Progress:
    """Raises FileNotFoundError or ValueError, with what to do, if there is nothing to go on from."""
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{folder} is no run folder (it has no config.yaml): nothing was begun there that could go on. Start it "
            "with `compresso prune --output`"
        )
    try:
        found = Progress(**json.loads((folder / FILE).read_bytes()))
        for name, usual in vars(Progress()).items():
            if type(value := getattr(found, name)) is not type(usual):
                raise ValueError(f"{name} is {str(value)[:80]!r}")
        return found
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no {FILE}, so that nobody knows where it stopped. If it has cut/ and summary.json, "
            f"`compresso recover {folder}` repeats its recovery; else start it again from {folder / 'config.yaml'}"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is damaged ({error}); start again from {folder / 'config.yaml'}") from error
