"""What is written as GGUF is read by llama.cpp, and predicts there what it predicts here."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Number
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compresso import checkpoint, extract, gguf_file
from compresso.families import FAMILIES
from compresso.gguf_numbers import MIXES, fitting
from compresso.gguf_tokens import SAMPLE, SPLITS
from compresso.llama_cpp import LlamaCpp
from compresso.padding import alike, pad
from compresso.perplexity import window_nats
from compresso.shape import describe
from documents import WORDS
from test_extract import VARIANTS, gates_of, logits
from tiny import tiny_model

EQUAL = {"kv_group": [1, 1, 1], "intermediate": [30, 30, 30]}
UNEQUAL = {"kv_group": [2, 1, 1], "intermediate": [40, 17, 33]}
NO_ATTENTION = {"kv_group": [0, 1, 0], "intermediate": [40, 17, 33]}
NO_FFN = {"kv_group": [2, 1, 1], "intermediate": [40, 0, 0]}


LOADABLE = {  # what llama.cpp's loaders take as given
    "smollm3": {"no_rope_layers": [1, 1, 1]},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 3},
    "qwen3_moe": {"norm_topk_prob": True},
}


def smaller(model_type, widths, **settings):
    model = tiny_model(model_type, **{**settings, **LOADABLE.get(model_type, {})})
    groups = describe(model).layers[0].num_key_value_heads
    widths = {**widths, "kv_group": [min(n, groups) for n in widths["kv_group"]]}
    hidden = [32 if model_type == "olmo2" else 24]
    return extract(model, gates_of(model, {**widths, "hidden": hidden}))


def compare(model, runtime, ids):
    """Every next-token distribution of llama.cpp against transformers'."""
    expected = torch.log_softmax(logits(model, ids[None])[0], -1)
    for i in range(1, len(ids) + 1):
        found = runtime.log_probabilities(ids[:i].tolist(), 300)
        actual = torch.tensor([found[token] for token in range(300)])
        # llama.cpp looks GELU up in a table of half precision
        exact = 5e-3 if model.config.model_type.startswith(("gemma", "gpt_neox")) else 1e-4
        torch.testing.assert_close(actual, expected[i - 1], rtol=0, atol=exact)


def test_norms_of_half_precision_get_their_one_in_float32(tokenizer, tmp_path):
    model = smaller("gemma3_text", EQUAL).bfloat16()
    model.model.norm.weight.data.fill_(0.0123)
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "bf16", "tiny")
    (norm,) = (t for t in GGUFReader(tmp_path / "model.gguf").tensors if t.name == "output_norm.weight")
    assert norm.data == pytest.approx(1 + float(torch.tensor(0.0123).bfloat16()), abs=1e-6)


@pytest.mark.parametrize(("model_type", "settings"), [v for v in VARIANTS if FAMILIES[v[0]].gguf])
@pytest.mark.parametrize("widths", [EQUAL, UNEQUAL, NO_ATTENTION, NO_FFN])
def test_llama_cpp_predicts_what_transformers_does(model_type, settings, widths, tokenizer, token_ids, tmp_path):
    model = smaller(model_type, widths, **settings)
    path = tmp_path / "model.gguf"
    family, tied = FAMILIES[model_type], model.config.tie_word_embeddings
    per_layer = family.gguf_per_layer and (family.gguf_per_layer != "openelm" or tied)
    if not per_layer and (widths is not EQUAL or family.derived_head_dim):
        with pytest.raises(ValueError, match=r"no architecture.*--to padded"):
            gguf_file.write(model, tokenizer, path, "f32", "tiny")
        model = pad(model, alike(model))
    gguf_file.write(model, tokenizer, path, "f32", "tiny")
    compare(model, LlamaCpp(path), token_ids[0])


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.gguf])
def test_llama_cpp_says_what_transformers_says(model_type, tokenizer, token_ids, tmp_path):
    model = smaller(model_type, UNEQUAL if FAMILIES[model_type].gguf_per_layer else EQUAL)
    if FAMILIES[model_type].derived_head_dim:
        model = pad(model, alike(model))
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "f32", "tiny")
    expected = model.generate(token_ids[:1], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    said = LlamaCpp(tmp_path / "model.gguf").greedy(token_ids[0].tolist(), 32)
    assert said == expected[0, token_ids.shape[1] :].tolist()


def test_the_perplexity_is_that_of_transformers(tokenizer, tmp_path):
    model = smaller("llama", UNEQUAL)
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "f32", "tiny")
    windows = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    runtime = LlamaCpp(tmp_path / "model.gguf")
    assert [runtime.mean_nats(row.tolist()) for row in windows] == pytest.approx(window_nats(model, windows), rel=1e-5)


def test_several_chat_templates_are_all_carried_over(tokenizer, tmp_path):
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 'tools' }}"}
    gguf_file.write(smaller("llama", EQUAL), several, tmp_path / "model.gguf", "f32", "tiny")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ 'tools' }}"
    assert LlamaCpp(tmp_path / "model.gguf").log_probabilities([1, 5], 3)


