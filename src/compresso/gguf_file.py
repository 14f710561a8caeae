"""A model and its tokenizer as one GGUF file, for llama.cpp and what is built on it.

Equal widths are written as the family's own architecture, unequal ones as one whose loader reads widths layer by layer
(`deci`, `openelm`). What such a loader cannot read is filled up with zeros first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso import gguf_numbers
from compresso.families import PER_LAYER_PREFIX, Family, family_of
from compresso.gguf_tokens import write_tokens
from compresso.padding import largest, pad
from compresso.shape import LayerShape, describe, head_dim_of, main_rope

ZERO_CHANNELS = 32  # of an FFN that was removed and that a loader cannot do without


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's loader of an architecture does (commit 0c1e57098; tested)."""

    interleaved: bool = False
    """Its rotary embedding pairs neighbours, where transformers pairs halves."""
    per_layer: bool = False
    no_attention: bool = False
    """Layers may lack attention, but the first, whose head size it reads."""
    fused: bool = False
    """Query, key and value are one matrix."""
    tied_only: bool = False
    square: bool = False
    """Query heads together are as wide as the hidden size."""
    complete: bool = False
    """Every matrix must have a bias, and the head weights of its own: zeros and a copy of the embedding, if need be."""
    rope_factors: bool = False
    every: tuple[str, int, Any] | None = None
    """A list of the config that the loader does not read, but takes as: at every so many layers this value."""


ARCHITECTURES = {
    "llama": Architecture(interleaved=True, rope_factors=True),
    "deci": Architecture(interleaved=True, per_layer=True, no_attention=True, rope_factors=True),
    "qwen2": Architecture(square=True),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(),
    "smollm3": Architecture(interleaved=True, every=("no_rope_layers", 4, 0)),
    "granite": Architecture(interleaved=True),
    "arcee": Architecture(interleaved=True),
    "gemma2": Architecture(every=("layer_types", 2, "full_attention")),
    "gemma3": Architecture(every=("layer_types", 6, "full_attention")),
    "olmo2": Architecture(square=True),
    "gptneox": Architecture(fused=True, square=True, complete=True),
    "openelm": Architecture(per_layer=True, fused=True, tied_only=True),
}


def architecture_of(model: PreTrainedModel) -> str:
    """llama.cpp's name for what this model is. Raises ValueError, with what works instead, if it has none."""
    family, shape = family_of(model.config.model_type), describe(model)
    first = shape.layers[0]
    equal = len(set(shape.layers)) == 1 and first.num_key_value_heads and first.intermediate_size
    stock = model.config.model_type.removeprefix(PER_LAYER_PREFIX)
    if family.gguf is None:
        raise ValueError(
            f"llama.cpp has no architecture for {stock}; `--to onnx` is for onnxruntime, which needs no GPU either, "
            "`--to padded` gives a stock checkpoint for other runtimes"
        )
    if equal and ARCHITECTURES[family.gguf].square:
        equal = first.num_key_value_heads * first.queries_per_group * first.head_dim == shape.hidden_size
    name = family.gguf if equal else family.gguf_per_layer
    tied = model.config.tie_word_embeddings
    if name is None and len({layer.experts for layer in shape.layers} - {0}) > 1:
        raise ValueError(
            f"llama.cpp has no architecture for a {stock} whose layers differ in experts, which cannot be filled up; "
            "`compresso prune --shape uniform` keeps as many in each, `--to hf` carries the code for unequal ones"
        )
    if name is None or (ARCHITECTURES[name].tied_only and not tied):
        raise ValueError(
            f"llama.cpp has no architecture for a {stock} whose layers differ in width or whose query heads together "
            f"are not as wide as its hidden size{'' if name is None else ', with a head of its own'}; `--to padded` "
            f"first, then `--to gguf` of its result, works{'' if family.derived_head_dim else ' for the former'}"
        )
    _check_constants(model, name)
    factors = rope_factors(model)
    if factors is not None and not ARCHITECTURES[name].rope_factors:
        raise ValueError(
            f"the rotary positions of this model are scaled ({model.config.rope_parameters}), which is not written "
            f"for llama.cpp's {name}"
        )
    return name


