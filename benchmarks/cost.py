"""What a pruning step costs against plain LoRA fine-tuning of the same model on the same records.

python benchmarks/cost.py --quick        # under five minutes; both write benchmarks/results/cost.json
python benchmarks/cost.py                # and the growth with batch, prompt, width, depth, vocabulary

(a) peft and the transformers Trainer as a user would write it: the prompt in front of every record, batches of random
records, padded, logits everywhere. (b) a pruning step of ours: gates of all default kinds, LoRA, the constraint, and
nothing cut yet. Both train the same adapters in the same precision; they alternate in one process, block by block, on
the same records. Time includes the making of batches. Memory is what a block adds to the weights at most, plus the
weights, with the same allocator settings for both.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from compresso import PruneConfig
from compresso.adapters import add_lora, inside
from compresso.batches import batches
from compresso.cost import MemoryPeak, spread
from compresso.environment import versions
from compresso.lagrangian import Lagrangian, initial_log_alpha, make_schedule
from compresso.masks import Gates, Masks
from compresso.prepare import prepare
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.records import Record, similar_lengths
from compresso.shape import describe
from compresso.shrink import Shrinking
from compresso.train import fit
from compresso.training import Pruning, Training
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


def ours(bench: Workbench, removed: float | None = None) -> Block:
    """One block of pruning at its full rate: all gates sampled, the constraint acting.

    With `removed`, this share of the prunable parameters is cut out by the end of the fourth step.
    """
    config = bench.config if removed is None else replace(bench.config, target_sparsity=removed)

    def block(records: list[Record]) -> list[float]:
        steps = len(records) // config.batch_size
        shape = describe(bench.model)
        wrapped = add_lora(bench.model, config, config.seed)
        model = inside(wrapped)
        masks = Masks(shape, {unit: initial_log_alpha(unit, config.target_sparsity) for unit in config.gates})
        gates = Gates(model, shape)
        hold = config.hold if removed is None else 0.999
        schedule = make_schedule(1000, 0.0, hold, config.target_sparsity, config.schedule)
        shrinking = None if removed is None else Shrinking(model, gates, masks, config.target_sparsity, 1)
        lengths = bench.encoder.lengths
        groups = similar_lengths(iter(records), config.batch_size, steps, config.seed, lengths)  # as in `prune`
        pruning = Pruning(masks, gates, Lagrangian(schedule, masks), 0.05, shrinking)
        rows = fit(
            bench.accelerator,
            Training(model, config.seed, pruning),
            lambda sparsity: batches(next(groups), bench.encoder, bench.prompt),
            steps=steps,
            learning_rate=config.learning_rate,
            clip=config.clip,
        )
        with patch("compresso.train.EVERY", 3), patch("compresso.shrink.RARELY_OPEN", 1.0):
            seconds = [float(row["seconds"]) for row in rows]
        gates.remove()
        wrapped.unload()
        if shrinking:
            shrinking.restore()  # the shape; what was cut out stays lost
        return seconds

    return block


def alternate(blocks: dict[str, Block], bench: Workbench, steps: int, repeats: int) -> dict[str, dict]:
    """Seconds a step and peak memory of each, in turn; the first round warms up and is not counted."""
    records = [record for source in bench.sources for record in source.records]
    rng = random.Random(bench.config.seed)
    found: dict[str, dict[str, list]] = {name: {"seconds": [], "memory": [], "tokens": []} for name in blocks}
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    for repeat in range(repeats + 1):
        chosen = [rng.choice(records) for _ in range(steps * bench.config.batch_size)]
        tokens = sum(len(bench.encoder.encode(record, bench.prompt).ids) for record in chosen) / steps
        for name in sorted(blocks, reverse=bool(repeat % 2)):
            peak = MemoryPeak(bench.accelerator.device)
            took = blocks[name](list(chosen))
            if repeat:
                found[name]["seconds"].append(statistics.mean(took[-steps:]))
                found[name]["memory"].append(weights + (peak.added() or 0))
                found[name]["tokens"].append(tokens)
            print(f"{bench.prompt.name:7} {name:6} {statistics.mean(took):6.2f} s a step", flush=True)
    return {
        name: {
            "seconds_a_step": spread(rounds["seconds"]),
            "steps_per_second": spread([1 / s for s in rounds["seconds"]]),
            "tokens_per_second": spread([t / s for t, s in zip(rounds["tokens"], rounds["seconds"], strict=True)]),
            "peak_memory_bytes": spread(rounds["memory"]),
            "rounds": rounds,
        }
        for name, rounds in found.items()
    }


def ratios(measured: dict[str, dict], what: str) -> dict[str, float]:
    """Ours over plain, round by round."""
    pairs = zip(measured["plain"]["rounds"][what], measured["ours"]["rounds"][what], strict=True)
    return spread([b / a for a, b in pairs])


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here."""
    a = torch.randn(1536, 1536).to(dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 1536**3 / min(times)


def share_of_rate(bench: Workbench, measured: dict, rate: float) -> float:
    """Of the machine's matrix rate that our step reaches, by the products that it needs.

    Those are in the decoder layers for every token (the shared prompt once), and in the head for every label (about
    half of a record's tokens); forward and backward.
    """
    prompt = len(bench.tokenizer(bench.prompt.body)["input_ids"]) if bench.prompt.body else 0
    rows = statistics.median(measured["rounds"]["tokens"]) - prompt * bench.config.batch_size
    head = bench.model.config.vocab_size * bench.model.config.hidden_size
    operations = 4 * (bench.prunable * (rows + prompt) + head * rows / 2)
    return operations / (measured["seconds_a_step"]["median"] * rate)


def prompt_of_length(bench: Workbench, tokens: int) -> CollaborativePrompt:
    """A prompt of this many tokens, of the words of the long one."""
    words = bench.tokenizer(find_prompt("long", "chat").body)["input_ids"] * 4
    return CollaborativePrompt(
        str(tokens), bench.tokenizer.decode(words[:tokens]) if tokens else "", bench.prompt.format
    )


def widened(bench: Workbench, width: int = 1, depth: int = 1, vocabulary: int = 1) -> Workbench:
    """The same with a model of random weights, larger in one way."""
    config = copy.deepcopy(bench.model.config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, getattr(config, name) * width)
    config.num_hidden_layers *= depth
    config.vocab_size *= vocabulary
    config.layer_types = None
    model = AutoModelForCausalLM.from_config(config, dtype=bench.model.dtype)
    return replace(bench, model=model, config=replace(bench.config, max_length=64, batch_size=4))


def grow(bench: Workbench, folder: str) -> dict[str, list[dict]]:
    """Both, with one thing larger at a time: a step that warms up, then one that counts."""
    long = find_prompt("long", bench.prompt.format)
    axes: dict[str, list[tuple[int, Callable[[], Workbench]]]] = {
        "records a batch": [
            (n, lambda n=n: replace(bench, prompt=long, config=replace(bench.config, batch_size=n)))
            for n in (1, 2, 4, 8, 16, 32)
        ],
        "tokens of the prompt": [
            (n, lambda n=n: replace(bench, prompt=prompt_of_length(bench, n))) for n in (0, 128, 256, 512)
        ],
        "width": [(n, lambda n=n: widened(replace(bench, prompt=long), width=n)) for n in (1, 2, 4)],
        "depth": [(n, lambda n=n: widened(replace(bench, prompt=long), depth=n)) for n in (1, 2, 4)],
        "vocabulary": [(n, lambda n=n: widened(replace(bench, prompt=long), vocabulary=n)) for n in (1, 4)],
    }
    grown: dict[str, list[dict]] = {}
    for axis, points in axes.items():
        grown[axis] = []
        for value, make in points:
            larger = make()
            found = alternate({"plain": plain(larger, folder), "ours": ours(larger)}, larger, 1, 1)
            row: dict = {"value": value}
            for name in ("plain", "ours"):
                row[name] = {key: found[name][key]["median"] for key in ("seconds_a_step", "peak_memory_bytes")}
            row["ratio_time"] = ratios(found, "seconds")["median"]
            row["ratio_memory"] = ratios(found, "memory")["median"]
            grown[axis].append(row)
            print(axis, row, flush=True)
    return grown


def late(bench: Workbench) -> dict[str, dict]:
    """A step of ours after a share of the parameters was cut out, over the same without; the model is spoilt by it."""
    records = [record for source in bench.sources for record in source.records]
    found = {}
    for removed in (0.2, 0.5):
        each = []
        for seed in range(3):
            chosen = random.Random(seed).sample(records, 8 * bench.config.batch_size)
            whole, cut = (ours(bench, share)(list(chosen)) for share in (None, removed))
            each.append(sum(cut[4:]) / sum(whole[4:]))
            print(f"{removed} removed: {each[-1]:.3f} of the time; {whole}, {cut}", flush=True)
        found[str(removed)] = spread(each)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--late", action="store_true", help="only the late steps, into the results that are there")
    given = parser.parse_args()
    steps, repeats = (2, 2) if given.quick else (4, 5)
    result: dict = {"steps_a_block": steps, "repeats": repeats, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(PruneConfig(output=f"{folder}/run", validation_records=8, tune="lora", learning_rate=1e-3))
        if given.late:
            result = json.loads(RESULT.read_text()) | {"late_step_over_early": late(bench)}
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
            return
        rate = matrix_rate(bench.model.dtype)
        for prompt in ("long", "none"):
            bench.prompt = find_prompt(prompt, bench.prompt.format)
            result[prompt] = alternate({"plain": plain(bench, folder), "ours": ours(bench)}, bench, steps, repeats)
            rate = max(rate, matrix_rate(bench.model.dtype))
            result[prompt]["ours"]["share_of_matrix_rate"] = share_of_rate(bench, result[prompt]["ours"], rate)
        result["ratio_time_prompt"] = ratios(result["long"], "seconds")
        result["ratio_time_no_prompt"] = ratios(result["none"], "seconds")
        result["ratio_memory"] = ratios(result["long"], "memory")
        result["ratio_memory_no_prompt"] = ratios(result["none"], "memory")
        result["matrix_products_per_second"] = rate
        result["precision"] = str(bench.model.dtype)
        result["versions"] = versions()
        kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        result |= {key: kept[key] for key in ("growth", "late_step_over_early") if key in kept}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        if not given.quick:
            result["growth"] = grow(bench, folder)
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
            result["late_step_over_early"] = late(bench)
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("ratio_time_prompt", "ratio_time_no_prompt", "ratio_memory", "ratio_memory_no_prompt"):
        print(name, result[name])


if __name__ == "__main__":
    main()
