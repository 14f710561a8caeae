"""Stock transformers models whose decoder layers may differ in width or lack a sub-layer.

This file travels with every checkpoint that needs it, unchanged, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where
compresso is not installed. The widths are in config.json under `per_layer_config`, the
schema of transformers 5: only what differs from the global value is listed, and
`"skip": ["attention"]` or `["mlp"]` names a sub-layer that was removed.

All computation is the stock class's; only the construction of the layers is here.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


class NoAttention(nn.Module):
    """A removed attention: adds nothing to the residual stream.

    It still tells the cache how many tokens went by, with one number a token, because
    transformers reads positions and masks off the cache's first layer.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, cache=None, **kwargs):
        cache = past_key_values if cache is None else cache  # renamed in transformers 5.24
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            count = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(count, count, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """A removed feed-forward network: adds nothing to the residual stream."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class PerLayer:
    """Mixin before a stock model: builds each decoder layer from the config of that layer."""

    def __init__(self, config):
        layer_configs = list(config.per_layer_config)
        overrides = config.to_dict().get("per_layer_config", {})
        config.per_layer_config = None
        super().__init__(config)  # layers of the global widths, replaced below
        config.per_layer_config = overrides
        layers = getattr(self, "model", self).layers
        for index, layer_config in enumerate(layer_configs):
            layers[index] = layer = type(layers[index])(layer_config, index)
            skipped = getattr(layer_config, "skip", ())
            if "attention" in skipped:
                layer.self_attn = NoAttention(index)
                layer.input_layernorm = nn.Identity()
            else:
                layer.self_attn.config = config  # a copy would not see set_attn_implementation
            if "mlp" in skipped:
                layer.mlp = NoMLP()
                layer.post_attention_layernorm = nn.Identity()
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # transformers looks for this in the source of the class's own module


@strict(accept_kwargs=True)
class LlamaPerLayerConfig(LlamaConfig):
    model_type = "compresso_llama"

    def validate_architecture(self):
        """Any number of heads fits any hidden size when head_dim is given."""


class LlamaPerLayerModel(PerLayer, LlamaModel):
    config_class = LlamaPerLayerConfig


class LlamaPerLayerForCausalLM(PerLayer, LlamaForCausalLM):
    config_class = LlamaPerLayerConfig


class MistralPerLayerConfig(MistralConfig):
    model_type = "compresso_mistral"


class MistralPerLayerModel(PerLayer, MistralModel):
    config_class = MistralPerLayerConfig


class MistralPerLayerForCausalLM(PerLayer, MistralForCausalLM):
    config_class = MistralPerLayerConfig


class Qwen2PerLayerConfig(Qwen2Config):
    model_type = "compresso_qwen2"


class Qwen2PerLayerModel(PerLayer, Qwen2Model):
    config_class = Qwen2PerLayerConfig


class Qwen2PerLayerForCausalLM(PerLayer, Qwen2ForCausalLM):
    config_class = Qwen2PerLayerConfig


class Qwen3PerLayerConfig(Qwen3Config):
    model_type = "compresso_qwen3"


class Qwen3PerLayerModel(PerLayer, Qwen3Model):
    config_class = Qwen3PerLayerConfig


class Qwen3PerLayerForCausalLM(PerLayer, Qwen3ForCausalLM):
    config_class = Qwen3PerLayerConfig


CLASSES = [
    (LlamaPerLayerConfig, LlamaPerLayerModel, LlamaPerLayerForCausalLM),
    (MistralPerLayerConfig, MistralPerLayerModel, MistralPerLayerForCausalLM),
    (Qwen2PerLayerConfig, Qwen2PerLayerModel, Qwen2PerLayerForCausalLM),
    (Qwen3PerLayerConfig, Qwen3PerLayerModel, Qwen3PerLayerForCausalLM),
]
