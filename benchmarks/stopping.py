"""A real run that is stopped: how fast SIGTERM ends it, what checkpoints cost, and whether the result is the same.

python benchmarks/stopping.py --work runs/stopping        # writes benchmarks/results/stopping.json; about 10 minutes

SmolLM2-135M-Instruct is pruned and recovered with all its weights, once left alone, once ended by SIGTERM and SIGKILL
in turn, and gone on with each time. Both runs write a checkpoint every --seconds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from compresso import whole_files
from compresso.environment import versions
from faults import differences

RESULT = Path(__file__).parent / "results" / "stopping.json"
SETTINGS = ["--steps", "16", "--recover-steps", "8", "--hold", "0.5", "--validation-records", "8"]
SETTINGS += ["--calibration-records", "32", "--own-texts", "16"]  # what comes before the steps, shorter
SIGNALS = {3: signal.SIGTERM, 8: signal.SIGKILL, 13: signal.SIGTERM, 19: signal.SIGKILL}
"""What ends the run once metrics.jsonl has so many rows."""


def start(place: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "compresso.cli", "prune", *words], cwd=place)


def rows(place: Path) -> int:
    path = place / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/stopping"))
    parser.add_argument("--seconds", default="20", help="between checkpoints")
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    words = ["--model", "demo", "--output", "run", "--checkpoint-seconds", given.seconds, *SETTINGS]
    for name in ("alone", "stopped"):
        (given.work / name).mkdir(parents=True)
    assert start(given.work / "alone", *words).wait() == 0
    place, ends = given.work / "stopped", []
    process = start(place, *words)
    for row, number in SIGNALS.items():
        while process.poll() is None and rows(place) < row:
            time.sleep(0.05)
        sent = time.perf_counter()
        os.kill(process.pid, number)
        code = process.wait()
        ends.append({"signal": number.name, "row": row, "exit_code": code, "seconds": time.perf_counter() - sent})
        print(ends[-1], flush=True)
        process = start(place, "--resume", "run")
    assert process.wait() == 0
    summary = json.loads((given.work / "alone" / "run" / "summary.json").read_text())
    state = summary["checkpoints"]
    result = {
        "ends": ends,
        "checkpoints": state,
        "checkpoint_seconds": float(given.seconds),
        "seconds": summary["seconds"],
        "share_of_time": state["seconds"] / summary["seconds"],
        "differing_files": differences(given.work / "alone" / "run", place / "run"),
        "versions": versions(),
    }
    whole_files.write(RESULT, f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
