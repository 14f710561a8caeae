"""A model with zeros around its matrices computes what it did."""

from dataclasses import replace

import pytest
import torch

from compresso import extract
from compresso.families import FAMILIES
from compresso.padding import alike, largest, pad
from compresso.shape import LayerShape, describe
from test_extract import gates_of, logits
from tiny import tiny_model

UNEQUAL = {"kv_group": [2, 0, 1], "intermediate": [40, 17, 0]}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_padded_to_equal_widths_a_model_is_a_stock_one_that_computes_the_same(model_type, token_ids):
    smaller = extract(tiny_model(model_type), gates_of(tiny_model(model_type), {**UNEQUAL, "hidden": [24]}))
    wide = alike(smaller)
    padded = pad(smaller, wide)
    assert padded.config.model_type == model_type
    assert describe(padded).layers == tuple(wide)
    if not FAMILIES[model_type].derived_head_dim:
        assert wide[0] == largest(describe(smaller).layers)
    torch.testing.assert_close(logits(padded, token_ids), logits(smaller, token_ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"attention_bias": True, "mlp_bias": True}, {}])
def test_query_heads_are_added_inside_their_groups(settings, token_ids):
    model = tiny_model("llama", **settings)
    smaller = extract(model, gates_of(model, {"kv_group": [2, 1, 1], "intermediate": [40, 17, 20]}))
    layers = [replace(layer, queries_per_group=6 // layer.num_key_value_heads) for layer in describe(smaller).layers]
    padded = pad(smaller, layers)
    assert [layer.self_attn.q_proj.out_features for layer in padded.model.layers] == [48] * 3
    torch.testing.assert_close(logits(padded, token_ids), logits(smaller, token_ids), rtol=0, atol=1e-5)


def test_a_model_that_has_the_widths_stays_as_it_is(token_ids):
    model = tiny_model("llama")
    assert pad(model, describe(model).layers) is model


def test_a_layer_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"layer 0 is LayerShape\(num_key_value_heads=2"):
        pad(tiny_model("llama"), [LayerShape(1, 2, 8, 48)] * 3)
