"""Scores against ten-line references, on planted structure, and what becomes of them."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from compresso import PruneConfig, extract, scores
from compresso.allocation import standardised, uniform, whole_layers
from compresso.batches import IGNORE
from compresso.calibration import (
    block_influence,
    calibration_batches,
    input_moments,
    output_paths,
    real_tokens,
    weight_gradients,
)
from compresso.config import SCORED
from compresso.importance import fisher
from compresso.masks import gated
from compresso.methods import METHODS
from compresso.plan import Plan
from compresso.prepare import prepare, with_units
from compresso.repair import add_biases, kept_columns, refit
from compresso.self_data import write_texts
from compresso.shape import LayerShape, ModelShape, describe
from compresso.train import target_loss
from tiny import random_plan, tiny_model

ONE_SHOT = [name for name in METHODS if name != "l0"]


@pytest.fixture
def bench(request, tmp_path, checkpoint, data, tokenizer):
    """Of a tiny Llama, or of the family that a test asks for."""
    model_type = getattr(request, "param", "llama")
    if model_type != "llama":
        checkpoint = tmp_path / "dense"
        tiny_model(model_type, max_position_embeddings=512).save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
    return prepare(
        PruneConfig(
            model=str(checkpoint),
            data=str(data),
            output=str(tmp_path / "run"),
            prompt="short",
            precision="fp32",
            device="cpu",
            max_length=48,
            calibration_records=11,
            validation_records=4,
            target_sparsity=0.3,
        )
    )


def inputs_of(bench, path):
    """All real inputs of a matrix, record by record without a shared prompt: (N, in)."""
    seen = []
    handle = bench.model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    for batch in calibration_batches(bench):
        whole = batch.unshared()
        for row, real in zip(whole.ids, real_tokens(whole), strict=True):
            with torch.no_grad():
                bench.model(row[real][None])
    handle.remove()
    return [x.reshape(-1, x.shape[-1]) for x in seen]


@pytest.mark.parametrize("prompt", ["none", "short"])
@pytest.mark.parametrize(
    ("bench", "path"),
    [("llama", "model.layers.1.mlp.down_proj"), ("opt", "model.decoder.layers.1.fc2")],  # which gets all rows in one
    indirect=["bench"],
)
def test_moments_are_those_of_the_real_tokens(bench, path, prompt):
    bench.prompt = replace(bench.prompt, body="" if prompt == "none" else bench.prompt.body)
    given = calibration_batches(bench)
    found = input_moments(bench.model, given, gram=True)[path]
    rows = []
    every = iter(inputs_of(bench, path))
    for batch in given:  # a shared prompt counts once a batch
        for i in range(len(batch.ids)):
            x = next(every)
            rows.append(x if i == 0 else x[len(batch.prefix) :])
    x = torch.cat(rows)
    assert found.tokens == len(x)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, x.var(0, correction=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-4, atol=1e-3)


def test_wanda_and_flap_equal_their_formulas(bench):
    """Computed by hand from all inputs at once."""
    bench.prompt = replace(bench.prompt, body="")
    wanda, flap = scores.wanda(bench), scores.flap(bench)
    sizes = describe(bench.model).sizes("intermediate")
    for i, (w, f) in enumerate(zip(wanda["intermediate"].split(sizes), flap["intermediate"].split(sizes), strict=True)):
        x = torch.cat(inputs_of(bench, f"model.layers.{i}.mlp.down_proj"))
        weight = bench.model.model.layers[i].mlp.down_proj.weight
        torch.testing.assert_close(w, (weight.abs() * x.norm(dim=0)).mean(0).detach(), rtol=1e-4, atol=1e-5)
        columns = (weight.square() * x.var(0, correction=0)).sum(0).detach()
        torch.testing.assert_close(f, torch.tensor(stats.zscore(columns.numpy(), ddof=1)), rtol=1e-3, atol=1e-4)
        x = torch.cat(inputs_of(bench, f"model.layers.{i}.self_attn.o_proj"))
        weight = bench.model.model.layers[i].self_attn.o_proj.weight
        heads = (weight.abs() * x.norm(dim=0)).mean(0).view(2, 2 * 8).mean(1)  # two groups of two heads of eight
        torch.testing.assert_close(wanda["kv_group"][2 * i : 2 * i + 2], heads.detach(), rtol=1e-4, atol=1e-5)
        columns = (weight.square() * x.var(0, correction=0)).sum(0).detach()
        heads = torch.tensor(stats.zscore(columns.square().numpy(), ddof=1)).view(2, 2 * 8).mean(1)
        torch.testing.assert_close(flap["kv_group"][2 * i : 2 * i + 2], heads, rtol=1e-3, atol=1e-4)


def test_minitron_equals_its_formulas(bench):
    """Mean along each record, norm along the records; prompt and all."""
    bench.config = replace(bench.config, method="minitron")
    found, model = scores.minitron(bench), bench.model
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    norms = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(model.model.norm)
    rows, seen = [batch.ids[real_tokens(batch)] for batch in calibration_batches(bench, single=True)], {}
    handles = [
        module.register_forward_hook(lambda m, args, out: seen.update({m: (args[0][0], out[0])}))
        for module in (attention.o_proj, mlp.down_proj, *norms)
    ]
    groups, channels, hidden = [], [], []
    for ids in rows:
        with torch.no_grad():
            model(ids[None])
        groups.append(seen[attention.o_proj][0].view(-1, 2, 16).norm(dim=-1).mean(0))
        channels.append(seen[mlp.down_proj][0].abs().mean(0))
        hidden.append(torch.stack([seen[norm][1].abs().mean(0) for norm in norms]))
    for handle in handles:
        handle.remove()
    assert len(rows) == 11
    torch.testing.assert_close(found["kv_group"][2:4], torch.stack(groups).norm(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["intermediate"][48:96], torch.stack(channels).norm(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["hidden"], torch.stack(hidden).norm(dim=0).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_second_order_is_of_single_records(bench, batch_size):
    bench.config = replace(bench.config, batch_size=batch_size)
    found = scores.taylor_second(bench)["intermediate"][:48]
    matrix = bench.model.model.layers[0].mlp
    total = 0
    weights = (matrix.gate_proj.weight, matrix.up_proj.weight, matrix.down_proj.weight)
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    given = calibration_batches(bench, single=True)
    for batch in given:
        gradients = torch.autograd.grad(target_loss(bench.model, batch) / batch.targets, weights)
        for i, gradient in enumerate(gradients):
            first[i] += gradient / len(given)
            second[i] += gradient.square() / len(given)
    for w, g, h, dim in zip(weights, first, second, (1, 1, 0), strict=True):
        total = total + (w * g - w.square() * h / 2).abs().sum(dim)
    torch.testing.assert_close(found, total.detach(), rtol=1e-3, atol=1e-7)


def test_taylor_equals_autograd(bench):
    found = scores.taylor(bench)
    model, given = bench.model, calibration_batches(bench)
    (sum(target_loss(model, batch) / batch.targets for batch in given) / len(given)).backward()
    sizes = describe(model).sizes("intermediate")
    for i, part in enumerate(found["intermediate"].split(sizes)):
        mlp, attention = model.model.layers[i].mlp, model.model.layers[i].self_attn
        by_hand = sum((m.weight * m.weight.grad).abs().sum(1) for m in (mlp.gate_proj, mlp.up_proj))
        by_hand = by_hand + (mlp.down_proj.weight * mlp.down_proj.weight.grad).abs().sum(0)
        torch.testing.assert_close(part, by_hand.detach(), rtol=1e-4, atol=1e-6)
        rows = [
            (m.weight * m.weight.grad).abs().sum(1).view(2, -1).sum(1) for m in (attention.q_proj, attention.k_proj)
        ]
        rows.append((attention.v_proj.weight * attention.v_proj.weight.grad).abs().sum(1).view(2, -1).sum(1))
        rows.append((attention.o_proj.weight * attention.o_proj.weight.grad).abs().sum(0).view(2, -1).sum(1))
        torch.testing.assert_close(found["kv_group"][2 * i : 2 * i + 2], sum(rows).detach(), rtol=1e-4, atol=1e-6)


def test_fisher_is_the_mean_square_of_each_records_gradient_without_the_prompt(bench):
    bench.config = replace(bench.config, own_texts=0)
    found = fisher(bench)["intermediate"]
    given, shape = calibration_batches(bench, alone=True), describe(bench.model)
    rows = [ids for batch in given for ids in batch.ids]
    records = [labels for batch in given for labels in batch.labels]
    assert len(rows) == 11
    assert not any("undergoing" in bench.tokenizer.decode(ids) for ids in rows)
    assert all("undergoing" in bench.tokenizer.decode(b.unshared().ids[0]) for b in calibration_batches(bench))
    mean_targets = sum(int((labels != IGNORE).sum()) for labels in records) / len(records)
    squares = torch.zeros(sum(shape.sizes("intermediate")))
    for ids, labels in zip(rows, records, strict=True):
        gate = torch.ones(len(squares), requires_grad=True)
        with gated(bench.model, shape, {"intermediate": gate}):
            logits = bench.model(ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        squares += torch.autograd.grad(loss / mean_targets, gate)[0].square() / len(records)
    torch.testing.assert_close(found, squares / shape.mlp_matrices, rtol=1e-3, atol=1e-9)


def test_what_only_the_models_own_texts_ask_for_counts(bench):
    on_records = fisher(replace(bench, config=replace(bench.config, own_texts=0)))
    bench.config = replace(bench.config, own_texts=3)
    found = fisher(bench)
    assert all(torch.equal(found[unit], again) for unit, again in fisher(bench).items())
    for unit, values in found.items():
        assert (values > 0).all()
        assert not torch.equal(values.argsort(), on_records[unit].argsort())


@pytest.mark.parametrize(
    ("third", "special", "expected"),
    [
        ("<bos>", {"bos_token": "<bos>", "eos_token": "<eos>"}, "<bos>"),
        (
            "<|endoftext|>",
            {"bos_token": "<pad>", "eos_token": "<eos>"},
            "<|endoftext|>",
        ),  # a chat model's own BOS and EOS
        ("<bos>", {"eos_token": "<eos>"}, "<eos>"),
    ],
)
def test_own_texts_begin_as_training_texts_did(bench, tokenizer, third, special, expected):
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace("<bos>", third))
    bench.encoder.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    texts = write_texts(bench.model, bench.encoder, 2, 3, seed=0)
    assert bench.encoder.tokenizer.convert_ids_to_tokens(texts[:, 0].tolist()) == [expected] * 2


def test_own_texts_follow_the_seed(bench):
    texts = write_texts(bench.model, bench.encoder, 40, 12, seed=0)
    assert texts.shape == (40, 12)
    assert torch.equal(texts, write_texts(bench.model, bench.encoder, 40, 12, seed=0))
    assert not torch.equal(texts, write_texts(bench.model, bench.encoder, 40, 12, seed=1))
    assert len({*map(tuple, texts.tolist())}) > 20


def test_gradients_leave_no_trace(bench):
    model = bench.model
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    weight_gradients(model, calibration_batches(bench), ["model.layers.0.mlp.down_proj.weight"])
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad == ("norm" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["wanda", "flap", "taylor", "taylor_second", "minitron", "magnitude"])
def test_units_that_do_nothing_come_last(bench, name):
    dead = {"intermediate": [5, 60, 100], "kv_group": [3]}
    with torch.no_grad():
        for unit, layer, part in (("mlp", 0, [5]), ("mlp", 1, [12]), ("mlp", 2, [4])):
            mlp = bench.model.model.layers[layer].get_submodule(unit)
            mlp.down_proj.weight[:, part] = 0
            mlp.gate_proj.weight[part] = 0
            mlp.up_proj.weight[part] = 0
        attention = bench.model.model.layers[1].self_attn
        attention.o_proj.weight[:, 16:] = 0
        for matrix in (attention.k_proj, attention.v_proj):
            matrix.weight[8:] = 0
        attention.q_proj.weight[16:] = 0
    found = getattr(scores, name)(bench)
    for unit, places in dead.items():
        if name == "flap":  # whose scores are standardised layer by layer
            worst = {int(i) for i in found[unit].view(3, -1).argmin(1) + len(found[unit]) // 3 * torch.arange(3)}
            assert worst >= set(places)
        else:
            assert set(found[unit].argsort()[: len(places)].tolist()) == set(places)


def test_random_scores_follow_the_seed(bench):
    first, again = scores.random(bench), scores.random(bench)
    bench.config = replace(bench.config, seed=1)
    assert torch.equal(first["kv_group"], again["kv_group"])
    assert not torch.equal(first["kv_group"], scores.random(bench)["kv_group"])


def test_a_layer_that_changes_nothing_has_no_influence(bench):
    with torch.no_grad():
        bench.model.model.layers[1].self_attn.o_proj.weight.zero_()
        bench.model.model.layers[1].mlp.down_proj.weight.zero_()
    influence = block_influence(bench.model, calibration_batches(bench))
    assert abs(float(influence[1])) < 1e-5 < 1e-3 < float(influence[[0, 2]].min())
    plan = whole_layers(describe(bench.model), influence, 0.3)
    assert plan.gates["attention"].tolist() == plan.gates["mlp"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("round_to", [1, 32])
def test_uniform_takes_the_same_from_every_layer(target, hidden, round_to):
    shape = ModelShape(576, 3, (LayerShape(3, 3, 64, 1536),) * 6)
    generator = torch.Generator().manual_seed(0)
    units = ("kv_group", "intermediate", *(("hidden",) if hidden else ()))
    given = {unit: torch.rand(sum(shape.sizes(unit)), generator=generator) for unit in units}
    plan = uniform(shape, given, target, round_to)
    assert len({tuple(width.values()) for width in plan.widths()}) == 1
    assert plan.sparsity == pytest.approx(target, abs=0.002 if round_to == 1 else 0.03)
    assert plan.widths()[0]["intermediate_size"] % round_to == len(plan.keep["hidden"][0]) % round_to == 0
    kept = plan.gates["intermediate"].view(6, -1) > 0
    for values, stays in zip(given["intermediate"].view(6, -1), kept, strict=True):
        assert values[stays].min() > values[~stays].max()


def test_uniform_with_one_kind_alone():
    shape = ModelShape(64, 3, (LayerShape(4, 1, 16, 128),) * 3)
    for unit in ("kv_group", "intermediate"):
        plan = uniform(shape, {unit: torch.arange(float(sum(shape.sizes(unit))))}, 0.1)
        assert plan.sparsity == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("units", [("hidden",), ("kv_group", "hidden")])
@pytest.mark.parametrize("target", [0.2, 0.5])
def test_hidden_channels_alone_give_what_is_asked_for(units, target):
    shape = ModelShape(576, 3, (LayerShape(3, 3, 64, 1536),) * 6)
    given = {unit: torch.arange(float(sum(shape.sizes(unit)))) for unit in units}
    assert uniform(shape, given, target).sparsity == pytest.approx(target, abs=0.002)


def test_the_same_share_of_every_layer_is_refused_where_it_is_another_one(bench):
    bench.config = replace(bench.config, method="wanda", allocation="local", units=("kv_group",), target_sparsity=0.7)
    with pytest.raises(ValueError, match=r"every layer's kv_group can remove .* and 70 % are asked for"):
        METHODS["wanda"](bench)


def test_layers_that_stay_whole_leave_their_share_to_the_others(bench):
    shape = ModelShape(32, 3, (LayerShape(4, 2, 8, 200),) * 16)
    values = {unit: torch.rand(sum(shape.sizes(unit))) for unit in shape.inner_units}
    plan = uniform(shape, values, 0.2, whole=(0, 1, 15))
    kept = [width["intermediate_size"] for width in plan.widths()]
    assert kept[:2] + kept[15:] == [200] * 3
    assert len({*kept[2:15]}) == 1
    assert plan.sparsity == pytest.approx(0.2, abs=0.01)
    assert uniform(shape, values, 0.8, whole=(0, 1, 15)).widths()[0]["intermediate_size"] < 200, "more than they hold"


@pytest.mark.parametrize("name", ["taylor", "taylor2", "magnitude"])
def test_llm_pruner_leaves_first_and_last_layers_alone_unless_told_otherwise(bench, name):
    bench.model = tiny_model("llama", num_hidden_layers=16)
    whole = {}
    for allocation in ("auto", "local"):
        bench.config = replace(bench.config, method=name, allocation=allocation)
        plan = METHODS[name](bench)[1]
        assert plan.sparsity == pytest.approx(0.3, abs=0.02)
        whole[allocation] = [i for i, layer in enumerate(plan.widths()) if layer["intermediate_size"] == 48]
    assert whole == {"auto": [0, 1, 15], "local": []}


def test_standardised_scores_have_no_scale():
    shape = ModelShape(64, 3, (LayerShape(4, 1, 16, 128),) * 3)
    values = torch.rand(3 * 128)
    scaled = (values.view(3, 128) * torch.tensor([[1.0], [100.0], [0.01]]) + 5).flatten()
    first, second = (standardised(shape, {"intermediate": v})["intermediate"] for v in (values, scaled))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_refit_restores_what_others_can_give(bench):
    """Channels that are copies of others are made up for exactly."""
    model = bench.model
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight[24:] = matrix.weight[:24]
    shape = describe(model)
    gates = torch.ones(3, 48)
    gates[:, 24:] = 0
    plan = Plan(shape, {"intermediate": gates.flatten()})
    given = calibration_batches(bench)
    moments = input_moments(model, given, gram=True)
    ids = given[0].ids
    with torch.no_grad():
        expected, without = model(ids).logits, extract(model, plan)(ids).logits
        refit(model, plan, moments, damping=1e-8)
        repaired = extract(model, plan)(ids).logits
    assert (without - expected).abs().max() > 1
    assert (repaired - expected).abs().max() < 0.02 * expected.abs().max()


def test_refit_of_a_whole_plan_changes_nothing(bench):
    model = bench.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    moments = input_moments(model, calibration_batches(bench), gram=True)
    refit(model, Plan(describe(model), {}), moments)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wanda_with_refit_cuts_what_each_matrix_loses(bench):
    path = "model.layers.1.mlp.down_proj"
    x = torch.cat(inputs_of(bench, path))
    whole = bench.model.get_submodule(path).weight.detach().clone()
    lost, spent = {}, {}
    for wanted in (False, True):
        bench.config = replace(bench.config, method="wanda", refit=wanted)
        bench.facts.clear()
        model, plan = METHODS["wanda"](bench)
        kept = plan.keep["intermediate"][1]
        left = model.get_submodule(path).weight.detach()[:, kept]
        lost[wanted] = float((x @ whole.T - x[:, kept] @ left.T).square().sum())
        spent[wanted] = bench.facts["operations"]["calibration"]
    assert 0 < lost[True] < 0.8 * lost[False]
    assert spent[True] == 2 * spent[False]


def test_biases_stand_in_for_constant_channels(bench):
    """A removed input that never changes is exactly a bias."""
    model = bench.model
    path = "model.layers.1.mlp.down_proj"

    def constant(module, args):
        x = args[0].clone()
        x[..., :10] = torch.arange(10.0)
        return (x,)

    ids = calibration_batches(bench)[0].ids
    handle = model.get_submodule(path).register_forward_pre_hook(constant)
    moments = input_moments(model, calibration_batches(bench))
    with torch.no_grad():
        expected = model(ids).logits
    handle.remove()
    gates = torch.ones(3, 48)
    gates[1, :10] = 0
    plan = Plan(describe(model), {"intermediate": gates.flatten()})
    assert add_biases(model, plan, {name: found.mean for name, found in moments.items()})
    with torch.no_grad():
        torch.testing.assert_close(extract(model, plan)(ids).logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("model_type", ["opt", "gpt_neox"])
def test_biases_that_are_there_take_up_what_goes(model_type):
    model = tiny_model(model_type)
    plan = random_plan(model, keep=0.7)
    means = {path: torch.rand(model.get_submodule(path).in_features) for _, _, path in output_paths(model)}
    before = {path: model.get_submodule(path).bias.clone() for path in means}
    assert add_biases(model, plan, means)
    for path, kept in kept_columns(model, plan).items():
        matrix, gone = model.get_submodule(path), means[path].clone()
        gone[kept] = 0
        torch.testing.assert_close(matrix.bias, before[path] + matrix.weight @ gone)


def test_qwen2_has_no_place_for_biases():
    model = tiny_model("qwen2")
    assert not add_biases(model, random_plan(model), {})


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("bench", ["llama", "opt", "gpt_neox"], indirect=True)
def test_every_method_prunes(bench, name):
    bench.config = replace(bench.config, method=name)
    model, plan = METHODS[name](bench)
    assert plan.sparsity == pytest.approx(0.3, abs=0.05 if name in ("shortgpt", "minitron") else 0.02)
    ids = calibration_batches(bench)[0].ids
    with torch.no_grad():
        assert extract(model, plan)(ids).logits.isfinite().all()


def test_allocation_can_be_chosen(bench):
    widths = {}
    for allocation in ("local", "global"):
        bench.config = replace(bench.config, method="wanda", allocation=allocation)
        widths[allocation] = [w["intermediate_size"] for w in METHODS["wanda"](bench)[1].widths()]
    assert len(set(widths["local"])) == 1 < len(set(widths["global"]))


@pytest.mark.parametrize(
    ("method", "units", "unknown"),
    [
        ("wanda", "intermediate,hidden", "hidden"),
        ("taylor", "kv_group,attention", "attention"),
        ("fisher", "hidden", "hidden"),
        ("shortgpt", "intermediate", "intermediate"),
    ],
)
def test_units_that_a_method_does_not_know_are_refused(method, units, unknown):
    with pytest.raises(ValueError, match=f"--method {method} does not tell which {unknown} may go"):
        with_units(PruneConfig(method=method, units=units), "llama")


def test_methods_give_scores_of_all_units_that_they_are_said_to_know(bench):
    for name in ("random", "magnitude", "wanda", "flap", "taylor", "minitron"):
        known = {unit for unit in SCORED[name] if unit != "expert"}  # which this model has none of
        assert getattr(scores, name)(bench).keys() == known, name


def test_shortgpt_takes_whole_layers_and_says_so(bench):
    assert with_units(PruneConfig(method="shortgpt"), "llama").units == ("attention", "mlp")
    config = bench.config
    with pytest.raises(ValueError, match=r"a layer is 0.333 of the prunable parameters"):
        prepare(replace(config, method="shortgpt", units=(), target_sparsity=0.1, output=f"{config.output}-2"))


def test_padding_is_told_from_tokens(bench):
    (batch, *_) = calibration_batches(bench)
    whole = batch.unshared()
    lengths = [len(bench.encoder.encode(record, bench.prompt).ids) for record in bench.sources[0].records]
    assert set(real_tokens(whole).sum(1).tolist()) <= set(lengths)
