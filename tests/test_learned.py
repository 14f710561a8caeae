"""Where gates start, what the dense model teaches, and what a run says it took."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import compresso
from compresso import PruneConfig
from compresso.adapters import add_lora, inside
from compresso.batches import IGNORE, Batch, Encoder, Example, batches, before_targets, collate
from compresso.calibration import gate_gradients
from compresso.config import PRESETS
from compresso.lagrangian import initial_log_alpha
from compresso.learned import dense, warm_start
from compresso.masks import Gates, Masks, gated
from compresso.prompts import find_prompt
from compresso.records import parse
from compresso.shape import describe
from compresso.train import Teacher, _summed, mixed_loss, operations, target_loss
from tiny import QUICK, tiny_model

RECORDS = [parse({"instruction": "say " * n, "output": "dog " * (8 - n)}) for n in (1, 4, 6)]


@pytest.fixture
def batch(tokenizer):
    (found,) = batches(RECORDS, Encoder(tokenizer, 256), find_prompt("short", "chat"))
    assert len(found.prefix)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_gradients_of_gates_are_those_of_the_gates_that_prune(batch, model_type, recompute):
    """Record by record, with the hooks that the run itself uses."""
    model = tiny_model(model_type, max_position_embeddings=512)
    shape = describe(model)
    first, second = gate_gradients(model, [batch], recompute)
    expected = {unit: [] for unit in first}
    gates = Gates(model, shape)
    for i in range(len(batch.ids)):
        one = batch.unshared()
        ids, labels = one.ids[i : i + 1], one.labels[i : i + 1]
        row = Batch(one.prefix, ids, labels, one.lengths[i : i + 1], before_targets(labels))
        z = {unit: torch.ones(sum(shape.sizes(unit)), requires_grad=True) for unit in first}
        gates.set(z)
        (target_loss(model, row) / (batch.targets / 3)).backward()
        for unit in z:
            expected[unit].append(z[unit].grad)
    gates.remove()
    for unit, found in expected.items():
        found = torch.stack(found)
        torch.testing.assert_close(first[unit], found.mean(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(second[unit], found.square().mean(0), rtol=1e-3, atol=1e-6)


def test_gradients_of_gates_leave_the_model_as_it_was(batch):
    model = tiny_model("llama", max_position_embeddings=512)
    gate_gradients(model, [batch])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_weights_that_are_no_numbers_are_told(batch):
    model = tiny_model("llama", max_position_embeddings=512)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="gradients are not numbers"):
        gate_gradients(model, [batch])


def test_a_warm_start_keeps_the_order_and_the_expected_sparsity():
    model = tiny_model("llama")
    shape = describe(model)
    masks = Masks(shape, {unit: initial_log_alpha(unit, 0.2) for unit in ("kv_group", "intermediate", "hidden")})
    before = float(masks.expected_sparsity().detach())
    hidden = masks.log_alpha["hidden"].clone()
    importance = {unit: torch.rand(sum(shape.sizes(unit))) for unit in ("kv_group", "intermediate")}
    warm_start(masks, importance)
    ranks = torch.cat([*importance.values()]).argsort()
    log_alpha = torch.cat([masks.log_alpha["kv_group"], masks.log_alpha["intermediate"]]).detach()
    assert (log_alpha[ranks].diff() >= 0).all()
    assert float(masks.expected_sparsity().detach()) == pytest.approx(before, abs=1e-6)
    assert masks.log_alpha["hidden"].std() == 0
    assert hidden.std() == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_the_loss_with_a_teacher_is_what_it_says(batch, monkeypatch, chunked):
    student = tiny_model("llama", max_position_embeddings=512)
    other = tiny_model("llama", seed=1, max_position_embeddings=512)
    if chunked:
        monkeypatch.setattr("compresso.train.LOGITS_AT_ONCE", 5 * 300)
    minimised, loss = mixed_loss(student, batch, Teacher(other, 0.3))
    whole = batch.unshared()
    target = whole.labels[:, 1:] >= 0
    logits = [m(whole.ids).logits[:, :-1][target] for m in (student, other)]
    expected = functional.cross_entropy(logits[0], whole.labels[:, 1:][target], reduction="sum")
    distance = functional.cross_entropy(logits[0], logits[1].softmax(-1), reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(minimised, 0.7 * expected + 0.3 * distance, rtol=1e-4, atol=1e-4)
    weight = student.model.layers[0].mlp.up_proj.weight
    (by_hand,) = torch.autograd.grad(0.7 * expected + 0.3 * distance, weight)
    (found,) = torch.autograd.grad(minimised, weight)
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("prefix", [0, 70])
def test_of_texts_that_the_teacher_wrote_its_predictions_are_the_aim(weight, prefix):
    """The drawn tokens are not; of other rows they are, as far as the teacher's weight leaves."""
    torch.manual_seed(0)
    student, other = (tiny_model("llama", seed=seed, max_position_embeddings=512) for seed in (0, 1))
    start = torch.randint(3, 250, (prefix,)).tolist()
    examples = []
    for length, own in ((20, True), (31, False), (12, True), (17, False)):
        ids = [*start, *torch.randint(3, 250, (length,)).tolist()]
        before = 1 if own else 5
        examples.append(Example(ids, [IGNORE] * (prefix + before) + ids[prefix + before :], own))
    batch = collate(examples)
    assert len(batch.prefix) == prefix
    by_hand = torch.zeros(())
    for example in examples:
        logits = [
            model(torch.tensor([example.ids])).logits[0, example.first_target - 1 : -1] for model in (student, other)
        ]
        said = functional.cross_entropy(logits[0], torch.tensor(example.ids[example.first_target :]), reduction="sum")
        taught = functional.cross_entropy(logits[0], logits[1].softmax(-1), reduction="sum")
        by_hand = by_hand + (taught if example.own else (1 - weight) * said + weight * taught)
    teacher = Teacher(other, weight)
    minimised, _ = mixed_loss(student, batch, teacher)
    torch.testing.assert_close(minimised, by_hand, rtol=1e-4, atol=1e-4)
    weights = student.model.layers[0].mlp.up_proj.weight
    found, expected = (torch.autograd.grad(loss, weights)[0] for loss in (minimised, by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert teacher.taught(batch).computed == prefix + 20 + 12 + (31 + 17 if weight else 0), "what it costs"
    torch.testing.assert_close(mixed_loss(student, batch.unshared(), teacher)[0], minimised, rtol=1e-4, atol=1e-4)
    alone, nothing = (mixed_loss(student, collate(part), teacher)[0] for part in (examples[::2], [Example([7], [7])]))
    torch.testing.assert_close(alone, mixed_loss(student, batch.own_rows(), teacher)[0], rtol=1e-4, atol=1e-4)
    assert nothing.item() == 0, "a record of one token has no target"


def test_the_model_in_training_teaches_what_the_dense_one_said(batch):
    model = tiny_model("llama", max_position_embeddings=512)
    with torch.no_grad():
        expected = model(batch.unshared().ids).logits
    wrapped = add_lora(model, PruneConfig(), 0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    gates = Gates(inside(wrapped), describe(inside(wrapped)))
    z = {"intermediate": torch.rand(3 * 48)}
    gates.set(z)
    teacher = Teacher(inside(wrapped), 0.5, partial(dense, wrapped, gates))
    before = inside(wrapped)(batch.unshared().ids).logits
    with teacher.silent():
        torch.testing.assert_close(inside(wrapped)(batch.unshared().ids).logits, expected)
    torch.testing.assert_close(inside(wrapped)(batch.unshared().ids).logits, before)
    assert not torch.allclose(before, expected, atol=0.1)
    gates.remove()
    with gated(inside(wrapped), describe(inside(wrapped)), z):
        torch.testing.assert_close(inside(wrapped)(batch.unshared().ids).logits, before)


def test_distilling_and_other_methods_from_end_to_end(checkpoint, data, tmp_path):
    """The account of operations is that of the tokens and parameters of each stage."""
    runs = {}
    for name, extra in (("plain", {}), ("taught", {"distill": 0.5}), ("flap", {"method": "flap", "distill": 0.5})):
        settings = {**QUICK, **extra}
        runs[name] = compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / name), **settings)
    plain, taught, flap = runs.values()
    assert taught["operations"]["prune"] == pytest.approx(4 / 3 * plain["operations"]["prune"], rel=0.1)
    assert taught["operations"]["recover"] > 1.2 * plain["operations"]["recover"]
    assert "prune" not in flap["operations"]
    assert flap["operations"]["calibration"] > 0
    assert flap["logit_differences"]["model_reloaded"] < 1e-3
    assert flap["method"] == "flap"


def test_a_recovery_that_learns_from_the_dense_model_is_as_good_as_repeated(checkpoint, data, tmp_path):
    folder = tmp_path / "run"
    settings = {**QUICK, "distill": 1.0, "method": "wanda"}
    first = compresso.prune(model=str(checkpoint), data=str(data), output=str(folder), **settings)
    again = compresso.recover(str(folder))
    assert again["loss"]["recovered"] == pytest.approx(first["loss"]["recovered"], rel=1e-5)


def test_operations_count_parameters_tokens_and_passes():
    model = tiny_model("llama")
    assert operations(model, 10, 3) == 2 * 3 * 10 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_steps_that_are_not_given(preset):
    assert (PruneConfig(preset=preset).steps, PruneConfig(preset=preset).recover_steps) == PRESETS[preset]
    given = PruneConfig(preset=preset, steps=7, recover_steps=0)
    assert (given.steps, given.recover_steps) == (7, 0)


def test_a_method_that_trains_nothing_is_checked_in_float32_too(checkpoint, data, tmp_path):
    """In bf16 a mistake could hide behind rounding."""
    settings = {**QUICK, "precision": "bf16", "method": "wanda", "recover_steps": 0}
    summary = compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / "run"), **settings)
    assert summary["logit_differences"]["gated_extracted"] < 1e-4
    compresso.load(tmp_path / "run" / "model")  # paths do as well as strings


