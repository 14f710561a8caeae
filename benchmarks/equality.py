"""Largest logit difference between the gated, the extracted and the reloaded model, on a real model.

All five kinds of units are pruned at once, at random: once so that the widths stay equal (a stock
checkpoint), once so that every layer differs. In float32.

    python benchmarks/equality.py                       # writes benchmarks/results/equality.json
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from compresso import Plan, describe, extract, load
from compresso.masks import gated
from compresso.shape import ModelShape

RESULT = Path(__file__).parent / "results" / "equality.json"


def equal_widths(shape: ModelShape, generator: torch.Generator) -> Plan:
    """Every fifth layer goes whole; the others keep the same number of groups and channels, not the same ones."""

    def some(sizes: list[int], share: float) -> torch.Tensor:
        keep = [max(1, round(size * share)) for size in sizes]
        drawn = [torch.randperm(size, generator=generator) for size in sizes]
        return torch.cat([(order < n).double() for order, n in zip(drawn, keep, strict=True)])

    whole = torch.tensor([float(i % 5 != 4) for i in range(len(shape.layers))])
    return Plan(
        shape,
        {
            "kv_group": some(shape.sizes("kv_group"), 0.67),
            "intermediate": some(shape.sizes("intermediate"), 0.75),
            "hidden": some(shape.sizes("hidden"), 0.8),
            "attention": whole,
            "mlp": whole,
        },
    )


def unequal_widths(shape: ModelShape, generator: torch.Generator) -> Plan:
    """Units go independently, and kept gates are soft, so that folding is tested too."""
    gates = {}
    for unit, share in {"kv_group": 0.7, "intermediate": 0.75, "hidden": 0.8, "attention": 0.9, "mlp": 0.9}.items():
        size = sum(shape.sizes(unit))
        kept = (torch.rand(size, generator=generator) < share).double()
        soft = 0.5 + 0.5 * torch.rand(size, generator=generator)
        gates[unit] = kept if unit == "hidden" else kept * soft
    return Plan(shape, gates)


@torch.no_grad()
def measure(plan: Plan, model, ids: torch.Tensor) -> dict:
    with gated(model, plan.shape, plan.gates):
        expected = model(ids).logits
    smaller = extract(model, plan)
    actual = smaller(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        smaller.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        "model_type": smaller.config.model_type,
        "sparsity": plan.sparsity,
        "layers": smaller.config.num_hidden_layers,
        "largest_logit": float(expected.abs().max()),
        "gated_extracted": float((actual - expected).abs().max()),
        "extracted_reloaded": float((reloaded(ids).logits - actual).abs().max()),
    }


def main() -> None:
    logging.disable_progress_bar()
    model, tokenizer = load("demo", torch.float32)
    ids = tokenizer("The river bends twice before it reaches the old mill. " * 8, return_tensors="pt")["input_ids"]
    shape = describe(model)
    results = {}
    for name, plan_of in (("equal", equal_widths), ("unequal", unequal_widths)):
        runs = [measure(plan_of(shape, torch.Generator().manual_seed(seed)), model, ids) for seed in range(3)]
        results[name] = runs
        for run in runs:
            print(name, {key: f"{value:.2e}" if isinstance(value, float) else value for key, value in run.items()})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"torch": torch.__version__, "seeds": [0, 1, 2], **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
