"""What a pruning step costs against plain LoRA fine-tuning of the same model on the same records.

python benchmarks/cost.py --quick        # under five minutes; both write benchmarks/results/cost.json
python benchmarks/cost.py

(a) peft and the transformers Trainer as a user would write it: the prompt in front of every record, batches of random
records, padded, logits everywhere. (b) a pruning step of ours: gates of all default kinds, LoRA, the constraint.
Both train the same adapters in the same precision; they alternate in one process, block by block, on the same records.
Time includes the making of batches. Memory is what a block adds to the weights at most, plus the weights.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from compresso import PruneConfig
from compresso.adapters import add_lora, inside
from compresso.batches import batches
from compresso.cost import MemoryPeak
from compresso.lagrangian import Lagrangian, initial_log_alpha, make_schedule
from compresso.masks import Gates, Masks
from compresso.prepare import prepare, versions
from compresso.prompts import find_prompt
from compresso.records import Record, similar_lengths
from compresso.shape import describe
from compresso.train import Pruning, fit
from compresso.workbench import Workbench

RESULT = Path(__file__).parent / "results" / "cost.json"
Block = Callable[[list[Record]], list[float]]


class Clock(TrainerCallback):
    """Seconds of each step, batch making included."""

    def __init__(self):
        self.ends: list[float] = []

    def on_train_begin(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def plain(bench: Workbench, folder: str) -> Block:
    """One block of the Trainer."""
    config = bench.config

    def block(records: list[Record]) -> list[float]:
        wrapped = add_lora(bench.model, config, config.seed)
        examples = [bench.encoder.encode(record, bench.prompt) for record in records]
        rows = [{"input_ids": e.ids, "labels": e.labels, "attention_mask": [1] * len(e.ids)} for e in examples]
        arguments = TrainingArguments(
            folder,
            max_steps=len(records) // config.batch_size,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            use_cpu=bench.accelerator.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        collator = DataCollatorForSeq2Seq(bench.tokenizer, padding=True)
        Trainer(wrapped, arguments, data_collator=collator, train_dataset=rows, callbacks=[clock]).train()
        wrapped.unload()
        return clock.seconds

    return block


def ours(bench: Workbench) -> Block:
    """One block of pruning at its full rate: all gates sampled, the constraint acting."""
    config = bench.config

    def block(records: list[Record]) -> list[float]:
        steps = len(records) // config.batch_size
        shape = describe(bench.model)
        wrapped = add_lora(bench.model, config, config.seed)
        model = inside(wrapped)
        masks = Masks(shape, {unit: initial_log_alpha(unit, config.target_sparsity) for unit in config.units})
        gates = Gates(model, shape)
        schedule = make_schedule(1000, 0.0, config.hold, config.target_sparsity, config.schedule)
        groups = similar_lengths(iter(records), config.batch_size, steps, config.seed)  # as `compresso prune` does
        rows = fit(
            bench.accelerator,
            model,
            lambda sparsity: batches(next(groups), bench.encoder, bench.prompt),
            steps=steps,
            learning_rate=config.learning_rate,
            clip=config.clip,
            seed=config.seed,
            pruning=Pruning(masks, gates, Lagrangian(schedule, masks), 0.05),
        )
        seconds = [float(row["seconds"]) for row in rows]
        gates.remove()
        wrapped.unload()
        return seconds

    return block


def alternate(blocks: dict[str, Block], bench: Workbench, steps: int, repeats: int) -> dict[str, dict]:
    """Seconds a step and peak memory of each, in turn; the first round warms up and is not counted."""
    records = [record for source in bench.sources for record in source.records]
    rng = random.Random(bench.config.seed)
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    memory: dict[str, list[int]] = {name: [] for name in blocks}
    for repeat in range(repeats + 1):
        chosen = rng.sample(records, steps * bench.config.batch_size)
        for name in sorted(blocks, reverse=bool(repeat % 2)):
            peak = MemoryPeak(bench.accelerator.device)
            took = blocks[name](list(chosen))
            if repeat:
                seconds[name].append(sum(took) / len(took))
                memory[name].append(peak.added() or 0)
            print(f"{bench.prompt.name:5} {name:5} {sum(took) / len(took):6.2f} s a step", flush=True)
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    return {
        name: {
            "seconds_a_step": {"median": statistics.median(s), "min": min(s), "max": max(s)},
            "peak_memory_bytes": weights + max(memory[name]),
            "rounds": s,
        }
        for name, s in seconds.items()
    }


def ratios(measured: dict[str, dict]) -> dict[str, float]:
    each = [b / a for a, b in zip(measured["plain"]["rounds"], measured["ours"]["rounds"], strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here."""
    a = torch.randn(1536, 1536).to(dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 1536**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    steps, repeats = (2, 2) if given.quick else (4, 5)
    result: dict = {"steps_a_block": steps, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        config = PruneConfig(output=f"{folder}/run", validation_records=8)
        bench = prepare(config)
        for prompt in ("long", "none"):
            bench.prompt = find_prompt(prompt, bench.prompt.format)
            blocks = {"plain": plain(bench, folder), "ours": ours(bench)}
            result[prompt] = alternate(blocks, bench, steps, repeats)
    result["ratio_time_prompt"] = ratios(result["long"])
    result["ratio_time_no_prompt"] = ratios(result["none"])
    memory = {name: result["long"][name]["peak_memory_bytes"] for name in ("plain", "ours")}
    result["ratio_memory"] = memory["ours"] / memory["plain"]
    result["matrix_products_per_second"] = matrix_rate(bench.model.dtype)
    result["precision"] = str(bench.model.dtype)
    result["versions"] = versions()
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("ratio_time_prompt", "ratio_time_no_prompt", "ratio_memory"):
        print(name, result[name])


if __name__ == "__main__":
    main()
