"""Does it help to tell a model that it is being pruned? What the paper's tables leave open.

python benchmarks/prompt.py --data records.jsonl --data-dir my-data        # writes benchmarks/results/prompt.json

SmolLM2-135M-Instruct is pruned and recovered three times, alike but for the system turn: the paper's long prompt, none,
or a text of as many tokens about something else. Each result answers with each of the three, so that what the prompt
does in training and what it does in use come apart. Loss on 128 held-out records, record by record, and two tasks of
lm-eval, document by document, are compared with the model that never saw a prompt, asked without one.

It resumes: run folders and scores lie in --work.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import compresso
from compresso import checkpoint, progress, whole_files
from compresso.batches import Encoder, batches
from compresso.environment import versions
from compresso.paired import difference, together
from compresso.perplexity import mean_loss
from compresso.prompts import BODIES, find_prompt
from compresso.records import read_sources
from compresso.workbench import compute_dtype, release_memory

RESULT = Path(__file__).parent / "results" / "prompt.json"
HELD_OUT, LENGTH = 128, 192
SUITE = "piqa,hellaswag"
SETTINGS = {"target_sparsity": 0.2, "max_length": LENGTH, "batch_size": 8, "validation_records": 16}
NEUTRAL = Path(__file__).parent / "neutral.txt"


def neutral_file(folder: Path, tokenizer: Any) -> Path:
    """A text about something else with as many tokens as the long prompt."""
    ids = tokenizer(" ".join(NEUTRAL.read_text().split()))["input_ids"]
    wanted = len(tokenizer(BODIES["long"].strip())["input_ids"])
    if len(ids) < wanted:
        raise ValueError(f"the neutral text has {len(ids)} tokens, fewer than the {wanted} of the prompt")
    path = folder / "neutral.txt"
    path.write_text(tokenizer.decode(ids[:wanted]))
    return path


def record_losses(model: Any, encoder: Encoder, records: list, prompt_name: str, parameters: int) -> list[float]:
    """Mean loss of each record's answer, in nats a token."""
    prompt = find_prompt(prompt_name, "chat").filled(sparsity=0.2, target_sparsity=0.2, parameters=parameters)
    return [mean_loss(model, batches([record], encoder, prompt)) for record in records]


def learn(train: Path, run: Path, prompt: str, steps: int) -> None:
    """Prune and recover with this prompt, or go on with it, unless it is done."""
    if (run / "progress.json").exists():
        if not progress.read(run).done:
            compresso.resume(str(run))
    else:
        compresso.prune(
            model="demo",
            data=str(train),
            prompt=prompt,
            output=str(run),
            overwrite=True,
            steps=steps,
            recover_steps=steps // 2,
            **SETTINGS,
        )


def all_losses(work: Path, steps: int, prompts: dict[str, str], encoder: Encoder) -> dict[str, list[float]]:
    """Of every model under every prompt; kept in a file as they come."""
    records = read_sources(str(work / "held-out.jsonl"))[0].records
    kept = work / "losses.json"
    losses: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for trained, name in prompts.items():
        learn(work / "train.jsonl", work / trained, name, steps)
        model = compresso.load(work / trained / "model")[0]
        model = checkpoint.cast(model, compute_dtype("auto", model.device))
        for asked in prompts:
            key = f"{trained} > {asked}"
            if key not in losses:
                losses[key] = record_losses(model, encoder, records, prompts[asked], model.num_parameters())
                whole_files.write(kept, json.dumps(losses).encode())
                print(f"{key}: {statistics.mean(losses[key]):.4f}", flush=True)
        del model
        release_memory()
    return losses


def all_scores(work: Path, prompts: dict[str, str], data_dir: Path, limit: int) -> dict[str, list[list[float]]]:
    """Task by task, document by document, of every model under every prompt."""
    scores = {}
    for asked, name in prompts.items():
        found = compresso.evaluate(
            [str(work / trained) for trained in prompts],
            suite=SUITE,
            limit=limit,
            data_dir=str(data_dir),
            prompt=name,
            prompt_format="chat",
            cost=False,
            output=str(work / f"{asked}.json"),
        )["results"]
        for trained in prompts:
            tasks = found[str(work / trained)].values()
            scores[f"{trained} > {asked}"] = [task["metrics"][task["metric"]]["scores"] for task in tasks]
    return scores


def cell(trained: str, asked: str, losses: dict[str, list[float]], scores: dict[str, list[list[float]]]) -> dict:
    """Means, and differences from the model that never saw a prompt, asked without one."""
    key = f"{trained} > {asked}"
    parts = [difference(a, b) for a, b in zip(scores["none > none"], scores[key], strict=True)]
    return {
        "in_training": trained,
        "in_use": asked,
        "loss": statistics.mean(losses[key]),
        "loss_difference": asdict(difference(losses["none > none"], losses[key])),
        "suite": statistics.mean(map(statistics.mean, scores[key])),
        "suite_difference": asdict(together(parts, [1.0] * len(parts))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="records, a .jsonl file")
    parser.add_argument("--data-dir", type=Path, required=True, help="tasks, as for compresso evaluate")
    parser.add_argument("--work", type=Path, default=Path("runs/prompt"))
    parser.add_argument("--steps", type=int, default=80, help="of pruning; half as many of recovery")
    parser.add_argument("--suite-limit", type=int, default=100, help="documents a task")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    lines = given.data.read_text().splitlines()
    stride = len(lines) // HELD_OUT
    (given.work / "train.jsonl").write_text("\n".join(line for i, line in enumerate(lines) if i % stride) + "\n")
    (given.work / "held-out.jsonl").write_text("\n".join(lines[::stride][:HELD_OUT]) + "\n")
    tokenizer = checkpoint.load("demo")[1]
    prompts = {"long": "long", "none": "none", "neutral": str(neutral_file(given.work, tokenizer))}
    losses = all_losses(given.work, given.steps, prompts, Encoder(tokenizer, LENGTH))
    scores = all_scores(given.work, prompts, given.data_dir, given.suite_limit)
    cells = [cell(trained, asked, losses, scores) for trained, asked in itertools.product(prompts, prompts)]
    result = {
        "settings": {**SETTINGS, "steps": given.steps, "recover_steps": given.steps // 2, "suite": SUITE},
        "documents": given.suite_limit,
        "versions": versions(),
        "cells": cells,
    }
    whole_files.write(RESULT, f"{json.dumps(result, indent=2)}\n".encode())
    for c in cells:
        loss, suite = c["loss_difference"], c["suite_difference"]
        print(
            f"{c['in_training']:8} > {c['in_use']:8} loss {c['loss']:.3f} ({loss['low']:+.3f} to {loss['high']:+.3f})  "
            f"suite {c['suite']:.3f} ({suite['low']:+.3f} to {suite['high']:+.3f})"
        )


if __name__ == "__main__":
    main()
