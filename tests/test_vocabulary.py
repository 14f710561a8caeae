"""A vocabulary without the tokens that no record uses: what stays the same, what moves along, whole runs."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import compresso
from compresso import gguf_file, vocabulary, workbench
from compresso.batches import Encoder
from compresso.config import PruneConfig
from compresso.families import FAMILIES
from compresso.prompts import find_prompt
from compresso.records import read_sources
from compresso.stopping import Stopped
from documents import WORDS
from tiny import CHAT_TEMPLATE, QUICK, tiny_model

SPECIAL = ["<unk>", "<pad>", "<bos>", "<eos>"]
LATE = ["<|system|>", "<|user|>", "<|assistant|>"]
USED = " ".join(WORDS[:9])  # parts of TEXTS
LONGER = [a + b for a in [*WORDS, "über", "naïve", "déjà"] for b in WORDS]
TEXTS = [" ".join(random.Random(i).choices(LONGER, k=30)) for i in range(60)]
AWKWARD = [
    "",
    " ",
    "  a \n\n\tb   ",
    "naïve déjà vu",
    "你好世界",
    "👩🏽\u200d🚀 e\u0301 \u2581",
    "f(x):\n    x**2\n",
    "\x00",
]


def finished(core: Tokenizer) -> PreTrainedTokenizerFast:
    """With a template around every text, and special tokens after the others."""
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LATE])
    core.add_tokens([AddedToken("\n\n", normalized=False)])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    names = {f"{name}_token": f"<{name}>" for name in ("unk", "pad", "bos", "eos")}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=CHAT_TEMPLATE, model_max_length=333, padding_side="left", **names
    )


def byte_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return finished(core)


def llama_2() -> PreTrainedTokenizerFast:
    """BPE over characters, one word for a whole text, bytes for characters that it does not know."""
    trained = Tokenizer(models.BPE())
    spaced = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = spaced
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    found = json.loads(trained.to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].get)
    listed = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *(token for token in tokens if len(token) > 1)]
    listed += [token for token in tokens if len(token) == 1]  # sentencepiece has them last
    numbers = {token: i for i, token in enumerate(listed)}
    merges = [(t[:i], t[i:]) for t in listed[260:] for i in range(1, len(t)) if {t[:i], t[i:]} <= numbers.keys()]
    core = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = spaced
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(SPECIAL)
    return finished(core)


def unigram(fallback: bool = True) -> PreTrainedTokenizerFast:
    """As sentencepiece's; without fallback, characters that it does not know are lost, here as there."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False)
    )
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    if fallback:
        pieces += [(f"<0x{i:02X}>", 0.0) for i in range(256)]
    core = Tokenizer(models.Unigram([tuple(piece) for piece in pieces], 0, fallback))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    core.add_special_tokens(SPECIAL)
    return finished(core)


KINDS = {"byte-level": byte_level(), "llama-2": llama_2(), "unigram": unigram()}


def cut_to(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[list[int], PreTrainedTokenizerFast]:
    used = {i for text in texts for i in tokenizer(text)["input_ids"]}
    kept = vocabulary.kept_tokens(tokenizer, used)
    return kept, vocabulary.smaller_tokenizer(tokenizer, kept)


SMALLER = {kind: cut_to(tokenizer, [USED]) for kind, tokenizer in KINDS.items()}


def back(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_used_texts_become_the_same_tokens(kind):
    tokenizer, (kept, smaller) = KINDS[kind], SMALLER[kind]
    assert len(kept) == len(smaller) < 0.95 * len(tokenizer)
    for text in (USED, " ".join(WORDS[3:6]), f"{WORDS[2]}<eos>\n\n{WORDS[4]}"):
        new, old = smaller(text)["input_ids"], tokenizer(text)["input_ids"]
        assert [kept[i] for i in new] == old
        assert smaller.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)


@pytest.mark.parametrize("kind", KINDS)
@given(
    picked=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3),
    cut=st.integers(0, 40),
    word=st.text(alphabet="abcdefhinorstuwxzé ", max_size=12),
)
@settings(max_examples=25, deadline=None)
def test_any_corpus_becomes_the_same_tokens(kind, picked, cut, word):
    tokenizer = KINDS[kind]
    corpus = [text[cut:] + word for text in picked]
    kept, smaller = cut_to(tokenizer, corpus)
    for text in corpus:
        assert [kept[i] for i in smaller(text)["input_ids"]] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.sampled_from([*AWKWARD, *TEXTS]), st.text(max_size=30)))
