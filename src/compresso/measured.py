"""What a run measures of a model: dense, cut and recovered."""

from typing import Any

from transformers import PreTrainedModel

from compresso.chat import TooLong, answer
from compresso.perplexity import mean_loss, perplexity, window_nats
from compresso.workbench import Workbench, status


def score(bench: Workbench, model: PreTrainedModel, sparsity: float) -> dict[str, Any]:
    """Loss on held-out records, perplexity on held-out text, one answer."""
    with status("measuring loss and perplexity"):
        try:
            answered = answer(model, bench.encoder, bench.prompt_at(sparsity), bench.config.sample)
        except TooLong as error:
            answered = f"({error})"
        return {
            "loss": mean_loss(model, bench.validation(sparsity)),
            "perplexity": perplexity(window_nats(model, bench.windows)),
            "answer": answered,
        }
