"""How far a step in bf16 is from the same step in float32, by the way that it attends.

python benchmarks/rounding.py            # about two minutes; writes benchmarks/results/rounding.json

SmolLM2-135M-Instruct with LoRA, six batches of the demo's records after the long prompt, gates open or sampled. For
each attention: the gradient's error over its norm, batch by batch, and that of the mean over the batches, in which an
error without a direction of its own would fade.
"""

import copy
import json
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso import PruneConfig
from compresso.adapters import add_lora, inside
from compresso.batches import Batch
from compresso.cpu_attention import products
from compresso.environment import versions
from compresso.masks import Gates, Masks
from compresso.prepare import prepare
from compresso.shape import describe
from compresso.train import target_loss

RESULT = Path(__file__).parent / "results" / "rounding.json"
OPEN = {"kv_group": 2.0, "intermediate": 1.4, "hidden": 6.0}  # log_alpha: about one channel in five closed in a draw


def adapted(model: PreTrainedModel, config: PruneConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with adapters that do something."""
    wrapped = add_lora(copy.deepcopy(model).to(dtype), config, config.seed)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.01 * torch.randn_like(parameter)
    return inside(wrapped).train()


def gradients(model: PreTrainedModel, batches: list[Batch], gating: bool, attention: AbstractContextManager) -> Tensor:
    """Of the adapters, a row for each batch."""
    shape = describe(model)
    masks, gates, noise = Masks(shape, OPEN), Gates(model, shape), torch.Generator().manual_seed(5)
    rows = []
    with attention:
        for batch in batches:
            model.zero_grad()
            if gating:
                gates.set(masks.sample(noise))
            (target_loss(model, batch) / batch.targets).backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    gates.remove()
    return torch.stack(rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(PruneConfig(output=f"{folder}/run", max_length=128, batch_size=4, precision="bf16"))
        next_batches = bench.batches(0)
        batches = [next_batches(0.0)[0] for _ in range(6)]
    exact = adapted(bench.model, bench.config, torch.float32)
    half = adapted(bench.model, bench.config, torch.bfloat16)
    result: dict = {"versions": versions()}
    for gating in (False, True):
        expected = gradients(exact, batches, gating, nullcontext())
        for name, attention in (("fused kernel", nullcontext()), ("products", products(half, cpu=True))):
            found = gradients(half, batches, gating, attention)
            errors = ((found - expected).norm(dim=1) / expected.norm(dim=1)).tolist()
            result[f"{name}, gates {'sampled' if gating else 'open'}"] = {
                "errors": errors,
                "median": statistics.median(errors),
                "of_the_mean": float((found.mean(0) - expected.mean(0)).norm() / expected.mean(0).norm()),
            }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
