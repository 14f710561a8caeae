"""`prune` and `recover` from end to end on tiny checkpoints: what they promise holds on disk."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import compresso
from compresso import plan, tuning
from compresso.batches import batches
from compresso.chat import answer, chat, compare, open_model
from compresso.cli import main
from compresso.families import FAMILIES
from compresso.lagrangian import Lagrangian, make_schedule
from compresso.masks import Gates, Masks
from compresso.prepare import prepare
from compresso.shape import count_prunable, describe
from compresso.stopping import Stopped
from compresso.streams import mixed
from compresso.train import Teacher
from tiny import QUICK, tiny_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint, data):
    """A finished run of unequal widths."""
    folder = tmp_path_factory.mktemp("run") / "run"
    compresso.prune(model=str(checkpoint), data=str(data), output=str(folder), target_sparsity=0.3, **QUICK)
    return folder


def rows(folder, stage):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["stage"] == stage]


def test_a_run_folder_holds_what_it_promises(finished, checkpoint):
    for name in (
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "plan.safetensors",
        "plan.json",
        "summary.json",
        "cut",
        "model",
    ):
        assert (finished / name).exists(), name
    summary = json.loads((finished / "summary.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    small = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert summary["prunable_parameters"] == {"before": count_prunable(dense), "after": count_prunable(small)}
    assert summary["parameters"]["after"] == sum(p.numel() for p in small.parameters())
    assert summary["sparsity"] == pytest.approx(1 - count_prunable(small) / count_prunable(dense), abs=1e-12)
    assert summary["sparsity"] == pytest.approx(0.3, abs=0.01)  # one hidden channel of 32 is 3 points
    assert summary["max_logit_difference"] < 1e-3
    assert summary["logit_differences"]["model_reloaded"] == 0
    for key in ("perplexity", "loss"):
        assert set(summary[key]) == {"dense", "cut", "recovered"}
    assert len(summary["widths"]) == 3
    for key in ("seconds", "peak_memory_bytes", "seed", "versions", "target_sparsity"):
        assert key in summary
    assert summary["bytes"]["after"] < summary["bytes"]["before"] * 1.1


def test_metrics_have_a_row_a_step_and_the_constraint_ends_on_target(finished):
    pruning = rows(finished, "prune")
    assert [row["step"] for row in pruning] == list(range(1, 9))
    assert [row["phase"] for row in pruning] == ["ramp"] * 6 + ["hold"] * 2
    assert pruning[-1]["expected_sparsity"] == pytest.approx(0.3, abs=0.005)
    assert [row["phase"] for row in rows(finished, "recover")] == ["recover"] * 4


def test_it_loads_and_generates_where_compresso_is_not_installed(finished):
    code = f"""
