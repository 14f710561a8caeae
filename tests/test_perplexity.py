"""Perplexity by hand, windows, and the cost of a model."""

import itertools
import math

import pytest
import torch

from compresso.cost import measure_costs
from compresso.extract import extract
from compresso.perplexity import perplexity, text_windows, window_nats
from compresso.texts import read_text
from tiny import random_plan, tiny_model


def by_hand(model, rows):
    """Of every token but the first of its row, one after the other."""
    total, count = 0.0, 0
    for row in rows.tolist():
        for i in range(1, len(row)):
            with torch.no_grad():
                logits = model(torch.tensor([row[:i]])).logits[0, -1].double()
            total -= float(torch.log_softmax(logits, -1)[row[i]])
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("prefix", [[], [5, 6, 7, 8]])
def test_perplexity_is_that_worked_out_token_by_token(prefix, monkeypatch):
    monkeypatch.setattr("compresso.perplexity.POSITIONS_AT_ONCE", 3)
    monkeypatch.setattr("compresso.perplexity.TOKENS_AT_ONCE", 16)
    model = tiny_model("llama")
    rows = torch.randint(3, 300, (5, 8), generator=torch.Generator().manual_seed(0))
    nats = window_nats(model, rows, prefix)
    assert len(nats) == 5
    if not prefix:
        assert perplexity(nats) == pytest.approx(by_hand(model, rows), rel=1e-5)
    else:
        whole = torch.cat([torch.tensor(prefix).expand(5, -1), rows], 1)
        with torch.no_grad():
            logits = model(whole).logits[:, len(prefix) : -1]
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)
        torch.testing.assert_close(torch.tensor(nats), expected.double(), rtol=0, atol=1e-5, check_dtype=False)


def test_windows_cover_the_text_without_overlap(tokenizer):
    text = "the quick brown fox jumps over a lazy dog " * 20
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = text_windows(text, tokenizer, None, 16)
    assert rows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert text_windows(text, tokenizer, 3, 16).shape == (3, 16)
    with pytest.raises(ValueError, match=f"only {len(ids)} tokens, at least 4096"):
        text_windows(text, tokenizer, None, 4096)
    assert text_windows(text, tokenizer, None, 4096, shorter=True).shape == (1, len(ids))


def test_local_texts_are_put_together_as_the_published_figures_were(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2_test.txt").write_text(" = A = \n\n Words . \n")
    (tmp_path / "text" / "c4.txt").write_text("one\ntwo\n")
    assert read_text("wikitext2", tmp_path) == (" = A = \n\n\n\n\n Words . \n", "wikitext2_test.txt")
    assert read_text("c4", tmp_path)[0] == "one\ntwo\n"
    with pytest.raises(FileNotFoundError, match=r"no file ptb\*.txt"):
        read_text("ptb", tmp_path)


def test_cost_of_a_model_and_a_smaller_one():
    model = tiny_model("llama")
    smaller = extract(model, random_plan(model, keep=0.4))
    costs = measure_costs({"dense": model, "pruned": smaller}, batch=2, context=16, new_tokens=4, repeats=2)
    dense, pruned = costs["dense"], costs["pruned"]
    assert dense["parameters"] == sum(p.numel() for p in model.parameters()) > pruned["parameters"]
    assert dense["kv_bytes_per_token"] == 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, float32
    assert pruned["kv_bytes_per_token"] < dense["kv_bytes_per_token"]
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds"):
        assert 0 < dense[key]["min"] <= dense[key]["median"] <= dense[key]["max"]
    assert dense["peak_memory_bytes"]["min"] >= dense["memory_bytes"]


def test_a_context_beyond_the_models_positions_is_shortened():
    model = tiny_model("llama", max_position_embeddings=40)
    assert measure_costs({"m": model}, context=256, new_tokens=8, repeats=1)["m"]["context"] == 32


def test_a_peak_that_one_round_cannot_measure_is_left_out(monkeypatch):
    answers = itertools.cycle([True, True, False])
    monkeypatch.setattr("compresso.cost._reset_peak", lambda: next(answers))
    found = measure_costs({"m": tiny_model("llama")}, context=8, new_tokens=2, repeats=2)["m"]
    assert "peak_memory_bytes" not in found
    assert found["decode_tokens_per_second"]["median"] > 0
