"""What `compresso estimate` says of a training step's memory against what the step takes, on random weights.

python benchmarks/estimate.py            # SmolLM2-135M's shape and one of 1 B; writes benchmarks/results/estimate.json

The step is the real one: every record at its full length, bf16 weights. Measured: the growth of resident memory over
the weights at most, plus the weights. A process of its own for each shape. The share of gaps between blocks was taken
from the first and the last shape; the one between them checks it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from compresso.adapters import add_lora, inside
from compresso.batches import Batch, before_targets
from compresso.config import PruneConfig
from compresso.cost import MemoryPeak
from compresso.cpu_attention import products
from compresso.environment import versions
from compresso.estimate import gaps
from compresso.masks import Gates
from compresso.memory import training_memory
from compresso.shape import describe
from compresso.train import target_loss

RESULT = Path(__file__).parent / "results" / "estimate.json"
PROMPT, STEPS = 200, 3
CONFIG = PruneConfig(max_length=128, tune="lora")
SHAPES = {
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "0.4B": {
        "vocab_size": 128256,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "1B": {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 20,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}


def measure(architecture: LlamaConfig) -> dict[str, int]:
    """Bytes at the peak of real steps, the optimizer's included."""
    from transformers import AutoModelForCausalLM

    model = inside(add_lora(AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16), CONFIG, 0)).train()
    shape = describe(model)
    gates = Gates(model, shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(0, 1000, (CONFIG.batch_size, CONFIG.max_length))
    batch = Batch(torch.randint(0, 1000, (PROMPT,)), ids, ids, (ids.shape[1],) * len(ids), before_targets(ids))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = MemoryPeak(torch.device("cpu"))
    optimizer = torch.optim.AdamW(trained)
    for _ in range(STEPS):
        gates.set({unit: torch.rand(sum(shape.sizes(unit)), requires_grad=True) * 1 for unit in CONFIG.gates})
        with products(model, cpu=True):
            (target_loss(model, batch) / batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": sum(p.numel() for p in model.parameters()), "measured": weights + (memory.added() or 0)}


def predict(architecture: LlamaConfig, parameters: int) -> int:
    parts = training_memory(architecture, torch.bfloat16, CONFIG, PROMPT, cpu=True)
    whole = 2 * (parameters - parts.pop("adapter parameters"))
    return whole + sum(parts.values()) + gaps(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(LlamaConfig(**SHAPES[given.only]))))
        return
    rows = []
    for name, settings in SHAPES.items():
        done = subprocess.run([sys.executable, __file__, "--only", name], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        said = predict(LlamaConfig(**settings), found["parameters"])
        rows.append({"shape": name, **found, "estimated": said, "ratio": said / found["measured"]})
        print("{shape}: estimated {estimated:,}, measured {measured:,}: {ratio:.3f}".format(**rows[-1]))
    RESULT.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
