"""Mixtures of experts: what is cut computes what the gates did, and what a router does without an expert."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import compresso
from compresso import Plan, PruneConfig, describe, extract, gguf_file
from compresso import plan as plans
from compresso.allocation import equally_wide, uniform
from compresso.calibration import gate_gradients
from compresso.families import FAMILIES
from compresso.masks import Gates, gated
from compresso.mixtures import idle, sort_channels
from compresso.plan import largest_sparsity, select
from compresso.prepare import with_units
from compresso.shape import LayerShape, ModelShape, count_prunable, prunable_parameters
from compresso.streamed import extract_files
from compresso.verified import save_checked
from compresso.widths import Widths
from test_extract import gates_of, logits
from test_streamed import saved, stored
from tiny import QUICK, tiny_model

MIXTURES = [name for name, family in FAMILIES.items() if family.router]
mixtures = pytest.mark.parametrize("model_type", MIXTURES)
QWEN3_30B = ModelShape(2048, 3, (LayerShape(4, 8, 128, 768, 128),) * 48, 8)
SIX_LAYERS = replace(QWEN3_30B, layers=QWEN3_30B.layers[:6])


def dense_output(model, layer, hidden, kept):
    """The mixture of a layer for (N, H), written out: the two best of the kept experts, their weights summing to 1."""
    block = model.model.layers[layer].mlp
    scores = hidden @ block.gate.weight[kept].T
    best = scores.topk(2)
    weights = best.values.softmax(-1)
    out = torch.zeros_like(hidden)
    for n, row in enumerate(hidden):
        for weight, e in zip(weights[n], best.indices[n], strict=True):
            gate, up = (block.experts.gate_up_proj[kept[e]] @ row).chunk(2)
            out[n] += weight * (block.experts.down_proj[kept[e]] @ (torch.nn.functional.silu(gate) * up))
    return out


@mixtures
def test_without_an_expert_the_next_best_is_chosen(model_type):
    model = tiny_model(model_type)
    plan = gates_of(model, {})
    gates = torch.ones(12, dtype=torch.float64)
    gates[[4, 6]] = 0  # the first and third expert of the second layer
    plan = Plan(plan.shape, {"expert": gates})
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    smaller = extract(model, plan)
    assert smaller.model.layers[1].mlp.gate.weight.shape == (2, 32)
    expected = dense_output(model, 1, hidden, torch.tensor([1, 3]))
    with torch.no_grad():
        torch.testing.assert_close(smaller.model.layers[1].mlp(hidden[None])[0], expected, rtol=0, atol=1e-5)
        before = model.model.layers[1].mlp(hidden[None])[0]
        torch.testing.assert_close(before, dense_output(model, 1, hidden, torch.arange(4)), rtol=0, atol=1e-5)
        with gated(model, plan.shape, plan.gates):
            torch.testing.assert_close(model.model.layers[1].mlp(hidden[None])[0], expected, rtol=0, atol=1e-5)


@mixtures
def test_sorted_channels_compute_the_same_in_order_of_their_norm(model_type, token_ids):
    model = tiny_model(model_type)
    expected = logits(model, token_ids)
    router = [layer.mlp.gate.weight.clone() for layer in model.model.layers]
    sort_channels(model)
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=0, atol=1e-5)
    for layer, before in zip(model.model.layers, router, strict=True):
        assert torch.equal(layer.mlp.gate.weight, before)
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.detach().chunk(2, 1)
        norms = gate.square().sum(2) + up.square().sum(2) + experts.down_proj.detach().square().sum(1)
        assert (norms.diff() <= 0).all()
    again = {name: value.clone() for name, value in model.state_dict().items()}
    sort_channels(model)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_every_process_goes_on_from_what_one_of_them_saves(tmp_path):
    """In the numbers that the checkpoint holds, channels in their order."""
    model = tiny_model(MIXTURES[0])
    expected = sort_channels(copy.deepcopy(model).bfloat16()).float().state_dict()
    others = SimpleNamespace(
        writes=False,
        facts={"stored_dtype": torch.bfloat16},
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
    )
    save_checked(others, model, tmp_path / "model", {})
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(tmp_path.iterdir())


@mixtures
def test_gates_between_closed_and_open_weigh_the_router_and_give_gradients(model_type, token_ids):
    """Also where fewer experts are open than a token goes to, or none."""
    model = tiny_model(model_type).requires_grad_(False)
    shape = describe(model)
    gates = Gates(model, shape)
    z = torch.tensor([0.5, 1.0, 0.0, 1e-6] + [0.0, 0.7, 0.0, 0.0] + [0.0] * 4, requires_grad=True)
    channels = torch.full((72,), 0.9, requires_grad=True)
    gates.set({"expert": z, "intermediate": channels})
    loss = model(token_ids, labels=token_ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
    assert (z.grad[[0, 1]] != 0).all()
    assert channels.grad[:24].abs().min() > 0
    assert (channels.grad[48:] == 0).all()
    hidden = torch.randn(5, 32)
    logits_before = hidden @ model.model.layers[0].mlp.gate.weight.T
    assert torch.equal(model.model.layers[2].mlp(hidden[None])[0], torch.zeros(5, 32))
    expected = (logits_before + torch.tensor([0.5, 1.0, 0.0, 1e-6]).log()).softmax(-1).topk(2)
    _, weights, chosen = model.model.layers[0].mlp.gate(hidden)
    assert torch.equal(chosen, expected.indices)
    torch.testing.assert_close(weights, expected.values / expected.values.sum(-1, keepdim=True))


def test_gradients_of_gates_are_those_of_one_record_after_the_other(encoder_batches):
    model = tiny_model("qwen3_moe", max_position_embeddings=512).requires_grad_(False)
    first, second = gate_gradients(model, encoder_batches)
    assert {unit: len(values) for unit, values in first.items()} == {"kv_group": 6, "intermediate": 72, "expert": 12}
    one_by_one = [record for batch in encoder_batches for record in batch.unshared().rows()]
    again = gate_gradients(model, one_by_one)
    for unit in first:
        torch.testing.assert_close(first[unit], again[0][unit], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(second[unit], again[1][unit], rtol=1e-4, atol=1e-7)
    assert (second["expert"] > 0).sum() > 6


@pytest.fixture
def encoder_batches(tokenizer):
    from compresso.batches import Encoder, batches
    from compresso.prompts import find_prompt
    from compresso.records import parse
    from documents import WORDS

    records = [parse({"instruction": f"say {WORDS[i]}", "output": " ".join(WORDS[: 2 + i])}) for i in range(6)]
    return batches(records, Encoder(tokenizer, 48, 512), find_prompt("short", "alpaca"), 2)


@pytest.mark.parametrize("target", [0.05, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("units", [("kv_group", "intermediate", "expert"), ("expert",), ("expert", "mlp", "hidden")])
def test_every_layer_keeps_as_many_experts_as_a_token_goes_to(units, target):
    generator = torch.Generator().manual_seed(0)
    scores = {unit: torch.randn(sum(SIX_LAYERS.sizes(unit)), generator=generator) for unit in units}
    plan = select(SIX_LAYERS, scores, target, 8)
    assert plan.sparsity == pytest.approx(target, abs=0.01)
    assert all(len(kept) >= 8 for kept in plan.keep["expert"] if len(kept))
    if "mlp" not in units:
        assert all(len(kept) >= 8 for kept in plan.keep["expert"])
    if "kv_group" in units:
        assert largest_sparsity(SIX_LAYERS, units, 8) > 0.95
    left = [
        LayerShape(w["num_key_value_heads"], 8, 128, w["intermediate_size"], w["num_experts"]) for w in plan.widths()
    ]
    assert plan.sparsity == pytest.approx(
        1
        - len(plan.keep["hidden"][0])
        * sum(map(SIX_LAYERS.rows, left))
        / (2048 * sum(map(SIX_LAYERS.rows, SIX_LAYERS.layers)))
    )


def test_counts_of_qwen3_30b():
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128
    )
    model = compresso.streamed.shapes_of(config)
    assert describe(model) == QWEN3_30B
    assert count_prunable(model) == int(prunable_parameters(QWEN3_30B, {})) == 48 * 2048 * (72 * 128 + 128 * 3 * 768)
    assert idle(model) == 48 * 120 * 3 * 768 * 2048


def test_a_plan_of_too_few_or_half_open_experts_is_refused():
    shape = describe(tiny_model("qwen3_moe"))
    few = torch.tensor([1.0] * 8 + [0, 0, 1, 0])
    with pytest.raises(ValueError, match="layer 2 keeps 1 of its experts, and each token goes to 2"):
        Plan(shape, {"expert": few})
    with pytest.raises(ValueError, match="expert gates are 0 or 1"):
        Plan(shape, {"expert": torch.full((12,), 0.5)})
    plan = Plan(shape, {"expert": torch.tensor([1.0] * 8 + [0.0] * 4)})
    assert plan.gates["mlp"].tolist() == [1, 1, 0]
    assert not plan.gates["intermediate"][48:].any()


@mixtures
def test_equal_widths_are_chosen_of_all_numbers_of_experts(model_type):
    shape = describe(tiny_model(model_type))
    open_probability = {"intermediate": torch.ones(72), "expert": torch.tensor([1.0, 0.0, 1.0, 1.0] * 3)}
    plan = equally_wide(shape, open_probability, 0.2, Widths(uniform=True, round_to=8))
    assert [kept.tolist() for kept in plan.keep["expert"]] == [[0, 2, 3]] * 3
    assert len({tuple(w.values()) for w in plan.widths()}) == 1
    both = uniform(shape, open_probability, 0.5, 8)
    assert {w["num_experts"] for w in both.widths()} == {3}


@mixtures
def test_files_of_equal_widths_are_those_of_the_stock_class(model_type, tokenizer, tmp_path, monkeypatch):
    model = sort_channels(stored(model_type, tokenizer, tmp_path / "old", "40KB"))
    keep = {"expert": [3] * 3, "intermediate": [16] * 3, "kv_group": [1] * 3}
    plan = gates_of(model, keep)
    monkeypatch.setattr(compresso.streamed, "SHARD_BYTES", 30_000)
    extract_files(str(tmp_path / "old"), saved(plan, tmp_path / "run"), tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())["weight_map"]
    expected = extract(model, plan)
    expected.save_pretrained(tmp_path / "in memory")
    written: dict = {}
    for file in (tmp_path / "new").glob("*.safetensors"):
        here = load_file(file)
        assert all(index[name] == file.name for name in here)
        written |= here
    told = load_file(tmp_path / "in memory" / "model.safetensors")
    assert written.keys() == told.keys()
    assert all(torch.equal(value, told[name]) for name, value in written.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.config.model_type == model_type
    assert loaded.config.num_experts == loaded.config.num_local_experts == 3


def sorted_as_loaded(folder):
    return compresso.load(folder)[0].state_dict().items()


@pytest.mark.parametrize(
    ("model_type", "tune", "shape"),
    [("qwen3_moe", "lora", "free"), ("qwen3_moe", "full", "uniform"), ("mixtral", "full", "free")],
)
def test_a_mixture_from_end_to_end(model_type, tune, shape, tokenizer, data, tmp_path):
    tiny_model(model_type, max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    summary = compresso.prune(
        model=str(tmp_path / "dense"),
        data=str(data),
        output=str(tmp_path / "run"),
        target_sparsity=0.3,
        tune=tune,
        shape=shape,
        gradient_checkpointing=tune == "full",
        **{**QUICK, "distill": 0.3},
    )
    assert summary["units"] == ["kv_group", "intermediate", "expert"]
    assert summary["sparsity"] == pytest.approx(0.3, abs=0.03)
    assert summary["max_logit_difference"] < 1e-3
    assert all(width["num_experts"] >= 2 for width in summary["widths"])
    assert all(width["intermediate_size"] % 8 == 0 for width in summary["widths"])
    saved_as = AutoConfig.from_pretrained(tmp_path / "run" / "model").model_type
    assert saved_as == model_type or shape == "free"
    told = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert told[FAMILIES[model_type].num_experts] == max(width["num_experts"] for width in summary["widths"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "experts" in page
    for name in ("cut", "model"):  # what loads is what training went on with, channel by channel
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).state_dict()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in sorted_as_loaded(tmp_path / "run" / name))
    again = compresso.recover(str(tmp_path / "run"), recover_steps=2)
    assert again["loss"]["cut"] == summary["loss"]["cut"]
    assert plans.load(tmp_path / "run").sparsity == summary["sparsity"]


def test_units_that_are_asked_for_are_not_added_to():
    asked = with_units(PruneConfig(units="kv_group,intermediate"), "mixtral")
    assert asked.units == ("kv_group", "intermediate")
    assert with_units(PruneConfig(), "mixtral").units == ("kv_group", "intermediate", "expert")
    assert with_units(PruneConfig(method="minitron"), "llama").units == ("kv_group", "intermediate", "hidden")


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor", "taylor2", "fisher", "shortgpt"])
def test_rivals_that_score_weights_know_experts(method, tokenizer, data, tmp_path):
    tiny_model("qwen3_moe", max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    settings = {**QUICK, "recover_steps": 0, "model": str(tmp_path / "dense"), "data": str(data)}
    summary = compresso.prune(**settings, output=str(tmp_path / "run"), target_sparsity=0.34, method=method)
    assert summary["sparsity"] == pytest.approx(0.34, abs=0.08)
    assert summary["max_logit_difference"] < 1e-3


@pytest.mark.parametrize("settings", [{"method": "wanda"}, {"method": "flap"}, {"method": "magnitude", "refit": True}])
def test_rivals_that_measure_what_experts_do_not_show_are_refused(settings, tokenizer, data, tmp_path):
    tiny_model("qwen3_moe", max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=r"experts of a qwen3_moe do not show .* use --method l0, fisher"):
        compresso.prune(**QUICK, model=str(tmp_path / "dense"), data=str(data), output=str(output), **settings)
    assert not output.exists()


def test_what_is_no_mixture_or_only_partly_one_is_refused(checkpoint, tokenizer, data, tmp_path):
    with pytest.raises(ValueError, match="a llama has no experts"):
        compresso.prune(**QUICK, model=str(checkpoint), data=str(data), output=str(tmp_path / "run"), units="expert")
    stored("qwen3_moe", tokenizer, tmp_path / "mixed", decoder_sparse_step=2)
    with pytest.raises(ValueError, match="decoder_sparse_step = 2; only one with 1"):
        compresso.load(str(tmp_path / "mixed"))
    model = tiny_model("mixtral")
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "f32", "tiny")
    with pytest.raises(ValueError, match=r"holds a mixture of experts.*use the safetensors"):
        compresso.load(str(tmp_path / "model.gguf"))
    with pytest.raises(ValueError, match=r"keeps 17 intermediate channels, .* multiples of 8"):
        extract(model, Plan(describe(model), {"intermediate": (torch.arange(72) % 24 < 17).double()}))
