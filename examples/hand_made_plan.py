"""Cut a model by a plan of your own: every layer keeps its first FFN channels, the last layer goes whole.

python examples/hand_made_plan.py CHECKPOINT FOLDER
"""

import sys

import torch

from compresso import Plan, describe, extract, load


def main(checkpoint: str, folder: str) -> None:
    model, tokenizer = load(checkpoint)
    shape = describe(model)
    keep = [layer.intermediate_size * 3 // 4 for layer in shape.layers]
    channels = [
        (torch.arange(layer.intermediate_size) < kept).double() for layer, kept in zip(shape.layers, keep, strict=True)
    ]
    whole = torch.ones(len(shape.layers))
    whole[-1] = 0
    plan = Plan(shape, {"intermediate": torch.cat(channels), "attention": whole, "mlp": whole})
    smaller = extract(model, plan)
    smaller.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"{100 * plan.sparsity:.1f}% of the prunable parameters removed; {smaller.num_parameters():,} parameters left"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