def _check_constants(model: PreTrainedModel, name: str) -> None:
    """Raise ValueError for what llama.cpp's loader takes as given and this model has otherwise."""
    config, every = model.config, ARCHITECTURES[name].every
    if every is not None:
        key, step, value = every
        found = [i for i, entry in enumerate(getattr(config, key)) if entry == value]
        if found != list(range(step - 1, config.num_hidden_layers, step)):
            raise ValueError(
                f"llama.cpp takes one layer in {step} of a {name} to be {value!r} in {key}, and here these are "
                f"{found}; keep all layers (prune groups and channels), or use `--to hf`"
            )
    if not getattr(config, "norm_topk_prob", True):
        raise ValueError(
            f"llama.cpp lets the weights of the experts that a {name} chooses sum to 1, and those of this model do not "
            "(norm_topk_prob); `--to hf` keeps them"
        )
    expected = getattr(config, "query_pre_attn_scalar", head_dim_of(config))
    if expected != head_dim_of(config):
        raise ValueError(f"llama.cpp scales queries by head_dim ({head_dim_of(config)}), this model by {expected}")


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, kind: str, title: str) -> str:
    """Write the file, matrices as `kind` (a name in `gguf_numbers.MIXES`); the architecture that it was written as.

    Raises ValueError if llama.cpp cannot hold the model or its tokenizer.
    """
    gguf_numbers.check(kind)
    name = architecture_of(model)
    mix = gguf_numbers.MIXES[kind]
    layers = [_readable(i, layer, name, model) for i, layer in enumerate(describe(model).layers)]
    widths = [gguf_numbers.fitting(layer.intermediate_size, model.config.hidden_size, mix) for layer in layers]
    model = pad(model, [replace(layer, intermediate_size=n) for layer, n in zip(layers, widths, strict=True)])
    writer = GGUFWriter(path, name)
    writer.add_name(title)
    writer.add_file_type(mix.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_shape(writer, model, ARCHITECTURES[name])
    write_tokens(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
    tied = model.config.tie_word_embeddings and not ARCHITECTURES[name].complete
    numbers = {}
    for tensor, value in _tensors(model, name):
        size = tuple(value.shape)
        numbers[tensor] = number = gguf_numbers.number_of(tensor, size, mix, model.config.num_hidden_layers, tied)
        block, width = gguf.GGML_QUANT_SIZES[number]
        stored = size if block == 1 else (*size[:-1], size[-1] // block * width)
        dtype = np.dtype({1: np.uint8, 2: np.float16, 4: np.float32}[width if block == 1 else 1])
        if number == gguf.GGMLQuantizationType.BF16:
            stored, dtype = (*size[:-1], 2 * size[-1]), np.dtype(np.uint8)
        count = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(tensor, stored, dtype, count, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, value in _tensors(model, name):
        writer.write_tensor_data(gguf_numbers.encode(value.float().contiguous().cpu().numpy(), numbers[tensor]))
    writer.close()
    return name


def _rotated(config: PreTrainedConfig) -> int:
    """Of the entries of a head, those that rotary positions turn."""
    return int(head_dim_of(config) * main_rope(config).get("partial_rotary_factor", 1.0))


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What each rotary frequency of the model is slowed down by, one for two entries of a head; None where it is not.

    Raises ValueError for scalings that depend on the length of the text or scale attention.
    """
    config = model.config
    rope = main_rope(config)
    rotary = model.get_submodule(family_of(config.model_type).layers.rpartition(".")[0]).rotary_emb
    with torch.device("cpu"):
        rotary = type(rotary)(config)  # the model's own may be a shape without numbers
    kind = "full_attention_" if "full_attention" in config.rope_parameters else ""
    if not hasattr(rotary, f"{kind}inv_freq"):
        return None  # no layer looks at all of a text
    if rope["rope_type"] not in ("default", "linear", "llama3") or getattr(rotary, f"{kind}attention_scaling") != 1:
        raise ValueError(f"rotary positions scaled as {rope['rope_type']!r} are not written for llama.cpp")
    rotated = _rotated(config)
    plain = rope["rope_theta"] ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    factors = plain / getattr(rotary, f"{kind}inv_freq").double()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors.float()


def _readable(index: int, layer: LayerShape, name: str, model: PreTrainedModel) -> LayerShape:
    """The least wide form of a layer that the loader reads rightly."""
    architecture, some = ARCHITECTURES[name], largest(describe(model).layers)
    if not layer.num_key_value_heads and (index == 0 or not architecture.no_attention):
        layer = replace(layer, num_key_value_heads=1, queries_per_group=max(1, some.queries_per_group))
    if not layer.intermediate_size:
        layer = replace(layer, intermediate_size=ZERO_CHANNELS)
    return layer


def _write_shape(writer: GGUFWriter, model: PreTrainedModel, architecture: Architecture) -> None:
    config, layers = model.config, describe(model).layers
    widths = [layer.widths for layer in layers]

    def each(key: str) -> int | list[int]:
        return [width[key] for width in widths] if architecture.per_layer else widths[0][key]

    head_dim = head_dim_of(config)
    window = getattr(config, "sliding_window", None)
    mixed = architecture.every is not None and architecture.every[0] == "layer_types"
    if window and mixed:
        writer.add_sliding_window(window)
    context = [config.max_position_embeddings, None if mixed else window]  # where its loader knows no window
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(min(length for length in context if length))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(each("intermediate_size"))
    if layers[0].num_experts is not None:
        writer.add_expert_count(layers[0].num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(layers[0].intermediate_size)
    writer.add_head_count(each("num_attention_heads"))
    writer.add_head_count_kv(each("num_key_value_heads"))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_freq_base(main_rope(config)["rope_theta"])
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    for add, key in (
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"),
        (writer.add_layer_norm_eps, "layer_norm_eps"),
        (writer.add_parallel_residual, "use_parallel_residual"),
        (writer.add_attention_scale, "attention_multiplier"),
        (writer.add_embedding_scale, "embedding_multiplier"),
        (writer.add_residual_scale, "residual_multiplier"),
        (writer.add_logit_scale, "logits_scaling"),
        (writer.add_attn_logit_softcapping, "attn_logit_softcapping"),
        (writer.add_final_logit_softcapping, "final_logit_softcapping"),
    ):
        if getattr(config, key, None) is not None:
            add(getattr(config, key))


def _tensors(model: PreTrainedModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and value of every tensor, one after the other."""
    architecture, family = ARCHITECTURES[name], family_of(model.config.model_type)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    layers, weights = describe(model).layers, dict(model.state_dict())
    if architecture.complete:
        for key in [key for key, value in weights.items() if key.startswith(family.layers) and value.ndim == 2]:
            weights.setdefault(key.removesuffix("weight") + "bias", weights[key].new_zeros(len(weights[key])))
    heads = {family.query: "num_attention_heads", family.key: "num_key_value_heads"}
    for key, value in weights.items():
        if key == family.head + ".weight" and model.config.tie_word_embeddings and not architecture.complete:
            continue
        if family.router and key.endswith((*family.mlp_inputs, family.mlp_output)):
            yield from _experts(key.removeprefix(family.layers + ".").partition(".")[0], value, key, family)
            continue
        module, _, kind = key.rpartition(".")
        layer, _, path = module.removeprefix(family.layers + ".").partition(".")
        if architecture.interleaved and path in heads:
            value = _interleaved(value, layers[int(layer)].widths[heads[path]])
        if path == family.query_key_value:
            yield f"blk.{layer}.attn_qkv.{kind}", _apart(value, layers[int(layer)])
        elif architecture.fused and path == family.query:
            others = [weights[f"{family.layers}.{layer}.{p}.{kind}"] for p in (family.key, family.value)]
            yield f"blk.{layer}.attn_qkv.{kind}", torch.cat([value, *others])
        elif not (architecture.fused and path in (family.key, family.value)):
            target = names.get_name(module)
            assert target, module
            yield f"{target}.{kind}", value.float() + family.norm_offset if module.endswith("norm") else value
    factors = rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _experts(layer: str, stack: Tensor, key: str, family: Family) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and value of what a stack holds."""
    parts = ["ffn_down_exps"] if key.endswith(family.mlp_output) else ["ffn_gate_exps", "ffn_up_exps"]
    for name, part in zip(parts, stack.chunk(len(parts), 1), strict=True):
        yield f"blk.{layer}.{name}.weight", part


def _apart(rows: Tensor, layer: LayerShape) -> Tensor:
    """Rows of queries, keys and values, which each group has together, as all queries, all keys, all values."""
    groups, queries = layer.num_key_value_heads, layer.queries_per_group
    heads = rows.view(groups, queries + 2, layer.head_dim, *rows.shape[1:])
    return torch.cat([part.flatten(0, 2) for part in heads.split([queries, 1, 1], dim=1)])


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix, or entries of its bias, with the halves of each head that rotate together as
    neighbours."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
