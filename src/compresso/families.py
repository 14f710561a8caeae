"""Where each weight lives in one model_type. A family is data: no code here or elsewhere asks for a name.

Paths are attribute paths: the first group from the causal language model, the
second from one decoder layer.
"""

from dataclasses import dataclass, replace
from typing import Any

PER_LAYER_PREFIX = "compresso_"
"""model_type of a family's class with different widths per layer: this, then the family."""
UNITS = ("kv_group", "intermediate", "hidden", "attention", "mlp", "expert")
"""kv_group: a key/value head with its query heads. intermediate: an FFN channel; of a mixture, the same one of every
expert of a layer. hidden: a channel of the residual stream. attention, mlp: a whole sub-layer. expert: one of a
mixture."""


@dataclass(frozen=True)
class Family:
    """One architecture, as paths and facts that extraction needs."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    """Learned positions, added to what the embedding gives."""
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_key_value: str | None = None
    """One matrix in place of these three: for each group the rows of its queries, its key and its value."""
    attention_output: str = "self_attn.o_proj"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    """Norms over the hidden channels that belong to the attention, before or after it."""
    num_heads: str | None = None
    """Attribute of a layer that counts query heads, where the attention's code reads one."""

    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Matrices whose rows are the FFN channels."""
    mlp_output: str = "mlp.down_proj"
    router: str | None = None
    """What chooses the experts of a mixture. They lie stacked in one module, whose parameters are `mlp_inputs`, only
    one (E, 2 I, H) with the rows of the gate before those of up, and `mlp_output` (E, H, I)."""
    num_experts: str | None = None
    """The config's name for how many there are."""
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    query_key_norms: bool = False
    """Queries and keys pass an RMSNorm over head_dim that shares rms_norm_eps with the others."""
    norm_offset: float = 0.0
    """What an RMSNorm adds to its weight before it multiplies."""
    scaled_embedding: bool = False
    """What the embedding gives is multiplied by the root of the hidden size."""
    config_lists: tuple[str, ...] = ("layer_types",)
    """Entries of the config that have one value for each layer."""
    num_key_value_heads: str | None = "num_key_value_heads"
    """The config's name for the number of groups; None where every query head is one."""
    intermediate_size: str = "intermediate_size"
    """The config's name for the FFN width."""
    norm_eps: str | None = "rms_norm_eps"
    """The config's name for what grows with each hidden channel that goes; None where none goes."""
    derived_head_dim: bool = False
    """The stock class has no head_dim but divides the hidden size by the number of heads: it takes all of them only."""
    needs: tuple[tuple[str, Any], ...] = ()
    """Entries of the config, and the value of each that can be pruned; a string names an entry that it equals."""
    stored_names: tuple[tuple[str, str], ...] = ()
    """Parts of names in the stock class, and what they are called in its files."""
    stored_experts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Stacks, and what the stock class's files call the matrices of expert {} in each, one below the other."""
    fixed: tuple[str, ...] = ()
    """Units that no smaller model can lack exactly. A LayerNorm's mean and variance are of all hidden channels, and no
    other weights make up for those that are not there: `hidden`."""

    gguf: str | None = None
    """llama.cpp's architecture for equal widths, where it can be written."""
    gguf_per_layer: str | None = None
    """llama.cpp's architecture whose layers may differ in width; `deci` computes what Llama does, biases included."""

    stand_in: str | None = None
    """model_type that computes the same and is written where this one's config refuses the
    widths (transformers 5: LlamaConfig wants hidden_size % num_attention_heads == 0)."""
    native: tuple[str, ...] = ("vLLM", "SGLang", "TensorRT-LLM", "MLX")
    """Runtimes that have a class of their own for it."""

    @property
    def units(self) -> tuple[str, ...]:
        """Kinds of units that a smaller model can lack exactly."""
        return tuple(u for u in UNITS if u not in self.fixed and (u != "expert" or self.router))

    @property
    def experts(self) -> str:
        """The module of a mixture that holds its experts."""
        return self.mlp_output.rpartition(".")[0]

    @property
    def mlp_matrices(self) -> int:
        """Of an FFN, or of an expert."""
        return 3 if self.router else len(self.mlp_inputs) + 1

    @property
    def multiple(self) -> int:
        """What kept FFN widths and hidden sizes are multiples of. transformers multiplies all experts in one call,
        where rows must begin at multiples of 16 bytes: eight numbers in half precision."""
        return 8 if self.router else 1

    def weight(self, path: str) -> str:
        """The parameter that is the matrix at a path."""
        stacked = self.router and path in (*self.mlp_inputs, self.mlp_output)
        return path if stacked else f"{path}.weight"

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """Matrices whose rows groups own."""
        return (self.query_key_value,) if self.query_key_value else (self.query, self.key, self.value)

    def in_config(self, widths: dict[str, int]) -> dict[str, int]:
        """Widths of a layer (`LayerShape.widths`) by the names of the config."""
        names = {
            "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.intermediate_size,
            "num_experts": self.num_experts,
        }
        return {name: width for key, width in widths.items() if (name := names.get(key, key))}


