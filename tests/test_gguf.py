"""A GGUF file becomes the stock model that it was made from."""

import json

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from compresso import checkpoint
from compresso.families import FAMILIES
from tiny import CHAT_TEMPLATE, tiny_model

TEXT = "the quick brown fox sleeps under an old tree; 12 lazy dogs, too"
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K in llama.cpp's order: the halves of each head, which RoPE pairs, are interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, kind=Kind.F32, architecture="llama", without="", rope_factor=None):
    """As llama.cpp's convert_hf_to_gguf.py writes a Llama with a byte-level BPE tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])

    if rope_factor:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_factor)

    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == without:
            continue
        if "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        stored = Kind.F32 if weight.ndim == 1 else kind
        array = gguf.quantize(weight.contiguous().numpy(), stored)
        writer.add_tensor(names.get_name(name, (".weight",)), array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def original(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), intermediate_size=64, rope_parameters=ROPE)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


# Relative to the largest logit. Q8_0 differs by 0.024 here; Q and K left permuted would differ by 0.34.
@pytest.mark.parametrize(("kind", "tolerance"), [(Kind.F32, 1e-5), (Kind.Q8_0, 0.05)], ids=["f32", "q8_0"])
def test_a_gguf_file_computes_what_its_original_computes(kind, tolerance, original, tokenizer, tmp_path):
    loaded, _ = checkpoint.load(str(write_gguf(tmp_path / "x.gguf", original, tokenizer, kind)), dtype=torch.float32)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = logits(original, ids)
    assert (logits(loaded, ids) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=["f32", "q8_0"])
def test_a_gguf_file_becomes_a_stock_model_that_is_not_quantised(kind, original, tokenizer, tmp_path):
    loaded, _ = checkpoint.load(str(write_gguf(tmp_path / "x.gguf", original, tokenizer, kind)), dtype=torch.float32)
    assert type(loaded) is type(original)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    wanted = {k: v for k, v in original.config.to_dict().items() if k not in ("dtype", "_name_or_path")}
    assert {k: loaded.config.to_dict().get(k) for k in wanted} == wanted
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in saved


def test_the_tokenizer_and_its_chat_template_come_out_of_the_file(original, tokenizer, tmp_path):
    _, loaded = checkpoint.load(str(write_gguf(tmp_path / "x.gguf", original, tokenizer)), dtype=torch.float32)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<bos>", "<eos>", "<pad>")
    chat = [{"role": "user", "content": TEXT}]
    found, expected = (
        t.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for t in (loaded, tokenizer)
    )
    assert found == expected
    assert loaded.decode(loaded(TEXT).input_ids) == TEXT


@pytest.mark.parametrize("architecture", ["gpt2", "falcon"])
def test_a_gguf_file_of_a_known_but_unsupported_architecture_is_told_the_supported_ones(
    architecture, original, tokenizer, tmp_path
):
    path = write_gguf(tmp_path / "x.gguf", original, tokenizer, architecture=architecture)
    with pytest.raises(ValueError, match=f"{architecture}.*supported are: {', '.join(FAMILIES)}"):
        checkpoint.load(str(path), dtype=torch.float32)


def test_a_gguf_file_of_an_unknown_architecture_is_refused_by_name(original, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", original, tokenizer, architecture="novel")
    with pytest.raises(ValueError, match=r"x\.gguf cannot be read as GGUF: .*novel"):
        checkpoint.load(str(path), dtype=torch.float32)


def test_a_missing_tensor_is_named(original, tokenizer, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "x.gguf", original, tokenizer, without=name)
    with pytest.raises(ValueError, match=f"lacks weights .* {name}"):
        checkpoint.load(str(path), dtype=torch.float32)


def test_rope_scaling_that_would_be_lost_is_refused(original, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", original, tokenizer, rope_factor=4.0)
    with pytest.raises(ValueError, match="scales its rotary positions"):
        checkpoint.load(str(path), dtype=torch.float32)
