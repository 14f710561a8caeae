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
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
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


def sandwiched(layer):
    """Whether a norm follows each sub-layer (Gemma, OLMo 2)."""
    return hasattr(layer, "post_feedforward_layernorm")


def without(layer, *names):
    """Drop norms that a removed sub-layer leaves without work."""
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, nn.Identity())


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
                without(layer, "input_layernorm", "post_attention_layernorm" if sandwiched(layer) else "")
            else:
                layer.self_attn.config = config  # a copy would not see set_attn_implementation
            if "mlp" in skipped:
                layer.mlp = NoMLP()
                names = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
                without(layer, *(names if sandwiched(layer) else ["post_attention_layernorm"]))
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


@strict(accept_kwargs=True)
class Gemma2PerLayerConfig(Gemma2Config):
    model_type = "compresso_gemma2"

    def validate_architecture(self):
        """Any number of heads fits any hidden size when head_dim is given."""


class Gemma2PerLayerModel(PerLayer, Gemma2Model):
    config_class = Gemma2PerLayerConfig


class Gemma2PerLayerForCausalLM(PerLayer, Gemma2ForCausalLM):
    config_class = Gemma2PerLayerConfig


@strict(accept_kwargs=True)
class Gemma3TextPerLayerConfig(Gemma3TextConfig):
    model_type = "compresso_gemma3_text"

    def validate_architecture(self):
        """Any number of heads fits any hidden size when head_dim is given."""


class Gemma3TextPerLayerModel(PerLayer, Gemma3TextModel):
    config_class = Gemma3TextPerLayerConfig


class Gemma3TextPerLayerForCausalLM(PerLayer, Gemma3ForCausalLM):
    config_class = Gemma3TextPerLayerConfig


class GranitePerLayerConfig(GraniteConfig):
    model_type = "compresso_granite"


class GranitePerLayerModel(PerLayer, GraniteModel):
    config_class = GranitePerLayerConfig


class GranitePerLayerForCausalLM(PerLayer, GraniteForCausalLM):
    config_class = GranitePerLayerConfig


class Olmo2PerLayerConfig(Olmo2Config):
    model_type = "compresso_olmo2"


class Olmo2PerLayerModel(PerLayer, Olmo2Model):
    config_class = Olmo2PerLayerConfig


class Olmo2PerLayerForCausalLM(PerLayer, Olmo2ForCausalLM):
    config_class = Olmo2PerLayerConfig


class SmolLM3PerLayerConfig(SmolLM3Config):
    model_type = "compresso_smollm3"


class SmolLM3PerLayerModel(PerLayer, SmolLM3Model):
    config_class = SmolLM3PerLayerConfig


class SmolLM3PerLayerForCausalLM(PerLayer, SmolLM3ForCausalLM):
    config_class = SmolLM3PerLayerConfig


CLASSES = [
    (LlamaPerLayerConfig, LlamaPerLayerModel, LlamaPerLayerForCausalLM),
    (MistralPerLayerConfig, MistralPerLayerModel, MistralPerLayerForCausalLM),
    (Qwen2PerLayerConfig, Qwen2PerLayerModel, Qwen2PerLayerForCausalLM),
    (Qwen3PerLayerConfig, Qwen3PerLayerModel, Qwen3PerLayerForCausalLM),
    (Gemma2PerLayerConfig, Gemma2PerLayerModel, Gemma2PerLayerForCausalLM),
    (Gemma3TextPerLayerConfig, Gemma3TextPerLayerModel, Gemma3TextPerLayerForCausalLM),
    (GranitePerLayerConfig, GranitePerLayerModel, GranitePerLayerForCausalLM),
    (Olmo2PerLayerConfig, Olmo2PerLayerModel, Olmo2PerLayerForCausalLM),
    (SmolLM3PerLayerConfig, SmolLM3PerLayerModel, SmolLM3PerLayerForCausalLM),
]
