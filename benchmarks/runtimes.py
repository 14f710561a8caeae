"""The dense and the pruned model in llama.cpp: size, memory, tokens/s and perplexity, in several number formats.

python benchmarks/runtimes.py runs/demo --text held-out.txt

Dense and pruned files take turns, each in a process of its own; medians and spreads over the rounds. The perplexity is
llama.cpp's, token by token, and for f32 is compared with transformers'. What has been measured of it is not measured
again; `--rounds 0` leaves speeds as they are.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compresso import checkpoint, whole_files
from compresso.environment import versions
from compresso.export import export
from compresso.llama_cpp import LlamaCpp
from compresso.perplexity import perplexity, text_windows, window_nats

RESULT = Path(__file__).parent / "results" / "runtimes.json"
KINDS = ("f32", "f16", "q8_0", "q4_k_m")
PROMPT, ANSWER = 256, 64
WINDOW = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of `compresso prune --model demo`")
    parser.add_argument("--text", type=Path, help="held-out text for the perplexity")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "compresso-runtimes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, for the perplexity")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed", type=Path, help=argparse.SUPPRESS)  # this process measures one file
    given = parser.parse_args()
    if given.speed:
        print(json.dumps(_speed(given.speed, given.threads)))
        return
    models = {"dense": "demo", "pruned": given.run}
    files = {
        (name, kind): _written(model, kind, given.work / f"{name}-{kind}")
        for name, model in models.items()
        for kind in KINDS
    }
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    if given.rounds:
        found |= {"versions": versions(), "rounds": given.rounds, "threads": given.threads}
        speeds: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in files}
        for _ in range(given.rounds):
            for key, file in files.items():
                command = [sys.executable, __file__, given.run, "--speed", str(file), "--threads", str(given.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                speeds[key].append(json.loads(done.stdout.splitlines()[-1]))
        for (name, kind), each in speeds.items():
            row = _row(found, name, kind)
            row["file_bytes"] = files[name, kind].stat().st_size
            for what in each[0]:
                values = [one[what] for one in each]
                row[what] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, model in models.items():
            loaded, _ = checkpoint.load(checkpoint.of_run(model))
            found[f"{name}_parameters"] = sum(p.numel() for p in loaded.parameters())
        _save(found)
    for (name, kind), file in files.items():
        row = _row(found, name, kind)
        if given.text and row.get("perplexity_tokens") != given.windows * WINDOW:
            row |= _perplexities(models[name], file, kind, given.text, given.windows)
            _save(found)
        print(json.dumps(row), flush=True)


def _row(found: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
    """The entry of one file, made if need be."""
    key = {"model": name, "type": kind}
    for row in found["rows"]:
        if key.items() <= row.items():
            return row
    found["rows"].append(key)
    return key


def _save(found: dict[str, Any]) -> None:
    whole_files.write(RESULT, f"{json.dumps(found, indent=2)}\n".encode())


def _written(model: str, kind: str, folder: Path) -> Path:
    if not folder.exists():
        export(model, "gguf", str(folder), kind)
    return folder / "model.gguf"


def _speed(file: Path, threads: int) -> dict[str, float]:
    runtime = LlamaCpp(file, PROMPT + ANSWER + 8, threads)
    prompt = [1000 + i for i in range(PROMPT)]
    timings = runtime.complete(prompt, ANSWER, ignore_eos=True, cache_prompt=False)["timings"]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "prefill_tokens_per_second": timings["prompt_per_second"],
        "decode_tokens_per_second": timings["predicted_per_second"],
        "peak_memory_bytes": 1024 * int(peak.split()[1]),
    }


def _perplexities(model: str, file: Path, kind: str, text: Path, windows: int) -> dict[str, float]:
    loaded, tokenizer = checkpoint.load(checkpoint.of_run(model), dtype=torch.float32)
    ids = text_windows(text.read_text(encoding="utf-8"), tokenizer, windows, WINDOW)
    runtime = LlamaCpp(file, WINDOW + 8, torch.get_num_threads())
    found = {
        "perplexity_tokens": windows * WINDOW,
        "perplexity": perplexity([runtime.mean_nats(row.tolist()) for row in ids]),
    }
    if kind == "f32":
        found["perplexity_transformers"] = perplexity(window_nats(loaded, ids))
    return found


if __name__ == "__main__":
    main()
