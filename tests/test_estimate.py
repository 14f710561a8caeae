"""What `estimate` counts without weights is what a step with weights makes, tensor by tensor."""

import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch

import compresso
from compresso import describe, extract, scores, tuning
from compresso.adapters import add_lora, inside
from compresso.batches import Batch, before_targets
from compresso.calibration import gate_gradients, input_moments, weight_gradients
from compresso.cli import main
from compresso.config import PruneConfig
from compresso.estimate import estimate
from compresso.families import FAMILIES
from compresso.masks import Gates
from compresso.memory import _Live, _with_layers, step_memory, training_memory
from compresso.train import target_loss
from documents import WORDS
from test_extract import gates_of
from tiny import QUICK, tiny_model

CONFIG = PruneConfig(batch_size=3, max_length=40, tune="lora")


def counted(model, prompt, tune):
    """Bytes at the peak of a real step."""
    wrapped = inside(tuning.start(model, tune, CONFIG, 0))
    shape = describe(wrapped)
    gates = Gates(wrapped, shape)
    ids = torch.arange(120).view(3, 40)
    batch = Batch(torch.arange(prompt), ids, ids, (ids.shape[1],) * len(ids), before_targets(ids))
    with _Live(wrapped) as live:
        gates.set({unit: torch.rand(sum(shape.sizes(unit)), requires_grad=True) * 1 for unit in CONFIG.gates})
        target_loss(wrapped, batch).backward()
    return live.peak


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("prompt", [0, 30])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_step_without_numbers_keeps_what_a_real_one_keeps(model_type, prompt, tune):
    model = tiny_model(model_type)
    found = step_memory(model.config, torch.float32, replace(CONFIG, tune=tune), prompt)
    expected = counted(model, prompt, tune)
    actual = found["activations"] + found["logits and backward"] + found["gradients"]
    if prompt:
        assert actual == pytest.approx(expected, rel=0.001)
    else:  # transformers makes a mask for tensors without numbers that it would leave out
        assert 0.999 * expected <= actual <= 1.1 * expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_and_three_layers_tell_of_more(checkpointing):
    config = replace(CONFIG, gradient_checkpointing=checkpointing)
    architecture = tiny_model("llama", num_hidden_layers=7).config
    two, three, seven = (
        step_memory(_with_layers(architecture, n), torch.bfloat16, config, 20)["activations"] for n in (2, 3, 7)
    )
    assert two + 5 * (three - two) == seven


