"""What is cut or saved, compared with what it came from before anything is built on it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compresso import checkpoint
from compresso.adapters import factors
from compresso.extract import extract
from compresso.launch import load_parts
from compresso.masks import gated
from compresso.mixtures import sort_channels
from compresso.plan import Plan
from compresso.shape import count_prunable, prunable_parameters
from compresso.streamed import write_cut
from compresso.workbench import Workbench, status

RELATIVE_TOLERANCE = 1e-3  # of the largest logit, in float32; rounding stays below it, a wrong fold is far above
HALF_TOLERANCE = 0.1  # the same where only a model in half precision fits


@torch.no_grad()
def extract_checked(bench: Workbench, model: PreTrainedModel, plan: Plan) -> tuple[PreTrainedModel, float]:
    """Extract in float32; raise RuntimeError unless it computes what the gated model computed."""
    ids = bench.windows[:1, :128].to(model.device)
    with status("extracting the smaller model, and comparing it with the gated one"):
        with gated(model, plan.shape, plan.gates):
            expected = model(ids).logits
        smaller = extract(model, plan)
        difference = _difference(smaller(ids).logits, expected, "the extracted model", "the gated model")
    by_formula = int(prunable_parameters(plan.shape, {u: (g > 0).double() for u, g in plan.gates.items()}))
    if by_formula != count_prunable(smaller):
        raise RuntimeError(
            f"the extracted model has {count_prunable(smaller)} prunable parameters, the plan {by_formula}"
        )
    return smaller, difference


@torch.no_grad()
def save_checked(bench: Workbench, model: PreTrainedModel, folder: Path, summary: dict[str, Any]) -> None:
    """Save in the dtype of the original, reload as a stranger would, compare logits; one process does it for all.

    All of them go on from what is saved, as a run does that is resumed. Raises RuntimeError if what loads computes
    something else.
    """
    working = model.dtype
    sort_channels(checkpoint.cast(model, bench.facts["stored_dtype"]))  # as every mixture that is loaded
    if bench.writes:
        _save_and_compare(bench, model, folder, summary)
    checkpoint.cast(model, working)
    bench.accelerator.wait_for_everyone()


def _save_and_compare(bench: Workbench, model: PreTrainedModel, folder: Path, summary: dict[str, Any]) -> None:
    with status(f"saving {folder}, and comparing what loads with what was saved"):
        prompt = bench.prompt_at(summary["sparsity"])
        card = checkpoint.model_card(model, bench.config.model, prompt, _card_facts(summary))
        checkpoint.save(model, bench.tokenizer, prompt, folder, card)
        ids = bench.windows[:1, :128].to(model.device)
        checkpoint.cast(model, torch.float32)
        expected = model(ids).logits
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        actual = reloaded.to(model.device).eval()(ids).logits
        difference = _difference(actual, expected, f"the model reloaded from {folder}", "the model saved there")
        note_difference(summary, folder, difference)


def note_difference(summary: dict[str, Any], folder: Path, difference: float) -> None:
    """Enter into the summary how far what loads from a folder is from what was saved there, in logits."""
    summary["logit_differences"][f"{folder.name}_reloaded"] = difference
    summary["max_logit_difference"] = max(summary["logit_differences"].values())


def _difference(actual: torch.Tensor, expected: torch.Tensor, what: str, other: str) -> float:
    """Largest logit difference. Raises RuntimeError above the tolerance."""
    difference = float((actual - expected).abs().max())
    relative = RELATIVE_TOLERANCE if expected.dtype == torch.float32 else HALF_TOLERANCE
    tolerance = relative * max(1.0, float(expected.abs().max()))
    if not difference <= tolerance:
        raise RuntimeError(
            f"{what} differs from {other} by {difference:.2e} in a logit, more than {tolerance:.2e}. This is a bug of "
            "compresso, please report it with the run's config.yaml and plan.json; do not use the model"
        )
    return difference


@torch.no_grad()
def cut_files(
    bench: Workbench, model: PreTrainedModel, plan: Plan | None, sparsity: float, folder: Path
) -> tuple[PreTrainedModel, float]:
    """Write the smaller model from the files of `bench.place`, adapters merged; load it, compare, and go on from it.

    One process writes, tensor after tensor; none holds a whole model. Without a plan nothing is cut. Raises
    RuntimeError if what loads computes something else.
    """
    place = bench.place
    assert place is not None
    ids = bench.windows[:1, :128].to(model.device)
    gates = gated(model, plan.shape, plan.gates) if plan else nullcontext()
    with status(f"writing {folder} from {place}, and comparing what loads with the model in training"):
        with gates:
            expected = model(ids).logits
        if bench.writes:
            write_cut(place, plan, folder, bench.prompt_at(sparsity), bench.config.model, factors(model))
        bench.accelerator.wait_for_everyone()
        smaller, _ = load_parts(bench.config, folder, bench.accelerator)
        if bench.config.precision == "4bit":  # rounded anew, which no tolerance can tell from a mistake
            difference = float((smaller(ids).logits - expected).abs().max())
        else:
            difference = _difference(smaller(ids).logits, expected, f"the model in {folder}", "the one in training")
    bench.place = folder
    return smaller, difference


def _card_facts(summary: dict[str, Any]) -> dict[str, str]:
    before, after = summary["parameters"]["before"], summary["parameters"]["after"]
    tokens = (summary.get("vocabulary") or {}).get("tokens")
    return {
        "base model": str(summary["model"]),
        "parameters": f"{before:,} before, {after:,} after",
        "sparsity": f"{100 * summary['sparsity']:.2f} % of the decoder layers' matrices removed",
        "units": ", ".join(summary["units"]),
        **({"vocabulary": f"{tokens['after']:,} of {tokens['before']:,} tokens"} if tokens else {}),
        "method": summary["method"],
    }
