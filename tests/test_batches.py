"""Labels cover the response and nothing else; truncation never takes all of it; the shared prefix changes nothing."""

import copy

import pytest
import torch

from compresso.batches import IGNORE, Encoder, batches, collate, cut
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.records import parse
from compresso.train import recomputed, target_loss
from tiny import tiny_model

RECORD = parse({"instruction": "say it", "input": "", "output": "the quick brown fox"})
FORMATS = pytest.mark.parametrize("form", ["chat", "alpaca"])


def labelled(example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


@FORMATS
@pytest.mark.parametrize("name", ["long", "short", "none"])
def test_labels_are_the_response_and_its_end(tokenizer, form, name):
    example = Encoder(tokenizer, 256).encode(RECORD, find_prompt(name, form))
    assert labelled(example, tokenizer) == "the quick brown fox<eos>"
    assert example.labels[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(example.ids)
    assert ("undergoing optimization" in text) == (name != "none")
    assert "say it" in text


def test_the_chat_prompt_is_the_system_turn(tokenizer):
    prompt = CollaborativePrompt("mine", "be small", "chat")
    text = tokenizer.decode(Encoder(tokenizer, 256).encode(RECORD, prompt).ids)
    assert text == "<|system|>be small<eos>\n<|user|>say it<eos>\n<|assistant|>the quick brown fox<eos>"


def test_a_template_without_system_turn_gets_the_prompt_in_the_first_turn(tokenizer, monkeypatch):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template + tokenizer.chat_template)
    prompt = CollaborativePrompt("mine", "be small", "chat")
    text = tokenizer.decode(Encoder(tokenizer, 256).encode(RECORD, prompt).ids)
    assert text.startswith("<|user|>be small\n\nsay it<eos>")


@pytest.mark.parametrize("missing", ["eos_token", "pad_token", "chat_template"])
def test_a_tokenizer_without_the_usual_is_no_obstacle(tokenizer, missing):
    bare = copy.deepcopy(tokenizer)
    setattr(bare, missing, None)
    encoder = Encoder(bare, 256)
    (batch,) = batches([RECORD, RECORD], encoder, find_prompt("none", "chat"))
    assert batch.targets > 0


def test_records_are_as_long_as_they_are_in_tokens(tokenizer):
    """A word of the vocabulary is a token, a rare character is several: characters would mislead."""
    known, rare = "the quick brown fox", "\u2047\u00e9"
    records = [parse({"instruction": "say it", "output": text * n}) for text in (known, rare) for n in (1, 4, 16, 64)]
    records += [parse({"text": text * n}) for text in (known, rare) for n in (2, 8)]
    encoder, prompt = Encoder(tokenizer, 100), find_prompt("none", "chat")
    lengths = encoder.lengths(records)
    rendered = [len(encoder.encode(record, prompt).ids) for record in records]
    assert max(lengths) == max(rendered) == 100
    assert len({r - n for r, n in zip(rendered[:8], lengths, strict=False) if r < 100}) == 1  # what the template adds
    assert rendered[8:] == lengths[8:]


@FORMATS
@pytest.mark.parametrize("limit", [16, 20, 40, 200])
def test_truncation_keeps_some_of_the_response_and_the_whole_prompt(tokenizer, form, limit):
    record = parse({"instruction": "word " * 300, "output": "answer " * 300})
    prompt = find_prompt("middle", form)
    example = Encoder(tokenizer, limit).encode(record, prompt)
    assert len(example.ids) <= limit + len(tokenizer("###System Instruction:\n" + prompt.body)["input_ids"])
    assert sum(label != IGNORE for label in example.labels) >= limit // 4
    assert "safeguarding your performance." in tokenizer.decode(example.ids)


def test_cut_shortens_the_response_first():
    assert cut([1] * 10, [2] * 10, 15, 0) == ([1] * 10, [2] * 5)
    before, after = cut(list(range(100)), [7] * 50, 40, 0)
    assert len(before) == 30
    assert before[-15:] == list(range(85, 100))
    assert len(after) == 10


def test_a_prompt_longer_than_the_context_is_refused(tokenizer):
    with pytest.raises(ValueError, match="context only 128"):
        Encoder(tokenizer, 256, context=128).encode(RECORD, find_prompt("long", "chat"))


def test_texts_are_targets_after_the_raw_text_template(tokenizer):
    record = parse({"text": "the lazy dog"})
    example = Encoder(tokenizer, 256).encode(record, find_prompt("long", "alpaca"))
    assert labelled(example, tokenizer) == "the lazy dog"
    assert "proceed with the text completion" in tokenizer.decode(example.ids)
    bare = Encoder(tokenizer, 256).encode(record, find_prompt("none", "alpaca"))
    assert tokenizer.decode(bare.ids) == "the lazy dog"


@FORMATS
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("qwen3", {}), ("mistral", {}), ("mistral", {"sliding_window": 40}), ("opt", {"dropout": 0.0})],
)
def test_a_prefix_run_once_and_recomputed_activations_give_the_same_loss_and_gradients(
    tokenizer, form, model_type, settings
):
    model = tiny_model(model_type, max_position_embeddings=2048, **settings).train()
    model.lm_head.requires_grad_(False)
    records = [parse({"instruction": "say " * n, "output": "dog " * (8 - n)}) for n in (1, 4, 6)]
    (batch,) = batches(records, Encoder(tokenizer, 256), find_prompt("long", form))
    assert len(batch.prefix) > 100
    results = []
    for b, again in ((batch.unshared(), False), (batch, False), (batch, True), (batch.unshared(), True)):
        model.zero_grad()
        with recomputed(model, again):
            loss = target_loss(model, b) / batch.targets
            loss.backward()
        gradients = [p.grad.clone() for name, p in model.named_parameters() if "k_proj.weight" in name]
        results.append((loss.detach(), *gradients))
    for result in results[1:]:
        torch.testing.assert_close(result[0], results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result[1:], results[0][1:], rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_transformers_and_chunks_change_nothing(tokenizer, monkeypatch):
    model = tiny_model("llama", max_position_embeddings=512)
    model.lm_head.requires_grad_(False)
    weight = model.model.layers[2].mlp.down_proj.weight
    records = [parse({"instruction": w, "output": "dog " * n}) for w, n in (("say", 2), ("dog", 9))]
    (batch,) = batches(records, Encoder(tokenizer, 256), find_prompt("none", "chat"))
    assert len(batch.prefix) == 0
    expected = model(batch.ids, labels=batch.labels).loss * batch.targets
    expected.backward()
    for entries in (2**24, 300 * 4):
        gradient, weight.grad = weight.grad, None
        monkeypatch.setattr("compresso.train.LOGITS_AT_ONCE", entries)
        loss = target_loss(model, batch)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert float(target_loss(model, batch)) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_identical_records_still_leave_the_token_before_the_first_target():
    tokens = list(range(3, 60))
    from compresso.batches import Example

    example = Example(tokens, [IGNORE] * 40 + tokens[40:])
    batch = collate([example, example])
    assert len(batch.prefix) == 39
    assert int((batch.labels[:, 1:] != IGNORE).sum()) == 2 * 17


TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}",
        "<|start|>system\nbe small<|end|>\n",
    ),
    "llama 3": (
        "<bos>{% for m in messages %}<|start|>{{ m['role'] }}<|header|>\n\n{{ m['content'] }}<|end|>{% endfor %}",
        "<bos><|start|>system<|header|>\n\nbe small<|end|>",
    ),
    "no system turn": (
        "<bos>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}",
        "<bos><|start|>user\nbe small\n\n",
    ),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_system_turn_alone_ends_where_the_users_begins(tokenizer, kind):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|header|>"]})
    other.chat_template, expected = TEMPLATES[kind]
    encoder = Encoder(other, 256)
    assert encoder.system_turn(CollaborativePrompt("mine", "be small\n\n", "chat")) == expected
    assert encoder.system_turn(find_prompt("none", "chat")) == ""
    ids = encoder.tokens_of_prefix(expected)
    assert other.decode(ids) == expected