import sys
sys.modules["compresso"] = None
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = {str(finished / "model")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("the quick", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
print(type(model).__name__, out.shape[1] - ids.shape[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["LlamaPerLayerForCausalLM", "5"], done.stderr


def test_equal_widths_load_as_a_stock_class_in_a_stock_process(checkpoint, data, tmp_path):
    folder = tmp_path / "run"
    settings = {**QUICK, "units": "hidden", "recover_steps": 0}
    compresso.prune(model=str(checkpoint), data=str(data), output=str(folder), target_sparsity=0.25, **settings)
    assert not (folder / "model" / "modeling_compresso.py").exists()
    code = f"""
import sys
sys.modules["compresso"] = None
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder / "model")!r})
print(type(model).__name__, model.config.hidden_size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["LlamaForCausalLM", "24"], done.stderr


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_units_of_every_family_at_once(model_type, tokenizer, data, tmp_path):
    tiny_model(model_type, max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    summary = compresso.prune(
        model=str(tmp_path / "dense"),
        data=str(data),
        output=str(tmp_path / "run"),
        target_sparsity=0.5,
        units=FAMILIES[model_type].units,
        round_to=4,
        **QUICK,
    )
    assert summary["max_logit_difference"] < 1e-3
    assert summary["hidden_size"]["after"] % 4 == 0
    assert all(width["intermediate_size"] % 4 == 0 for width in summary["widths"])
    loaded, _ = compresso.load(str(tmp_path / "run" / "model"))
    assert count_prunable(loaded) == summary["prunable_parameters"]["after"]


@pytest.mark.parametrize("method", ["l0", "wanda"])
def test_a_pruned_model_of_unequal_widths_is_pruned_again(method, finished, data, tmp_path):
    before = json.loads((finished / "summary.json").read_text())
    assert AutoConfig.from_pretrained(finished / "model").model_type == "compresso_llama"
    settings = {**QUICK, "model": str(finished / "model"), "data": str(data), "output": str(tmp_path / "run")}
    summary = compresso.prune(**settings, target_sparsity=0.25, method=method)
    assert summary["prunable_parameters"]["before"] == before["prunable_parameters"]["after"]
    assert summary["sparsity"] == pytest.approx(0.25, abs=0.01)
    assert summary["max_logit_difference"] < 1e-3


def test_units_that_a_family_cannot_lack_are_left_out_or_refused(tokenizer, data, tmp_path):
    tiny_model("olmo2", max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    settings = {**QUICK, "model": str(tmp_path / "dense"), "data": str(data), "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"olmo2 cannot lack some of its kv_group.*--units intermediate"):
        compresso.prune(**settings, units="kv_group")
    summary = compresso.prune(**settings, target_sparsity=0.2)
    assert summary["units"] == ["intermediate"]
    assert summary["sparsity"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("model_type", ["opt", "gpt_neox"])
def test_equal_widths_are_a_stock_class_where_that_takes_all_heads(model_type, tokenizer, data, tmp_path):
    tiny_model(model_type, max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    settings = {**QUICK, "model": str(tmp_path / "dense"), "data": str(data), "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=rf"{model_type} cannot lack some of its kv_group and be a stock one"):
        compresso.prune(**settings, units="kv_group", shape="uniform")
    summary = compresso.prune(**{**settings, "distill": 0.3}, target_sparsity=0.2, shape="uniform", tune="lora")
    assert summary["units"] == ["intermediate"]
    assert summary["max_logit_difference"] < 1e-3
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").model_type == model_type


def test_rows_are_never_longer_than_a_models_positions(tokenizer, tmp_path):
    tiny_model("opt", max_position_embeddings=101).save_pretrained(tmp_path / "dense")  # whose positions are a table
    tokenizer.save_pretrained(tmp_path / "dense")
    long = [{"instruction": f"say {i}", "output": "a b c " * 60} for i in range(30)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    settings = {**QUICK, "prompt": "none", "max_length": 256, "own_texts": 2, "target_sparsity": 0.2}
    settings |= {"model": str(tmp_path / "dense"), "data": str(tmp_path / "long.jsonl")}
    assert compresso.prune(**settings, output=str(tmp_path / "run"))["max_logit_difference"] < 1e-3


def test_repeating_a_recovery_gives_the_same_weights_and_going_further_does_not(finished, tmp_path):
    before = load_file(finished / "model" / "model.safetensors")
    compresso.recover(str(finished))
    again = load_file(finished / "model" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert len(rows(finished, "recover")) == 4
    once = json.loads((finished / "summary.json").read_text())
    summary = compresso.recover(str(finished), further=True, recover_steps=2)
    assert summary["operations"]["recover"] == sum(row["operations"] for row in rows(finished, "recover"))
    assert summary["operations"]["recover"] > once["operations"]["recover"]
    assert summary["recovery_seconds"] > once["recovery_seconds"], "of both"
    further = load_file(finished / "model" / "model.safetensors")
    assert any(not torch.equal(further[name], tensor) for name, tensor in before.items())
    assert len(rows(finished, "recover")) == 6


def test_a_recovery_on_other_data_is_measured_on_the_runs_own_held_out_records(finished, tmp_path):
    before = json.loads((finished / "summary.json").read_text())
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"instruction": "say", "output": "a lazy dog"}))
    summary = compresso.recover(str(finished), data=other, seed=5, recover_steps=1, learning_rate=1e-12)
    assert summary["loss"]["recovered"] == pytest.approx(summary["loss"]["cut"], rel=1e-4)
    assert summary["loss"]["cut"] == before["loss"]["cut"]


def test_a_recovery_does_not_learn_from_held_out_records(finished, data, tmp_path, monkeypatch):
    """The run's own records and some more, in memory and read while they are used."""
    more = tmp_path / "more.jsonl"
    more.write_text(data.read_text() + "\n" + json.dumps({"instruction": "say", "output": "a lazy dog"}))
    learned = []
    monkeypatch.setattr("compresso.pipeline.recover_smaller", lambda bench, *_: learned.append(bench))
    monkeypatch.setattr("compresso.pipeline._finish", lambda bench, summary: summary)
    for stream in (False, True):
        compresso.recover(str(finished), data=str(more), stream=stream)
        given = list(itertools.islice(mixed(learned[-1].sources, 0), 200))
        assert learned[-1].held_out
        assert not [record for record in learned[-1].held_out if record in given]
        assert any(record.response == "a lazy dog" for record in given)


def test_a_recovery_learns_from_texts_of_the_dense_model_if_asked(finished, monkeypatch):
    """They are written once, make the share that was asked for, and are accounted for."""
    given = []
    monkeypatch.setattr(
        "compresso.workbench.batches",
        lambda records, encoder, prompt, parts=1: given.extend(records) or batches(records, encoder, prompt, parts),
    )
    hidden, taught = Teacher.hidden, []

    def predicts(teacher, batch):
        taught.append(len(batch.ids))
        return hidden(teacher, batch)

    monkeypatch.setattr("compresso.train.Teacher.hidden", predicts)
    summary = compresso.recover(str(finished), recover_steps=30, own_share=0.4)
    own = (finished / "own.jsonl").read_text().splitlines()
    assert 20 <= len(own) <= math.ceil(30 * 4 * 0.4 / 2), "each of them about twice; some may be blank"
    texts = [json.loads(line)["text"] for line in own]
    assert {record.text for record in given if record.own} == {record.text for record in given} & {*texts}
    assert sum(taught) == sum(record.own for record in given) > 0, "it predicts nothing else"
    assert 0.25 < sum(record.text in texts for record in given if record.text) / (30 * 4) < 0.55
    dense = 2 * summary["parameters"]["before"] * 128 * len(own)
    assert summary["operations"]["own_texts"] == pytest.approx(dense, rel=1e-6)
    before = (finished / "own.jsonl").stat().st_mtime_ns
    compresso.recover(str(finished), recover_steps=1, own_share=0.5)
    assert (finished / "own.jsonl").stat().st_mtime_ns == before
    assert "own_texts" not in compresso.recover(str(finished), recover_steps=1)["operations"]


def test_a_longer_recovery_writes_the_texts_that_it_lacks(finished, tmp_path):
    """Those that are there stay the first ones, in a folder of any name; a shorter one takes no more than it needs."""
    run = tmp_path / "a,b:2"
    shutil.copytree(finished, run)
    (run / "own.jsonl").unlink(missing_ok=True)
    lines, written = [], []
    for steps in (4, 12, 4):
        summary = compresso.recover(str(run), recover_steps=steps, own_share=0.5)
        lines.append((run / "own.jsonl").read_text().splitlines())
        written.append(summary["operations"]["own_texts"])
    assert [len(each) for each in lines] == [4, 12, 12]
    assert lines[1] == lines[2]
    assert lines[1][:4] == lines[0]
    assert len({*lines[1]}) == 12
    assert written[0] == written[2] == pytest.approx(written[1] / 3)
    further = compresso.recover(str(run), recover_steps=1, further=True, own_share=0.0)
    assert further["operations"]["own_texts"] == written[-1], "of the recovery that this one goes on from"


def test_a_run_whose_kept_texts_are_all_empty_says_so_or_does_without(finished, tmp_path):
    """Where they were asked for, and where they are the default."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "own.jsonl").write_text('{"text": " "}\n' * 4)
    with pytest.raises(ValueError, match="no usable text of the model's own; recover with --own-share 0"):
        compresso.recover(str(run), recover_steps=4, own_share=0.5)
    assert compresso.recover(str(run), recover_steps=4, own_share=None)["operations"]["own_texts"] == 0


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"target_sparsity": 0.5}, 0.125),
        ({"target_sparsity": 0.3}, 0.125),
        ({"target_sparsity": 0.5, "tune": "lora"}, 0.0),
        ({"target_sparsity": 0.5, "own_share": 0.0}, 0.0),
    ],
)
def test_the_dense_model_writes_for_recovery(settings, share, checkpoint, data, tmp_path):
    """Unless it is asked not to, and where all weights learn."""
    run = {"model": str(checkpoint), "data": str(data), "output": str(tmp_path / "run"), "batch_size": 4}
    summary = compresso.prune(**run, **settings, method="wanda", recover_steps=16, own_texts=0, precision="fp32")
    written = (tmp_path / "run" / "own.jsonl").read_text().count("\n") if share else 0
    assert written == math.ceil(16 * 4 * share / 2)
    assert ("own_texts" in summary["operations"]) == bool(share)
    assert (tmp_path / "run" / "own.jsonl").exists() == bool(share)


def test_a_recovery_that_goes_further_needs_no_cut_model(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "cut")
    with pytest.raises(FileNotFoundError, match="has no cut"):
        compresso.recover(str(run), recover_steps=1)
    assert compresso.recover(str(run), further=True, recover_steps=1)["loss"]["recovered"] > 0


def test_a_recovery_counts_no_row_of_the_one_that_it_repeats(finished, tmp_path):
    """Not where the last row was torn either."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rec')
    compresso.recover(str(run), recover_steps=2)
    assert [row["step"] for row in rows(run, "recover")] == [1, 2]


def test_what_is_left_of_a_model_writes_no_records(finished):
    before = (finished / "progress.json").read_bytes()
    with pytest.raises(ValueError, match=r"has no self.jsonl.*--own-share"):
        compresso.recover(str(finished), data="self", recover_steps=1)
    assert (finished / "progress.json").read_bytes() == before


@pytest.mark.parametrize("setting", [{"max_length": 16}, {"output": "elsewhere"}, {"recover_stepps": 1}])
def test_a_recovery_refuses_what_it_would_ignore(finished, setting):
    before = (finished / "progress.json").read_bytes()
    with pytest.raises(ValueError, match=f"does not take {next(iter(setting))}"):
        compresso.recover(str(finished), recover_steps=1, **setting)
    assert (finished / "progress.json").read_bytes() == before


def test_an_answer_ends_where_the_checkpoint_says(checkpoint):
    """Chat models of many families list the end of a turn in their generation config alone."""
    opened = open_model(str(checkpoint))
    whole = opened.model.generate(
        torch.tensor([opened.encoder.question("say fox", opened.prompt)]), max_new_tokens=8, do_sample=False
    )
    asked = len(opened.encoder.question("say fox", opened.prompt))
    opened.model.generation_config.eos_token_id = [2, int(whole[0, asked + 1])]
    short = answer(*opened, "say fox", 8)
    opened.model.generation_config.eos_token_id = None
    assert len(short) < len(answer(*opened, "say fox", 8))


def test_a_question_longer_than_the_context_is_refused(checkpoint, capsys):
    assert main(["chat", str(checkpoint), "--message", "fox " * 5000]) == 2
    assert "ask a shorter one" in capsys.readouterr().err


def test_a_recovery_without_the_dense_models_predictions_costs_less(finished):
    spent = {}
    for share in ("0.5", "0"):
        assert main(["recover", str(finished), "--recover-steps", "1", "--distill", share]) == 0
        (row,) = rows(finished, "recover")
        spent[share] = row["operations"]
    assert 0 < spent["0"] < spent["0.5"]


def test_a_recovery_takes_every_kind_of_source(finished, monkeypatch):
    source = compresso.records.Source("demo", None, [compresso.records.parse({"instruction": "say", "output": "fox"})])
    monkeypatch.setattr("compresso.demo.records", lambda: source)
    summary = compresso.recover(str(finished), data="demo", recover_steps=1)
    assert summary["recovery"]["data"] == "demo"


def test_an_interrupted_recovery_can_be_repeated(checkpoint, data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            "compresso.pipeline.recover_smaller", lambda *_: (_ for _ in ()).throw(Stopped("interrupted", 130))
        )
        with pytest.raises(Stopped):
            compresso.prune(model=str(checkpoint), data=str(data), output=str(run), **QUICK)
    summary = compresso.recover(str(run))
    assert summary["loss"]["recovered"] > 0


def test_records_that_the_chat_template_refuses_are_skipped(checkpoint, tokenizer, data, tmp_path, capsys):
    strict = "{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}" + tokenizer.chat_template
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(strict)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(data.read_text() + "\n" + json.dumps({"messages": turns}))
    compresso.prune(model=str(folder), data=str(mixed), output=str(tmp_path / "run"), **QUICK)
    assert (
        "skipped 1 of 41 records (line 41: the chat template refuses it: too long)"
        in capsys.readouterr().out.replace("\n", " ")
    )


def test_the_same_seed_gives_the_same_model(checkpoint, data, tmp_path):
    weights = []
    for name in "ab":
        compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / name), **QUICK)
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_a_prompt_with_fields_travels_filled_in_and_is_used_by_chat(checkpoint, data, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("You lost {sparsity} on the way to {target_sparsity}.")
    settings = {**QUICK, "prompt": str(tmp_path / "mine.txt"), "steps": 8, "recover_steps": 1}
    seen = []
    original = compresso.workbench.batches

    def watching(records, encoder, prompt, parts=1):
        seen.append(prompt.system)
        return original(records, encoder, prompt, parts)

    monkeypatch.setattr("compresso.workbench.batches", watching)
    summary = compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / "run"), **settings)
    assert len({text for text in seen if text.endswith("20.0%.")}) > 3  # it changed while the model shrank
    stored = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["collaborative_prompt"]
    assert stored["body"].strip() == f"You lost {100 * summary['sparsity']:.1f}% on the way to 20.0%."
    assert stored["format"] == "chat"

    asked = []
    monkeypatch.setattr("compresso.chat.answer", lambda model, encoder, prompt, *rest: asked.append(prompt) or "yes")
    assert chat(str(tmp_path / "run"), "hello") == "yes"
    assert asked[0].body == stored["body"]
    chat(str(tmp_path / "run"), "hello", prompt="none")
    assert asked[1].body == ""
    compare(str(checkpoint), str(tmp_path / "run"), ["hello"])
    assert [prompt.body for prompt in asked[2:]] == ["", stored["body"]], "each with the prompt that it carries"


def test_two_models_answer_side_by_side(finished, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("compresso.chat.console.width", 200)
    models = [str(checkpoint), str(finished)]
    answers = compare(*models, ["say fox", "say [bold]dog"], max_new_tokens=5)
    assert answers == [
        tuple(chat(model, message, max_new_tokens=5) for model in models) for message in ("say fox", "say [bold]dog")
    ]
    shown = capsys.readouterr().out
    assert "“say [bold]dog”" in shown
    assert f"{checkpoint} (prompt: none)" in shown
    assert "(prompt: short)" in shown


def test_a_model_can_write_its_own_records(checkpoint, tmp_path):
    settings = {**QUICK, "data": "self", "self_records": 12, "recover_steps": 0}
    compresso.prune(model=str(checkpoint), output=str(tmp_path / "run"), **settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "self.jsonl").read_text().splitlines()]
    assert len(records) == 12
    assert all(record["instruction"] and record["output"] for record in records)


def test_a_base_model_writes_texts(tokenizer, tmp_path):
    folder = tmp_path / "base"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    settings = {**QUICK, "data": "self", "self_records": 10, "recover_steps": 0}
    summary = compresso.prune(model=str(folder), output=str(tmp_path / "run"), **settings)
    assert "text" in json.loads((tmp_path / "run" / "self.jsonl").read_text().splitlines()[0])
    assert summary["loss"]["dense"] > 0
    stored = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["collaborative_prompt"]
    assert stored["format"] == "alpaca"


def test_gradient_checkpointing_and_accumulation_change_nothing_but_rounding(checkpoint, data, tmp_path):
    losses = []
    for name, extra in (("a", {}), ("b", {"accumulation": 2}), ("c", {"gradient_checkpointing": True})):
        settings = {**QUICK, "steps": 6, "recover_steps": 2, **extra}
        compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / name), **settings)
        losses.append([row["loss"] for stage in ("prune", "recover") for row in rows(tmp_path / name, stage)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_soft_gates_survive_saving(checkpoint, data, tmp_path):
    settings = {**QUICK, "kept_gates": "soft"}
    summary = compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / "run"), **settings)
    gates = plan.load(tmp_path / "run").gates
    assert ((gates["intermediate"] > 0) & (gates["intermediate"] < 1)).any()
    assert set(gates["hidden"].tolist()) <= {0.0, 1.0}
    assert summary["max_logit_difference"] < 1e-3


