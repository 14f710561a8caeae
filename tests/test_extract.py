"""The smaller model computes what the gated one computed; for every family and kind of width."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from compresso import checkpoint, extract
from compresso.families import FAMILIES, family_of
from compresso.masks import gated
from compresso.plan import Plan
from compresso.prefix import for_rows, run_prefix, with_cache
from compresso.shape import count_prunable, describe, prunable_parameters, sparsity
from tiny import allowed, random_plan, tiny_model

VARIANTS = [
    *((name, {}) for name in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),  # multi-head
    ("qwen2", {"num_key_value_heads": 1}),  # multi-query
    ("qwen2", {"head_dim": None}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("mistral", {"tie_word_embeddings": True}),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 6, "num_experts_per_tok": 3}),
]
variants = pytest.mark.parametrize(("model_type", "settings"), VARIANTS)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def gates_of(model, keep: dict[str, list[int]]) -> Plan:
    """A plan that keeps these many units of every layer, from the first on, or as few more as the family allows."""
    shape, family = describe(model), family_of(model.config.model_type)
    gates = {}
    for unit, kept in keep.items():
        kept = [allowed(shape, family, unit, n) for n in kept]
        if unit in family.fixed:
            kept = [size if n else 0 for n, size in zip(kept, shape.sizes(unit), strict=True)]
        parts = [(torch.arange(size) < n).double() for size, n in zip(shape.sizes(unit), kept, strict=True)]
        gates[unit] = torch.cat(parts)
    return Plan(shape, gates)


@variants
@pytest.mark.parametrize("seed", range(4))
def test_extracted_model_computes_what_the_gated_model_computed(model_type, settings, seed, token_ids):
    model = tiny_model(model_type, **settings)
    plan = random_plan(model, seed=seed, soft=seed % 2 == 1)
    with gated(model, plan.shape, plan.gates):
        expected = logits(model, token_ids)
    smaller = extract(model, plan)
    torch.testing.assert_close(logits(smaller, token_ids), expected, rtol=0, atol=1e-5)
    assert (expected - logits(model, token_ids)).abs().max() > 0.1, "the gates did nothing"


@variants
def test_expected_parameters_at_closed_and_open_gates_are_an_exact_count(model_type, settings):
    model = tiny_model(model_type, **settings)
    for seed in range(3):
        plan = random_plan(model, seed=seed)
        smaller = extract(model, plan)
        assert int(prunable_parameters(plan.shape, plan.gates)) == count_prunable(smaller)
        assert plan.sparsity == pytest.approx(1 - count_prunable(smaller) / count_prunable(model), abs=1e-12)
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@variants
def test_the_open_plan_is_the_identity_bit_for_bit(model_type, settings, token_ids):
    model = tiny_model(model_type, **settings)
    same = extract(model, Plan(describe(model), {}))
    assert type(same) is type(model)
    assert {n: tuple(t.shape) for n, t in same.state_dict().items()} == {
        n: tuple(t.shape) for n, t in model.state_dict().items()
    }
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(same, token_ids), logits(model, token_ids))


@variants
def test_extracting_twice_equals_extracting_the_product_once(model_type, settings, token_ids):
    model = tiny_model(model_type, **settings)
    first = random_plan(model, keep=0.8, seed=1)
    middle = extract(model, first)
    second = random_plan(middle, keep=0.7, seed=2)
    twice = extract(middle, second)

    product, kept_layers = copy.deepcopy(first.gates), [i for i, w in enumerate(first.widths()) if any(w.values())]
    for unit in {"kv_group", "intermediate", "hidden", "expert"} & product.keys():
        outer = list(product[unit].split(first.shape.sizes(unit)))
        inner = second.gates[unit].split(second.shape.sizes(unit))
        for j, i in enumerate(kept_layers if unit != "hidden" else [0]):
            outer[i][outer[i] > 0] = inner[j]
        product[unit] = torch.cat(outer)
    once = extract(model, Plan(first.shape, product))
    torch.testing.assert_close(logits(twice, token_ids), logits(once, token_ids), rtol=0, atol=1e-5)


@variants
@pytest.mark.parametrize("equal", [True, False])
def test_saved_and_loaded_gives_the_same_logits_bit_for_bit(model_type, settings, equal, token_ids, tmp_path):
    model = tiny_model(model_type, **settings)
    groups = describe(model).layers[0].num_key_value_heads
    widths = (
        {"kv_group": [1] * 3, "intermediate": [30] * 3}
        if equal
        else {"kv_group": [groups, 0, 1], "intermediate": [30, 17, 0]}
    )
    smaller = extract(model, gates_of(model, {**widths, "hidden": [23]}))
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded, token_ids), logits(smaller, token_ids))
    choosy = (
        settings.get("mlp_bias") or model_type.startswith(("gemma", "arcee")) or FAMILIES[model_type].derived_head_dim
    )
    assert loaded.config.model_type.startswith("compresso_") == (not equal or choosy)


def test_a_head_pruned_llama_is_written_as_a_stock_mistral(token_ids):
    model = tiny_model("llama")
    smaller = extract(model, gates_of(model, {"hidden": [31]}))
    assert smaller.config.model_type == "mistral"
    assert smaller.config.sliding_window is None
    assert smaller.config.rope_parameters == model.config.rope_parameters


def test_layers_without_anything_left_disappear(token_ids):
    model = tiny_model("llama")
    plan = gates_of(model, {"attention": [1, 0, 1], "mlp": [1, 0, 1]})
    smaller = extract(model, plan)
    assert smaller.config.num_hidden_layers == 2
    assert smaller.config.model_type == "llama"
    with gated(model, plan.shape, plan.gates):
        torch.testing.assert_close(logits(smaller, token_ids), logits(model, token_ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_equals_generation_without(model_type, cache, token_ids):
    model = tiny_model(model_type)
    smaller = extract(model, gates_of(model, {"kv_group": [0, 1, 2], "intermediate": [40, 0, 7]}))
    mask = torch.ones_like(token_ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = smaller.generate(token_ids, attention_mask=mask, cache_implementation=cache, **settings)
    ids = token_ids
    for _ in range(6):
        ids = torch.cat([ids, logits(smaller, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("groups", [[0, 1, 2], [2, 1, 0]])
def test_tokens_that_follow_a_cached_prefix_see_all_of_it(model_type, groups, token_ids):
    model = tiny_model(model_type)
    smaller = extract(model, gates_of(model, {"kv_group": groups, "intermediate": [40, 0, 7]}))
    prefix = torch.arange(5, 25)
    whole = logits(smaller, torch.cat([prefix.expand(2, -1), token_ids], 1))[:, len(prefix) :]
    with torch.no_grad():
        cache = for_rows(run_prefix(smaller, prefix, smaller.config), 2)
        parts = smaller(token_ids, **with_cache(smaller, cache)).logits
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_attention_implementation_reaches_every_layer(token_ids):
    model = tiny_model("llama")
    smaller = extract(model, gates_of(model, {"kv_group": [2, 1, 2]}))
    expected = logits(smaller, token_ids)
    smaller.set_attn_implementation("eager")
    out = smaller(token_ids, output_attentions=True)
    assert [a.shape[1] for a in out.attentions] == [4, 2, 4]
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)


def test_a_plan_of_another_shape_is_refused():
    plan = random_plan(tiny_model("llama"))
    with pytest.raises(ValueError, match="3 layers"):
        extract(tiny_model("llama", num_hidden_layers=2), plan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before = False; only one with True"),
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16; only one with 32"),
    ],
)
def test_an_opt_of_another_kind_is_refused(settings, message, tmp_path):
    model = tiny_model("opt", **settings)
    with pytest.raises(ValueError, match=message):
        describe(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.find(str(tmp_path))


def test_sparsity_of_probabilities_is_the_outer_product_sum():
    shape = describe(tiny_model("llama"))
    torch.manual_seed(0)
    gates = {u: torch.rand(g.shape, dtype=torch.float64) for u, g in shape.open_gates().items()}
    total = left = 0.0
    groups, channels = (
        gates["kv_group"].split(shape.sizes("kv_group")),
        gates["intermediate"].split(shape.sizes("intermediate")),
    )
    for i, layer in enumerate(shape.layers):
        total += 32 * (2 * layer.rows_per_group + 3 * 48)
        left += layer.rows_per_group * float(torch.outer(gates["hidden"], groups[i]).sum() * gates["attention"][i])
        left += 3 * float(torch.outer(gates["hidden"], channels[i]).sum() * gates["mlp"][i])
    assert float(sparsity(shape, gates)) == pytest.approx(1 - left / total, abs=1e-12)


def test_counts_of_llama_7b():
    from compresso.shape import LayerShape, ModelShape

    shape = ModelShape(4096, 3, (LayerShape(32, 1, 128, 11008),) * 32)
    assert int(prunable_parameters(shape, {})) == 6_476_005_376
    assert sum(sum(shape.sizes(u)) for u in ("kv_group", "intermediate", "hidden")) == 357_376
