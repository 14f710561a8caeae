"""Where each weight lives in one model_type. A family is data: no code here or elsewhere asks for a name.

Paths are attribute paths: the first group from the causal language model, the
second from one decoder layer.
"""

from dataclasses import dataclass, replace

PER_LAYER_PREFIX = "compresso_"
"""model_type of a family's class with different widths per layer: this, then the family."""


@dataclass(frozen=True)
class Family:
    """One architecture, as paths and facts that extraction needs."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    """RMSNorms over the hidden channels that belong to the attention, before or after it."""

    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Matrices whose rows are the FFN channels."""
    mlp_output: str = "mlp.down_proj"
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    query_key_norms: bool = False
    """Queries and keys pass an RMSNorm over head_dim that shares rms_norm_eps with the others."""
    norm_offset: float = 0.0
    """What an RMSNorm adds to its weight before it multiplies."""
    scaled_embedding: bool = False
    """What the embedding gives is multiplied by the root of the hidden size."""
    config_lists: tuple[str, ...] = ("layer_types",)
    """Entries of the config that have one value for each layer."""
    fixed: tuple[str, ...] = ()
    """Units that no smaller model can lack exactly."""

    gguf: str | None = None
    """llama.cpp's architecture for equal widths, where it can be written."""
    gguf_per_layer: str | None = None
    """llama.cpp's architecture whose layers may differ in width; `deci` computes what Llama does, biases included."""

    stand_in: str | None = None
    """model_type that computes the same and is written where this one's config refuses the
    widths (transformers 5: LlamaConfig wants hidden_size % num_attention_heads == 0)."""


_SANDWICHED = Family(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scaled_embedding=True,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(stand_in="mistral", gguf="llama", gguf_per_layer="deci"),
    "mistral": Family(gguf="llama", gguf_per_layer="deci"),
    "qwen2": Family(gguf="qwen2", gguf_per_layer="deci"),
    "qwen3": Family(query_key_norms=True, gguf="qwen3", gguf_per_layer="openelm"),
    "smollm3": Family(config_lists=("layer_types", "no_rope_layers"), gguf="smollm3"),
    "granite": Family(gguf="granite"),
    "gemma2": replace(_SANDWICHED, gguf="gemma2"),
    "gemma3_text": replace(_SANDWICHED, query_key_norms=True, gguf="gemma3"),
    "olmo2": Family(  # its query and key norms are over all heads together
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
        query_key_norms=True,
        fixed=("kv_group",),
        gguf="olmo2",
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`, with equal or unequal widths.

    Raises ValueError, with the supported ones, for any other model_type.
    """
    try:
        return FAMILIES[model_type.removeprefix(PER_LAYER_PREFIX)]
    except KeyError:
        supported = ", ".join(FAMILIES)
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are: {supported}. "
            "docs/add-a-family.md tells how to describe another one."
        ) from None