def test_config_yaml_reproduces_the_run(finished):
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert compresso.PruneConfig(**settings).target_sparsity == 0.3


def test_a_run_is_replaced_only_by_a_command_that_says_so(checkpoint, data, tmp_path):
    place = {"model": str(checkpoint), "data": str(data), "output": str(tmp_path / "run"), "method": "random", **QUICK}
    place |= {"recover_steps": 0}
    for _ in range(2):
        compresso.prune(**place, overwrite=True)
    assert main(["prune", "--config", str(tmp_path / "run/config.yaml"), "--target-sparsity", "0.3"]) == 2
    assert json.loads((tmp_path / "run/summary.json").read_text())["target_sparsity"] == 0.2


def test_planted_structure_is_found():
    """Channels that write nothing are the ones removed; the model was taught to need the others."""
    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=2)
    ids = torch.arange(3, 60).repeat(4, 1).roll(7, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    planted = torch.zeros(2, 48, dtype=torch.bool)
    planted[:, ::3] = True
    with torch.no_grad():
        for layer, dead in zip(model.model.layers, planted, strict=True):
            layer.mlp.down_proj.weight[:, dead] = 0
    for _ in range(100):  # heal, without letting the planted channels back in
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for layer, dead in zip(model.model.layers, planted, strict=True):
                layer.mlp.down_proj.weight[:, dead] = 0
    model.requires_grad_(False)
    shape = describe(model)
    target = planted.sum().item() * 3 * 32 / count_prunable(model) * 0.9
    masks = Masks(shape, {"intermediate": 2.0})
    lagrangian = Lagrangian(make_schedule(150, 0.0, 0.4, target, "linear"), masks)
    gates = Gates(model, shape)
    optimizer, noise = torch.optim.Adam(masks.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    for step in range(150):
        gates.set(masks.sample(noise))
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        lagrangian.step(masks, step)
    found = plan.select(shape, {"intermediate": masks.log_alpha["intermediate"].detach()}, target)
    removed = found.gates["intermediate"] == 0
    assert float(planted.flatten()[removed].float().mean()) > 0.9


def test_streamed_data_is_the_same_on_any_number_of_processes_and_from_any_step(checkpoint, data, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    lines = data.read_text().splitlines()
    for i in range(4):
        (folder / f"{i}.jsonl").write_text("\n".join(lines[i::4]))
    settings = {**QUICK, "data": str(folder), "stream": True, "validation_records": 4, "batch_size": 4}
    config = compresso.PruneConfig(model=str(checkpoint), output=str(tmp_path / "run"), **settings)
    bench = prepare(config)

    def drawn(processes: int, rank: int, start: int, steps: int) -> list[list[tuple[int, ...]]]:
        bench.config = replace(config, batch_size=4 // processes)
        bench.accelerator = SimpleNamespace(process_index=rank, num_processes=processes)
        following = bench.batches(0, start)
        return [sorted(tuple(row.tolist()) for b in following(0.0) for row in b.unshared().ids) for _ in range(steps)]

    alone = drawn(1, 0, 0, 6)
    shares = [drawn(2, rank, 0, 6) for rank in (0, 1)]
    for step, whole in enumerate(alone):
        # rows are padded to the longest of their batch
        together = [tuple(t for t in row if t) for rank in (0, 1) for row in shares[rank][step]]
        assert sorted(together) == sorted(tuple(t for t in row if t) for row in whole)
    assert drawn(1, 0, 4, 2) == alone[4:]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_sizes_on_the_way_are_nested_and_runs_of_their_own(checkpoint, data, tmp_path, tune):
    settings = {**QUICK, "steps": 12, "target_sparsity": 0.4, "also": "0.2,0.1", "tune": tune}
    folder = tmp_path / "run"
    last = compresso.prune(model=str(checkpoint), data=str(data), output=str(folder), **settings)
    folders = [folder / "also" / name for name in ("0.1", "0.2")] + [folder]
    plans = [plan.load(each) for each in folders]
    assert [p.sparsity for p in plans] == pytest.approx([0.1, 0.2, 0.4], abs=0.03)
    for more, fewer in itertools.pairwise(plans):
        for unit, gates in fewer.gates.items():
            assert not ((gates > 0) & (more.gates[unit] == 0)).any(), unit
    for each, target in zip(folders[:2], (0.1, 0.2), strict=True):
        summary = json.loads((each / "summary.json").read_text())
        assert summary["max_logit_difference"] < 1e-3
        assert summary["operations"]["prune"] < last["operations"]["prune"]
        assert compresso.load(each / "model")[0].num_parameters() == summary["parameters"]["after"]
        again = compresso.recover(str(each), recover_steps=2)
        assert again["target_sparsity"] == target
        assert (each / "report.html").exists()
        assert again["loss"]["recovered"] != again["loss"]["cut"]
    assert len(rows(folders[0], "prune")) < len(rows(folders[1], "prune")) < len(rows(folder, "prune")) == 12


def test_all_weights_recover_at_a_higher_rate_where_more_is_gone(checkpoint, data, tmp_path):
    """2e-4 to some 30 %, 5e-4 at a half; adapters' rate stays, and so does one that was asked for."""
    settings = {**QUICK, "model": str(checkpoint), "data": str(data), "method": "wanda", "recover_steps": 1}

    def rate():
        (row,) = rows(run, "recover")
        return row["learning_rate"]

    run = tmp_path / "fifth"
    compresso.prune(**settings, target_sparsity=0.2, output=str(run))
    assert rate() == 2e-4
    run = tmp_path / "half"
    gone = compresso.prune(**settings, target_sparsity=0.5, output=str(run))["sparsity"]
    assert rate() == pytest.approx(5e-4 * (gone / 0.5) ** 2)
    compresso.recover(str(run), learning_rate=3e-5)
    assert rate() == 3e-5
    compresso.recover(str(run), learning_rate=None, tune="lora")
    assert rate() == 1e-3


@pytest.mark.parametrize(
    ("steps", "gone", "rate", "share"),
    [
        (100, 0.5, 5e-4, 0.125),
        (424, 0.5, 5e-4, 0.125),
        (1696, 0.5, 2.5e-4, 0.25),
        (99999, 0.5, 2e-4, 0.25),
        (1696, 0.3, 2e-4, 0.125),
        (100, 0.3, 2e-4, 0.125),
    ],
)
def test_a_long_recovery_takes_smaller_steps_and_more_texts(steps, gone, rate, share):
    """Adapters' rate stays, and so does what was asked for."""
    config = compresso.PruneConfig(target_sparsity=gone, recover_steps=steps)
    assert tuning.learning_rate(config, "full", gone) == pytest.approx(rate)
    assert tuning.own_share(config, "full") == share
    assert (tuning.distill(config, "full"), tuning.distill(config, "lora")) == (0.5, 0.0)
    assert tuning.recovery_distill(config, "full") == (0.5 if gone >= 0.4 else 0.0)
    assert tuning.recovery_distill(config, "lora") == 0.0
    assert (tuning.learning_rate(config, "lora", gone), tuning.own_share(config, "lora")) == (1e-3, 0.0)
    asked = replace(config, learning_rate=3e-5, own_share=0.01, distill=0.1)
    assert tuning.distill(asked, "full") == tuning.recovery_distill(asked, "full") == 0.1
    assert (tuning.learning_rate(asked, "full", gone), tuning.own_share(asked, "full")) == (3e-5, 0.01)


def test_a_run_that_trained_nothing_recovers_later(checkpoint, data, tmp_path):
    settings = {**QUICK, "method": "wanda", "refit": True, "recover_steps": 0}
    compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / "run"), **settings)
    summary = compresso.recover(str(tmp_path / "run"), recover_steps=2)
    assert summary["loss"]["recovered"] != summary["loss"]["cut"]
    assert len(rows(tmp_path / "run", "recover")) == 2
    assert list(summary["operations"]) == ["calibration", "recover"]
    by_lora = compresso.recover(str(tmp_path / "run"), recover_steps=2, tune="lora")
    assert by_lora["loss"]["recovered"] != summary["loss"]["recovered"]