@pytest.mark.parametrize("kind", MIXES)
def test_numbers_are_as_near_as_their_format_allows(kind, tokenizer, tmp_path):
    model = tiny_model("llama", hidden_size=256, intermediate_size=320, num_hidden_layers=8, head_dim=64)
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", kind, "tiny")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    worst = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.06, "q4_k_m": 0.12}[kind]
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            continue  # in another order
        tensor = stored[names.get_name(name, (".weight",))]
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.linalg.norm(found - weight.numpy()) <= worst * np.linalg.norm(weight)
    assert LlamaCpp(tmp_path / "model.gguf").greedy([5, 6], 2)


@pytest.mark.parametrize(
    ("width", "kind", "expected"),
    [
        (1126, "f16", 1152),
        (1126, "f32", 1152),
        (1024, "bf16", 1024),
        (40, "f32", 40),
        (1126, "q8_0", 1152),
        (1126, "q4_k_m", 1152),
        (11000, "q4_k_m", 11008),
        (1024, "q4_k_m", 1024),
        (33, "q8_0", 33),
    ],
)
def test_ffn_widths_are_filled_up_where_that_takes_less_room_or_time(width, kind, expected):
    assert fitting(width, 576, MIXES[kind]) == expected


def test_a_quantised_file_of_odd_widths_predicts_what_the_model_does(tokenizer, token_ids, tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    cut = extract(model, gates_of(model, {"intermediate": [75, 60, 96]}))
    gguf_file.write(cut, tokenizer, tmp_path / "model.gguf", "q8_0", "tiny")
    sizes = {t.name: t for t in GGUFReader(tmp_path / "model.gguf").tensors}
    assert [int(sizes[f"blk.{i}.ffn_down.weight"].shape[0]) for i in range(3)] == [96, 64, 96]
    assert sizes["blk.0.ffn_down.weight"].tensor_type == Number.Q8_0
    found = LlamaCpp(tmp_path / "model.gguf").log_probabilities(token_ids[0].tolist(), 300)
    expected = torch.log_softmax(logits(cut, token_ids[:1])[0, -1], -1)
    assert (torch.tensor([found[i] for i in range(300)]) - expected).abs().mean() < 0.3


def test_a_mix_gives_better_numbers_to_what_matters_more(tokenizer, tmp_path):
    model = tiny_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=8, head_dim=64)
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "q4_k_m", "tiny")
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    down = [kinds[f"blk.{i}.ffn_down.weight"] for i in range(8)]
    assert down == [Number.Q6_K if i in (0, 3, 6, 7) else Number.Q4_K for i in range(8)]
    assert kinds["output.weight"] == Number.Q6_K
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == Number.Q4_K
    assert kinds["blk.0.attn_norm.weight"] == Number.F32


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
@pytest.mark.parametrize("widths", [EQUAL, UNEQUAL])
def test_scaled_positions_are_carried_over(rope, widths, tokenizer, token_ids, tmp_path):
    model = smaller("llama", widths, rope_parameters=rope)
    plain = smaller("llama", widths, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "f32", "tiny")
    assert (logits(model, token_ids) - logits(plain, token_ids)).abs().max() > 0.01
    compare(model, LlamaCpp(tmp_path / "model.gguf"), token_ids[0])


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, r"one layer in 4 of a smollm3 to be 0 in no_rope_layers.*\[1\]"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "one layer in 2 of a gemma2"),
        ("gemma2", {"layer_types": LOADABLE["gemma2"]["layer_types"], "query_pre_attn_scalar": 16}, "by head_dim"),
    ],
)
def test_what_a_loader_takes_as_given_must_be_so(model_type, settings, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        gguf_file.write(tiny_model(model_type, **settings), tokenizer, tmp_path / "x.gguf", "f32", "tiny")


def test_positions_that_llama_cpp_would_scale_otherwise_are_refused(tokenizer, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="'yarn'"):
        gguf_file.write(tiny_model("llama", rope_parameters=rope), tokenizer, tmp_path / "x.gguf", "f32", "tiny")


TEXTS = [SAMPLE, "plain words", "<bos>a  b", "", " x", "under_score 12345 ÄÖ"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("division", ["gpt-2", "smollm", *SPLITS.values()])
def test_llama_cpp_divides_text_as_a_byte_level_tokenizer_does(division, text, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = {"smollm": [pre_tokenizers.Digits(individual_digits=True), level], "gpt-2": [level]}
    for pattern, name in SPLITS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        steps[name] = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[division])
    gguf_file.write(tiny_model("llama"), other, tmp_path / "model.gguf", "f32", "tiny")
    assert LlamaCpp(tmp_path / "model.gguf").tokens(text) == other(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_divides_text_as_a_sentencepiece_like_tokenizer_does(text, tmp_path):
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    whole = json.loads(core.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]  # bytes are pieces, not special tokens
    core = Tokenizer.from_str(json.dumps(whole))
    other = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    gguf_file.write(tiny_model("llama", vocab_size=330), other, tmp_path / "model.gguf", "f32", "tiny")
    assert LlamaCpp(tmp_path / "model.gguf").tokens(text) == other(text)["input_ids"]


def test_a_division_without_a_name_is_refused(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"divides text in a way .Whitespace. that is none of those known"):
        gguf_file.write(tiny_model("llama"), other, tmp_path / "x.gguf", "f32", "tiny")


def test_a_written_file_can_be_read_back_as_a_model(tokenizer, token_ids, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "f32", "tiny")
    again, _ = checkpoint.load(tmp_path / "model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(again, token_ids), logits(model, token_ids), rtol=0, atol=1e-5)
