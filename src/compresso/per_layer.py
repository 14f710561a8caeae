"""Stock transformers models whose decoder layers may differ in width or lack a sub-layer.

This file travels with every checkpoint that needs it, unchanged, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where
compresso is not installed. The widths are in config.json under `per_layer_config`, the
schema of transformers 5: only what differs from the global value is listed, and
`"skip": ["attention"]` or `["mlp"]` names a sub-layer that was removed.

All computation is the stock class's; only the construction of the layers is here.
"""

import copy

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    ArceeModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.opt.modeling_opt import OPTAttention


class NoAttention(nn.Module):
    """A removed attention: adds nothing to the residual stream.

    It still tells the cache how many tokens went by, with one number a token, because
    transformers reads positions and masks off the cache's first layer.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, cache=None, layer_past=None, **kwargs):
        cache = next((given for given in (cache, past_key_values, layer_past) if given is not None), None)
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            count = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(count, count, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """A removed feed-forward network: adds nothing to the residual stream."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class OwnHeadDim:
    """Mixin before a stock attention that divides the hidden size by the number of heads: its heads have head_dim."""

    output = "out_proj"

    def __init__(self, config, layer_idx):
        inner = copy.copy(config)
        inner.hidden_size = config.num_attention_heads * config.head_dim
        super().__init__(inner, layer_idx)
        for name, matrix in list(self.named_children()):
            wide = matrix.in_features if name == self.output else config.hidden_size
            out = config.hidden_size if name == self.output else matrix.out_features
            setattr(self, name, nn.Linear(wide, out, bias=matrix.bias is not None))


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

    attention_class: type[OwnHeadDim] | None = None
    """An OwnHeadDim, for stock models whose attention has none."""

    def __init__(self, config):
        layer_configs = list(config.per_layer_config)
        overrides = config.to_dict().get("per_layer_config", {})
        config.per_layer_config = None
        heads = config.num_attention_heads
        if self.attention_class:
            config.num_attention_heads = 1  # which divides any hidden size
        super().__init__(config)  # layers of the global widths, replaced below
        config.num_attention_heads = heads
        config.per_layer_config = overrides
        layers = next(part.layers for part in self.modules() if hasattr(part, "layers"))
        for index, layer_config in enumerate(layer_configs):
            given = copy.copy(layer_config)
            if self.attention_class:
                given.num_attention_heads = 1
            layers[index] = layer = type(layers[index])(given, index)
            attention = "self_attn" if hasattr(layer, "self_attn") else "attention"
            skipped = getattr(layer_config, "skip", ())
            if "attention" in skipped:
                setattr(layer, attention, NoAttention(index))
                without(layer, "input_layernorm", "self_attn_layer_norm")
                without(layer, "post_attention_layernorm" if sandwiched(layer) else "")
            else:
                if self.attention_class:
                    setattr(layer, attention, self.attention_class(layer_config, index))
                getattr(layer, attention).config = config  # a copy would not see set_attn_implementation
            if "mlp" in skipped:
                if hasattr(layer, "mlp"):
                    layer.mlp = NoMLP()
                else:  # OPT, whose layers hold the matrices themselves
                    layer.fc1, layer.fc2 = nn.Identity(), NoMLP()
                names = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
                without(layer, *(names if sandwiched(layer) else ["post_attention_layernorm", "final_layer_norm"]))
            for part in layer.modules():
                if hasattr(part, "num_experts") and hasattr(part, "config"):
                    part.config = config  # nor set_experts_implementation
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # transformers looks for this in the source of the class's own module

    @classmethod
    def _can_set_experts_implementation(cls):
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return stock._can_set_experts_implementation()


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
class ArceePerLayerConfig(ArceeConfig):
    model_type = "compresso_arcee"

    def validate_architecture(self):
        """Any number of heads fits any hidden size when head_dim is given."""


class ArceePerLayerModel(PerLayer, ArceeModel):
    config_class = ArceePerLayerConfig


class ArceePerLayerForCausalLM(PerLayer, ArceeForCausalLM):
    config_class = ArceePerLayerConfig


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


@strict(accept_kwargs=True)
class GPTNeoXPerLayerConfig(GPTNeoXConfig):
    model_type = "compresso_gpt_neox"

    def validate_architecture(self):
        """Any number of heads fits any hidden size when head_dim is given."""


class GPTNeoXPerLayerAttention(OwnHeadDim, GPTNeoXAttention):
    output = "dense"


class GPTNeoXPerLayerModel(PerLayer, GPTNeoXModel):
    config_class = GPTNeoXPerLayerConfig
    attention_class = GPTNeoXPerLayerAttention


class GPTNeoXPerLayerForCausalLM(PerLayer, GPTNeoXForCausalLM):
    config_class = GPTNeoXPerLayerConfig
    attention_class = GPTNeoXPerLayerAttention


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


class OPTPerLayerConfig(OPTConfig):
    model_type = "compresso_opt"


class OPTPerLayerAttention(OwnHeadDim, OPTAttention):
    pass


class OPTPerLayerModel(PerLayer, OPTModel):
    config_class = OPTPerLayerConfig
    attention_class = OPTPerLayerAttention


class OPTPerLayerForCausalLM(PerLayer, OPTForCausalLM):
    config_class = OPTPerLayerConfig
    attention_class = OPTPerLayerAttention


class MixtralPerLayerConfig(MixtralConfig):
    model_type = "compresso_mixtral"


class MixtralPerLayerModel(PerLayer, MixtralModel):
    config_class = MixtralPerLayerConfig


class MixtralPerLayerForCausalLM(PerLayer, MixtralForCausalLM):
    config_class = MixtralPerLayerConfig


class Qwen3MoePerLayerConfig(Qwen3MoeConfig):
    model_type = "compresso_qwen3_moe"


class Qwen3MoePerLayerModel(PerLayer, Qwen3MoeModel):
    config_class = Qwen3MoePerLayerConfig


class Qwen3MoePerLayerForCausalLM(PerLayer, Qwen3MoeForCausalLM):
    config_class = Qwen3MoePerLayerConfig


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
    (ArceePerLayerConfig, ArceePerLayerModel, ArceePerLayerForCausalLM),
    (Gemma2PerLayerConfig, Gemma2PerLayerModel, Gemma2PerLayerForCausalLM),
    (Gemma3TextPerLayerConfig, Gemma3TextPerLayerModel, Gemma3TextPerLayerForCausalLM),
    (GPTNeoXPerLayerConfig, GPTNeoXPerLayerModel, GPTNeoXPerLayerForCausalLM),
    (MixtralPerLayerConfig, MixtralPerLayerModel, MixtralPerLayerForCausalLM),
    (Qwen3MoePerLayerConfig, Qwen3MoePerLayerModel, Qwen3MoePerLayerForCausalLM),
    (GranitePerLayerConfig, GranitePerLayerModel, GranitePerLayerForCausalLM),
    (Olmo2PerLayerConfig, Olmo2PerLayerModel, Olmo2PerLayerForCausalLM),
    (OPTPerLayerConfig, OPTPerLayerModel, OPTPerLayerForCausalLM),
    (SmolLM3PerLayerConfig, SmolLM3PerLayerModel, SmolLM3PerLayerForCausalLM),
]