def test_counts_and_messages(checkpoint, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    of_all = estimate(PruneConfig(model=str(bare), steps=10, recover_steps=5, prompt="none", distill=0, own_share=0))
    taught = estimate(PruneConfig(model=str(bare), steps=10, recover_steps=5, prompt="none", own_share=0))
    always = estimate(PruneConfig(model=str(bare), steps=10, recover_steps=5, prompt="none", own_share=0, distill=0.5))
    writes = estimate(PruneConfig(model=str(bare), steps=10, recover_steps=5, prompt="none", own_share=0.5))
    found = estimate(PruneConfig(model=str(bare), steps=10, recover_steps=5, prompt="none", tune="lora"))
    assert of_all.learned == sum(p.numel() for p in tiny_model("llama", vocab_size=300).model.layers.parameters())
    assert of_all.training["optimizer"] == 2 * of_all.training["float32 copies"] == 8 * of_all.learned
    assert of_all.operations - of_all.calibration == 1.5 * (found.operations - found.calibration)
    by_step = (of_all.operations - of_all.calibration) / 15
    assert taught.operations - taught.calibration == pytest.approx((10 * 4 / 3 + 5) * by_step), "while gates learn"
    assert always.operations - always.calibration == pytest.approx(15 * 4 / 3 * by_step)
    assert "dense model" in always.recovering
    assert "dense model" not in taught.recovering
    assert "dense model" in writes.recovering
    by_token = by_step / 3 / (8 * 256)
    assert writes.operations - taught.operations == pytest.approx((10 + 20) * 128 * by_token), "written, and predicted"
    model = tiny_model("llama", vocab_size=300)
    assert found.learned == sum(p.numel() for p in add_lora(model, CONFIG, 0).parameters() if p.requires_grad)
    assert found.steps == 15
    assert found.tokens == 15 * 8 * 256
    assert found.training["weights"] == 2 * found.parameters
    assert main(["estimate", "--model", str(bare), "--gpus", "2", "--gpu-memory", "24", "--teraflops", "50"]) == 0
    said = capsys.readouterr().out
    assert "of 24 GB at the peak: it fits" in said
    assert "hours on 2 GPUs" in said
    assert main(["estimate", "--model", str(bare), "--gpu-memory", "0.0001"]) == 0
    assert "it does not fit" in capsys.readouterr().out
    assert main(["estimate", "--model", str(bare), "--gpus", "0"]) == 2
    assert "--gpus must be above 0" in capsys.readouterr().err
    (bare / "config.json").write_text("{")
    assert main(["estimate", "--model", str(bare)]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_model_of_unequal_widths_is_estimated_as_its_widest_layer(model_type, tmp_path):
    model = tiny_model(model_type)
    for name, widths in {"unequal": [40, 17, 33], "widest": [40, 40, 40]}.items():
        extract(model, gates_of(model, {"kv_group": [2, 2, 2], "intermediate": widths})).save_pretrained(
            tmp_path / name
        )
    settings = {"prompt": "none", "steps": 4, "recover_steps": 2}
    found, widest = (estimate(PruneConfig(model=str(tmp_path / name), **settings)) for name in ("unequal", "widest"))
    assert found.training["activations"] == widest.training["activations"]
    assert found.parameters < widest.parameters


def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps():
    """Counted in another way: storages that autograd saves, which are not the model's own."""
    model = inside(add_lora(tiny_model("llama"), CONFIG, 0))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.arange(120).view(3, 40)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = weakref.ref(storage)
        return tensor

    batch = Batch(torch.arange(30), ids, ids, (ids.shape[1],) * len(ids), before_targets(ids))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Live(model) as live:
        loss = target_loss(model, batch)
        kept = [storage for there in saved.values() if (storage := there()) is not None]  # the logits' graph has gone
        assert live.now == pytest.approx(sum(storage.nbytes() for storage in kept), rel=0.1)
    loss.backward()


@pytest.mark.parametrize("method", ["l0", "fisher", "wanda", "minitron", "flap", "taylor2", "magnitude"])
def test_the_look_at_records_is_counted_as_the_run_charges_it(method, checkpoint, tmp_path):
    """With records that fill their length, the account and the estimate agree."""
    long = [{"instruction": f"{word} " * 20, "output": "dog " * 60} for word in WORDS]  # rows share no beginning
    (tmp_path / "long.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in long * 8))
    settings = {**QUICK, "method": method, "calibration_records": 16, "prompt": "none", "steps": 4, "recover_steps": 0}
    settings |= {"own_texts": 4} if method == "l0" else {}
    settings |= {"model": str(checkpoint), "data": str(tmp_path / "long.jsonl"), "output": str(tmp_path / "run")}
    found = estimate(PruneConfig(**settings))
    summary = compresso.prune(**settings)
    assert found.calibration == pytest.approx(summary["operations"].get("calibration", 0), rel=0.05)
    assert found.steps == (4 if method == "l0" else 0)


@pytest.mark.parametrize("method", ["wanda", "taylor2", "fisher"])
@pytest.mark.parametrize("refit", [False, True])
def test_a_method_that_trains_nothing_needs_what_its_look_at_records_takes(method, refit, checkpoint):
    settings = {"model": str(checkpoint), "method": method, "refit": refit, "batch_size": 3, "max_length": 40}
    settings |= {"prompt": "none", "precision": "fp32", "recover_steps": 0}
    found = estimate(PruneConfig(**settings))
    assert found.learned == 0
    model = compresso.load(checkpoint)[0].float()
    ids = torch.arange(120).view(3, 40)
    batch = Batch(torch.arange(0), ids, ids, (ids.shape[1],) * len(ids), before_targets(ids))
    with _Live(model) as live:
        if method == "taylor2":
            kept = weight_gradients(model, [*batch.rows()], scores._matrices(model), squares=True)
        elif method == "fisher":
            kept = gate_gradients(model, [batch])
        else:
            kept = input_moments(model, [batch])
        if refit:
            kept = (kept, input_moments(model, [batch], gram=True))
    beyond = sum(found.training.values()) - found.training["weights"]
    assert 0.9 * live.peak <= beyond <= 1.5 * live.peak, f"{found.training} and {live.peak}"
    del kept


def test_all_settings_of_prune_can_be_asked_for(checkpoint, capsys):
    asked = ["estimate", "--model", str(checkpoint), "--recover-steps", "0"]
    assert main([*asked, "--method", "taylor", "--units", "intermediate", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert "sums of gradients" in said
    assert "optimizer" not in said
    assert main([*asked, "--method", "l0"]) == 0
    assert "optimizer" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [["--method", "wanda"], ["--method", "taylor", "--refit"]])
def test_what_a_run_refuses_of_a_mixture_is_not_estimated(asked, tmp_path, capsys):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path), *asked]) == 2
    assert "experts of a qwen3_moe do not show" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [2, 5, 40])
def test_no_part_of_the_memory_is_less_than_nothing(layers):
    """Where all weights learn, the peak of many layers comes before their gradients are all there."""
    architecture = tiny_model("llama", num_hidden_layers=layers, vocab_size=300).config
    found = training_memory(architecture, torch.bfloat16, replace(CONFIG, tune="full"), 0)
    assert min(found.values()) >= 0


@pytest.mark.parametrize(("natively", "size"), [({"avx512_bf16": True}, 2), ({"avx2": True}, 4)])
def test_on_a_cpu_without_half_precision_weights_take_four_bytes(natively, size, checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: natively, raising=False)
    config = PruneConfig(model=str(checkpoint), steps=1, recover_steps=0)
    found = estimate(config, cpu=True)
    assert found.training["weights"] == size * found.parameters
    assert estimate(config).training["weights"] == 2 * found.parameters
