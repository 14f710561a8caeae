"""The checkpoint form of NVIDIA's pruned Llamas (DeciLM): widths of each layer in config.json under `block_configs`.

vLLM, TensorRT-LLM and SGLang have a native class for it and take only the config from here; with this file, which
travels with the checkpoint, transformers loads it too. All layers have the same number of query heads.
"""

import copy

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class Fields(dict):
    """A dictionary whose entries are attributes too, as the native classes read them."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __deepcopy__(self, memo):
        return Fields(copy.deepcopy(dict(self), memo))


def block(given):
    """One layer's entry, with attributes."""
    return Fields({name: Fields(part) if isinstance(part, dict) else part for name, part in given.items()})


@strict(accept_kwargs=True)
class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __post_init__(self, **kwargs):
        self.block_configs = [block(given) for given in kwargs.pop("block_configs", ())]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Any number of heads fits any hidden size when head_dim is given."""


class NoAttention(nn.Module):
    """A removed attention: adds nothing to the residual stream."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.new_zeros(()).expand_as(hidden_states), None


class NoMLP(nn.Module):
    """A removed feed-forward network."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(()).expand_as(hidden_states)


class Blocks:
    """Mixin before a stock model: builds each decoder layer from its block."""

    def __init__(self, config):
        super().__init__(config)
        biased_output = config.attention_bias
        layers = getattr(self, "model", self).layers
        for index, given in enumerate(config.block_configs):
            of_layer = copy.copy(config)
            of_layer.attention_bias = getattr(config, "qkv_bias", biased_output)
            if not given.attention.no_op:
                of_layer.num_key_value_heads = config.num_attention_heads // given.attention.n_heads_in_group
            if not given.ffn.no_op:
                of_layer.intermediate_size = given.ffn.intermediate_size
            layers[index] = layer = type(layers[index])(of_layer, index)
            if given.attention.no_op:
                layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
            else:
                layer.self_attn.config = config  # a copy would not see set_attn_implementation
                if of_layer.attention_bias and not biased_output:
                    layer.self_attn.o_proj.register_parameter("bias", None)
            if given.ffn.no_op:
                layer.mlp, layer.post_attention_layernorm = NoMLP(), nn.Identity()
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # transformers looks for this in the source of the class's own module


class DeciLMModel(Blocks, LlamaModel):
    config_class = DeciLMConfig


class DeciLMForCausalLM(Blocks, LlamaForCausalLM):
    config_class = DeciLMConfig


CLASSES = [(DeciLMConfig, DeciLMModel, DeciLMForCausalLM)]