_SANDWICHED = Family(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scaled_embedding=True,
)
_MIXTURE = Family(
    mlp_inputs=("mlp.experts.gate_up_proj",),
    mlp_output="mlp.experts.down_proj",
    router="mlp.gate",
    num_experts="num_experts",
    stored_experts=(
        ("mlp.experts.gate_up_proj", ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")),
        ("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",)),
    ),
)
FAMILIES: dict[str, Family] = {
    "llama": Family(stand_in="mistral", gguf="llama", gguf_per_layer="deci"),
    "mistral": Family(gguf="llama", gguf_per_layer="deci"),
    "qwen2": Family(gguf="qwen2", gguf_per_layer="deci"),
    "qwen3": Family(query_key_norms=True, gguf="qwen3", gguf_per_layer="openelm"),
    "smollm3": Family(config_lists=("layer_types", "no_rope_layers"), gguf="smollm3"),
    "granite": Family(gguf="granite"),
    "arcee": Family(mlp_inputs=("mlp.up_proj",), gguf="arcee", native=("vLLM", "SGLang")),
    "gemma2": replace(_SANDWICHED, gguf="gemma2"),
    "gemma3_text": replace(_SANDWICHED, query_key_norms=True, gguf="gemma3"),
    "olmo2": Family(  # its query and key norms are over all heads together
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
        query_key_norms=True,
        fixed=("kv_group",),
        gguf="olmo2",
    ),
    "opt": Family(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention_output="self_attn.out_proj",
        attention_norms=("self_attn_layer_norm",),
        num_heads="self_attn.num_heads",
        mlp_inputs=("fc1",),
        mlp_output="fc2",
        mlp_norms=("final_layer_norm",),
        num_key_value_heads=None,
        intermediate_size="ffn_dim",
        norm_eps=None,
        derived_head_dim=True,
        # OPT-350m has norms after the sub-layers: one that lost both would still do something
        needs=(
            ("do_layer_norm_before", True),
            ("_remove_final_layer_norm", False),
            ("word_embed_proj_dim", "hidden_size"),
        ),
        fixed=("hidden",),
        native=("vLLM", "SGLang"),
    ),
    "gpt_neox": Family(
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        query_key_value="attention.query_key_value",
        attention_output="attention.dense",
        mlp_inputs=("mlp.dense_h_to_4h",),
        mlp_output="mlp.dense_4h_to_h",
        num_key_value_heads=None,
        norm_eps=None,
        derived_head_dim=True,
        stored_names=(("lm_head.", "embed_out."),),
        fixed=("hidden",),
        gguf="gptneox",
        native=("vLLM", "MLX"),
    ),
    "qwen3_moe": replace(
        _MIXTURE,
        query_key_norms=True,
        intermediate_size="moe_intermediate_size",
        gguf="qwen3moe",
        needs=(("mlp_only_layers", []), ("decoder_sparse_step", 1)),  # or some layers are no mixtures
    ),
    "mixtral": replace(
        _MIXTURE,
        num_experts="num_local_experts",
        gguf="llama",
        stored_names=(("mlp.gate.", "block_sparse_moe.gate."),),
        stored_experts=(
            (
                "mlp.experts.gate_up_proj",
                ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
            ),
            ("mlp.experts.down_proj", ("block_sparse_moe.experts.{}.w2.weight",)),
        ),
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


def renamed(name: str, part: str, other: str) -> str:
    """The name with one of its parts, if it has it, called otherwise."""
    return f".{name}".replace(f".{part}", f".{other}", 1)[1:]


def tensors_in_files(model_type: str, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that files of a model_type hold of a parameter; one with code of ours keeps it.

    Their numbers, one after the other, are those of the parameter.
    """
    if model_type.startswith(PER_LAYER_PREFIX):
        return [(name, shape)]
    family = family_of(model_type)
    for own, each in family.stored_experts:
        if name.endswith(f".{own}"):
            layer, part = name.removesuffix(own), (shape[1] // len(each), shape[2])
            return [(layer + stored.format(i), part) for i in range(shape[0]) for stored in each]
    for own, stored in family.stored_names:
        name = renamed(name, own, stored)
    return [(name, shape)]