def test_where_all_weights_learn_the_dense_model_teaches_by_default(checkpoint, data, tmp_path):
    quick = {
        **QUICK,
        "model": str(checkpoint),
        "data": str(data),
        "steps": 4,
        "recover_steps": 2,
        "target_sparsity": 0.2,
    }
    del quick["distill"]
    first, last = {}, {}
    for name, extra in (("full", {}), ("full alone", {"distill": 0.0}), ("lora", {}), ("lora alone", {"distill": 0.0})):
        output = tmp_path / name
        compresso.prune(**quick, output=str(output), tune=name.split()[0], **extra)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        first[name], last[name] = rows[0]["operations"], rows[-1]["operations"]
    assert first["full"] / first["full alone"] == pytest.approx(4 / 3)  # one pass of the teacher to three of the model
    assert first["lora"] == first["lora alone"]
    assert last["full"] == pytest.approx(last["full alone"], rel=0.02)  # a fifth is gone: none in recovery
    compresso.recover(str(tmp_path / "full alone"), recover_steps=1, distill=0.5)
    row = json.loads((tmp_path / "full alone" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["operations"] > 1.3 * last["full alone"]


def test_memory_that_runs_out_in_a_sum_is_no_lost_process():
    def reduce(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce)
    with pytest.raises(torch.OutOfMemoryError):
        _summed(two, torch.zeros(1))