@settings(max_examples=150, deadline=None)
def test_every_text_comes_back(kind, text):
    tokenizer, smaller = KINDS[kind], SMALLER[kind][1]
    assert back(smaller, text) == back(tokenizer, text)
    assert smaller.unk_token_id not in smaller(text.replace("<unk>", ""))["input_ids"]
    if kind == "byte-level" and not any(token in text for token in (*SPECIAL, *LATE)):
        assert back(smaller, text) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_tokenizer_stays(kind, tmp_path):
    tokenizer, smaller = KINDS[kind], SMALLER[kind][1]
    smaller.save_pretrained(tmp_path)
    turns = [{"role": "user", "content": USED}]
    for one in (smaller, AutoTokenizer.from_pretrained(tmp_path)):
        assert type(one) is type(tokenizer)
        assert one.special_tokens_map == tokenizer.special_tokens_map
        assert (one.padding_side, one.model_max_length) == ("left", 333)
        assert one.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)
        assert one("the")["input_ids"][0] == one.bos_token_id == one.get_vocab()["<bos>"]
        assert sorted(one.get_vocab().values()) == list(range(len(one)))
        assert {str(t) for t in one.added_tokens_decoder.values()} == {*SPECIAL, *LATE, "\n\n"}
        assert len(one.tokenize("<|user|>")) == 1
    assert vocabulary.shared_tokens(tokenizer, smaller) == SMALLER[kind][0]


def test_without_a_fallback_single_characters_stay():
    tokenizer = unigram(fallback=False)
    _, smaller = cut_to(tokenizer, [USED])
    single = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert single <= smaller.get_vocab().keys()
    for text in [*TEXTS, *AWKWARD]:
        assert back(smaller, text) == back(tokenizer, text)


def test_a_token_that_no_merge_reaches_stays_by_itself():
    """As Llama 3's: words of the vocabulary are taken as they are."""
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}, [("b", "c")], ignore_merges=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.tokenize("abc") == ["abc"]
    kept, smaller = cut_to(tokenizer, ["abc"])
    assert kept == [0, 1, 2, 4, 5]
    assert smaller.tokenize("abc") == ["abc"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_cut_model_computes_the_logits_that_stay(model_type, tmp_path):
    tokenizer, (kept, smaller) = KINDS["byte-level"], SMALLER["byte-level"]
    model = tiny_model(model_type, vocab_size=len(tokenizer) + 7, pad_token_id=1, bos_token_id=2, eos_token_id=[3, 421])
    model.generation_config.eos_token_id = [3, 421]
    model.generation_config.suppress_tokens = [kept[20], len(tokenizer) + 2]
    expected = model(torch.tensor([kept[5:40]])).logits[..., kept]
    vocabulary.check(model, tokenizer)
    assert vocabulary.special_tokens(model) >= {1, 2, 3, 421}
    vocabulary.cut(model, kept)
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(model(ids).logits, expected)
    for settings_ in (model.config, model.generation_config):
        assert settings_.eos_token_id == [3, kept.index(421)]
        assert (settings_.pad_token_id, settings_.bos_token_id) == (1, 2)
    assert model.generation_config.suppress_tokens == [20]
    assert smaller.convert_ids_to_tokens(kept.index(421)) == tokenizer.convert_ids_to_tokens(421)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == len(kept) == again.get_output_embeddings().out_features
    torch.testing.assert_close(again(ids).logits, expected)


def test_the_documented_code_cuts_the_vocabulary_alone(dense, few, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"demo"', f'"{dense}"').replace("my.jsonl", str(few)), {})
    tokenizer = AutoTokenizer.from_pretrained("smaller")
    assert AutoModelForCausalLM.from_pretrained("smaller").config.vocab_size == len(tokenizer)
    assert back(tokenizer, USED) == USED


def test_what_cannot_be_cut_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    affixed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(end_of_word_suffix="</w>")))

    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    for tokenizer, told in ((words, "WordLevel"), (affixed, "</w>"), (Slow(), "slow tokenizer")):
        with pytest.raises(ValueError, match=f"{told}.*leave vocab out of --units"):
            vocabulary.kept_tokens(tokenizer, [0])
    with pytest.raises(ValueError, match=r"has token .* the embedding 300 rows"):
        vocabulary.check(tiny_model("llama"), KINDS["byte-level"])
    with pytest.raises(ValueError, match=r"units lists only vocab.*kv_group,intermediate,vocab"):
        PruneConfig(units=("vocab",))
    with pytest.raises(ValueError, match=r"vocab needs all records.*--stream"):
        PruneConfig(units=("intermediate", "vocab"), stream=True)
    assert PruneConfig(units="kv_group,vocab").gates == ("kv_group",)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model with many more tokens than the records use, and a row that is no token's."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = KINDS["byte-level"]
    settings_ = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": [3, 422], "max_position_embeddings": 512}
    tiny_model("llama", vocab_size=len(tokenizer) + 1, tie_word_embeddings=True, **settings_).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Records of few words."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    rows = [{"instruction": f"say {WORDS[i % 4]}", "output": " ".join(WORDS[: 2 + i % 5])} for i in range(30)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


