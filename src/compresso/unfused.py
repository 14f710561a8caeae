"""Phi-3 as the Mistral that computes the same: its fused matrices taken apart.

The result of pruning is then a Mistral, which more runtimes know than a Phi-3.
"""

from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor
from transformers import MistralConfig, PreTrainedConfig, PreTrainedModel


def taken_apart(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of what a model is turned into when it is loaded: its own, or of a Phi-3 that of the Mistral.

    Raises ValueError if a Phi-3 rotates only a part of each head (Phi-4-mini), which Mistral cannot.
    """
    if config.model_type not in UNFUSED:
        return config
    part = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if part != 1:
        raise ValueError(f"this phi3 rotates only {part:g} of each head, and no family that can be pruned does that")
    known = MistralConfig().to_dict()
    settings = {key: value for key, value in config.to_dict().items() if key in known and key != "model_type"}
    settings["head_dim"] = config.hidden_size // config.num_attention_heads
    settings["rope_parameters"] = {
        key: value for key, value in config.rope_parameters.items() if key != "partial_rotary_factor"
    }
    if settings["rope_parameters"]["rope_type"] != "default":
        settings["rope_parameters"]["original_max_position_embeddings"] = config.original_max_position_embeddings
    return MistralConfig(**settings)


def phi3(model: PreTrainedModel) -> PreTrainedModel:
    """A new Mistral with the weights of a Phi-3, in the same dtype. Raises as `taken_apart`."""
    config = taken_apart(model.config)
    groups = config.num_key_value_heads * config.head_dim
    sizes = {
        "self_attn.qkv_proj": [config.num_attention_heads * config.head_dim, groups, groups],
        "mlp.gate_up_proj": [config.intermediate_size] * 2,
    }
    names = {
        "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    }

    def apart() -> Iterator[tuple[str, Tensor]]:
        for name, weight in model.state_dict().items():
            fused = next((path for path in sizes if f".{path}." in name), None)
            if fused is None:
                yield name, weight
                continue
            for path, rows in zip(names[fused], weight.split(sizes[fused]), strict=True):
                yield name.replace(fused, path), rows.clone()

    with torch.no_grad():
        unfused = transformers.MistralForCausalLM.from_pretrained(
            None, config=config, state_dict=dict(apart()), dtype=model.dtype
        )
    unfused.generation_config = model.generation_config
    return unfused.eval()


UNFUSED: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {"phi3": phi3}
"""What a model_type is turned into when it is loaded."""
