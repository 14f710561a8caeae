"""What the loss gains when a unit goes, as far as gradients of its gate tell: on records, and on the model's own texts.

Records show what they ask for and little of what else a model knows. Texts that it writes itself cost no data and show
the rest: LOG.md, 2026-11-26.
"""

import torch
from accelerate.utils import broadcast
from torch import Tensor

from compresso.batches import IGNORE, Batch, Example, collate
from compresso.calibration import calibration_batches, gate_gradients
from compresso.self_data import own_length, write_texts
from compresso.shape import ModelShape, describe
from compresso.train import operations
from compresso.workbench import Workbench

ROWS = 8  # texts that are taken together, until memory runs out
LEAST = 1e-4  # of the mean: no unit is worth nothing because one of the two kinds of texts never asks for it


def fisher(bench: Workbench) -> dict[str, Tensor]:
    """Fisher information of the gates of groups, channels and experts, for each parameter that goes with one.

    Flat tensors by kind of unit, layer after layer: the mean square over records of the loss's gradient (Kwon et al.
    2022, arXiv 2204.09656, section 4.1). The collaborative prompt is left out, which every record would take through
    the model anew. With `own_texts` the geometric mean of that and the same of texts that the model writes; not for a
    model in parts, which writes none.
    """
    config, shape = bench.config, describe(bench.model)
    found = _of(bench, shape, calibration_batches(bench, backward=True, alone=True))
    if not config.own_texts or bench.place:
        return found
    own = _of(bench, shape, _own_texts(bench))
    return {unit: (_floored(found, unit) * _floored(own, unit)).sqrt() for unit in found}


def _of(bench: Workbench, shape: ModelShape, given: list[Batch]) -> dict[str, Tensor]:
    _, squares = gate_gradients(bench.model, given, bench.config.gradient_checkpointing)
    return {
        unit: value / torch.tensor(shape.price(unit)).repeat_interleave(torch.tensor(shape.sizes(unit)))
        for unit, value in squares.items()
    }


def _floored(values: dict[str, Tensor], unit: str) -> Tensor:
    """Values of a kind of unit, none of them below a small part of the mean of all kinds."""
    mean = torch.cat([*values.values()]).mean()
    return values[unit].clamp(min=float(LEAST * mean))


def _own_texts(bench: Workbench) -> list[Batch]:
    """Batches of texts that the dense model writes, the same in all processes; the account is charged for them."""
    config, model = bench.config, bench.model
    context = bench.encoder.context
    ids = broadcast(write_texts(model, bench.encoder, config.own_texts, own_length(bench.encoder), config.seed))
    tokens = ids.numel() * bench.accelerator.num_processes  # each writes them by one pass, and takes three to learn
    bench.spend("calibration", operations(model, tokens, 4))
    examples = [Example(row, [IGNORE, *row[1:]]) for row in ids.tolist()]
    rows = max(1, ROWS // bench.progress.accumulation)
    return [collate(examples[i : i + rows], context).to(ids.device) for i in range(0, len(examples), rows)]