UNITS = ("kv_group", "intermediate", "vocab")


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def whole(dense, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    settings_ = {**QUICK, "units": UNITS, "distill": 0.3, "also": (0.1,), "checkpoint_seconds": 0}
    compresso.prune(model=str(dense), data=str(few), output=str(folder), **settings_)
    return folder


def test_a_run_leaves_a_smaller_vocabulary(dense, few, whole):
    summary = json.loads((whole / "summary.json").read_text())
    old, new = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(whole / "model")
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    tokens, parameters = summary["vocabulary"]["tokens"], summary["vocabulary"]["parameters"]
    assert tokens == {"before": len(old), "after": len(new)}
    assert len(new) < len(old)
    assert len(new) == model.config.vocab_size == len(model.get_input_embeddings().weight)
    assert parameters["before"] - parameters["after"] == (len(old) + 1 - len(new)) * 32
    assert summary["parameters"]["before"] == parameters["before"]
    assert parameters["before"] == AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    assert summary["parameters"]["after"] == model.num_parameters() < parameters["after"]
    assert summary["units"] == list(UNITS)
    assert 0.15 < summary["sparsity"] < 0.25
    assert model.config.eos_token_id == [3, new.get_vocab()[old.convert_ids_to_tokens(422)]]
    prompt = find_prompt("short", "chat")
    for record in read_sources(str(few))[0].records:
        before, after = (Encoder(tokenizer, 200).encode(record, prompt).ids for tokenizer in (old, new))
        assert new.convert_ids_to_tokens(after) == old.convert_ids_to_tokens(before)
    assert f"{len(new)} of {len(old)} tokens" in (whole / "model" / "README.md").read_text()
    page = (whole / "report.html").read_text()
    assert "tokens of the vocabulary" in page
    assert "per token of the smaller vocabulary" in page
    also = AutoTokenizer.from_pretrained(whole / "also" / "0.1" / "model")
    assert also.get_vocab() == new.get_vocab()
    assert compresso.recover(str(whole / "also" / "0.1"), recover_steps=1)["vocabulary"] == summary["vocabulary"]


def test_recovering_cuts_no_second_time(whole, data, tmp_path):
    """Not even with records that have other words."""
    run = shutil.copytree(whole, tmp_path / "run")
    compresso.recover(str(run))
    one, other = weights(run / "model"), weights(whole / "model")
    assert all(torch.equal(one[name], other[name]) for name in other)
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    summary = compresso.recover(str(run), data=str(data), recover_steps=2)
    assert AutoTokenizer.from_pretrained(run / "model").get_vocab() == tokenizer.get_vocab()
    assert summary["vocabulary"]["tokens"]["after"] == len(tokenizer)


@pytest.mark.parametrize("stop", ["pruning", "recovery"])
def test_a_run_that_was_stopped_comes_to_the_same_vocabulary(dense, few, whole, tmp_path, monkeypatch, stop):
    steps = iter(range(1000))
    last = {"pruning": 5, "recovery": 10}[stop]
    real = workbench.Workbench._save

    def interrupted(*args):
        real(*args)
        if next(steps) == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(workbench.Workbench, "_save", interrupted)
    run = tmp_path / "run"
    settings_ = {**QUICK, "units": UNITS, "distill": 0.3, "also": (0.1,), "checkpoint_seconds": 0}
    with pytest.raises(Stopped):
        compresso.prune(model=str(dense), data=str(few), output=str(run), **settings_)
    monkeypatch.setattr(workbench.Workbench, "_save", real)
    compresso.resume(str(run))
    one, other = weights(run / "model"), weights(whole / "model")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    vocab = [AutoTokenizer.from_pretrained(folder / "model").get_vocab() for folder in (run, whole)]
    assert vocab[0] == vocab[1]


@pytest.mark.parametrize(("method", "units"), [("wanda", UNITS), ("shortgpt", "attention,mlp,vocab")])
def test_other_methods_cut_the_vocabulary_too(dense, few, tmp_path, method, units):
    settings_ = {**QUICK, "units": units, "method": method, "recover_steps": 0, "target_sparsity": 0.3}
    summary = compresso.prune(model=str(dense), data=str(few), output=str(tmp_path / "run"), **settings_)
    after = summary["vocabulary"]["tokens"]["after"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.vocab_size == after


def test_weights_in_parts_are_refused_before_anything_is_written(dense, few, tmp_path):
    settings_ = {**QUICK, "units": UNITS, "precision": "4bit"}
    with pytest.raises(ValueError, match="vocab needs whole weights"):
        compresso.prune(model=str(dense), data=str(few), output=str(tmp_path / "run"), **settings_)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["byte-level", "llama-2"])
def test_a_gguf_file_has_the_tokens_that_stay(kind, tmp_path):
    tokenizer, (kept, smaller) = KINDS[kind], SMALLER[kind]
    model = tiny_model("llama", vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=2, eos_token_id=3)
    vocabulary.cut(model, kept)
    gguf_file.write(model, smaller, tmp_path / "model.gguf", "f32", "tiny")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    listed = sorted(smaller.get_vocab(), key=smaller.get_vocab().get)
    assert fields["tokenizer.ggml.tokens"].contents() == listed
    assert fields["tokenizer.ggml.eos_token_id"].contents() == smaller.eos_token_id
    if kind == "byte-level":
        merges = json.loads(smaller.backend_tokenizer.to_str())["model"]["merges"]
        assert fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in merges]
