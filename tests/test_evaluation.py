"""`compresso evaluate` from end to end: the contract of eval.json, suites, resuming, and what can be wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import compresso
from compresso import evaluation, measure
from compresso.cli import main
from compresso.extract import extract
from compresso.measure import settings_of
from compresso.suites import SUITES
from tiny import random_plan, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own


@pytest.fixture(scope="session")
def two(tmp_path_factory, tokenizer):
    """A dense checkpoint with room for prompts, and a pruned one that carries a prompt."""
    folder = tmp_path_factory.mktemp("two")
    dense = tiny_model("llama", max_position_embeddings=4096)
    smaller = extract(dense, random_plan(dense))
    smaller.config.collaborative_prompt = {"name": "short", "body": "You are being pruned.\n\n", "format": "alpaca"}
    for name, model in (("dense", dense), ("pruned", smaller)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "pruned", folder / "dense"


@pytest.fixture
def run(two, local, tmp_path):
    """Evaluate both models into a fresh file."""

    def evaluate(suite, models=two, **settings):
        settings = {
            "data_dir": str(local),
            "limit": 4,
            "cost": False,
            "output": str(tmp_path / "eval.json"),
            **settings,
        }
        return compresso.evaluate([str(model) for model in models], suite=suite, device="cpu", **settings)

    evaluate.output = tmp_path / "eval.json"
    return evaluate


def test_the_contract(run, two):
    found = run("commonsense,wikitext2@64,c4@64", cost=True)
    assert json.loads(run.output.read_text()) == found
    pruned, dense = (found["results"][str(model)] for model in two)
    for task in SUITES["commonsense"]:
        for name, entries in (("short", pruned), ("none", dense)):
            entry = entries[task]
            assert {"metric", "value", "stderr", "n", "shots", "version", "prompt"} <= set(entry)
            assert (entry["metric"], entry["n"], entry["shots"], entry["prompt"]) == ("acc", 4, 0, name)
            scores = entry["metrics"]["acc"]["scores"]
            assert entry["value"] == pytest.approx(sum(scores) / 4)
    assert pruned["wikitext2@64"]["prompt"] == "none"
    average = found["averages"][str(two[1])]["commonsense"]
    assert average["value"] == pytest.approx(sum(dense[t]["value"] for t in SUITES["commonsense"]) / 7)
    rows = {row["task"]: row for row in found["comparisons"]}
    assert set(rows) == {*SUITES["commonsense"], "wikitext2@64", "c4@64", "commonsense"}
    assert rows["piqa"]["difference"] == pytest.approx(dense["piqa"]["value"] - pruned["piqa"]["value"])
    nats = [sum(e["wikitext2@64"]["metrics"]["perplexity"]["scores"]) / e["wikitext2@64"]["n"] for e in (pruned, dense)]
    assert rows["wikitext2@64"]["difference"] == pytest.approx(nats[1] - nats[0])
    assert found["cost"][str(two[0])]["parameters"] < found["cost"][str(two[1])]["parameters"]
    table = run.output.with_suffix(".md").read_text()
    for word in (
        "piqa",
        "mean of commonsense",
        "0 shots",
        "window 64",
        "lm-eval 0.4",
        "seed",
        "prompt short",
        "first token",
    ):
        assert word in table, word


def test_groups_few_shot_and_generation(run, two, capsys):
    found = run("mmlu,bbh", limit=3)
    entries = found["results"][str(two[0])]
    assert entries["mmlu/mmlu_anatomy"]["shots"] == 5
    assert entries["bbh/bbh_fewshot_snarks"]["shots"] == 3
    assert entries["mmlu"]["n"] == 6
    assert entries["mmlu"]["value"] == pytest.approx(
        (entries["mmlu/mmlu_anatomy"]["value"] + entries["mmlu/mmlu_astronomy"]["value"]) / 2
    )
    assert entries["bbh/bbh_fewshot_snarks"]["metric"] == "exact_match,strip"
    assert "mmlu" in found["left_out"]
    assert "mmlu/" in found["left_out"]["mmlu"]
    assert "left out: mmlu" in capsys.readouterr().out
    assert {row["task"] for row in found["comparisons"]} >= {"mmlu", "mmlu/mmlu_anatomy", "bbh/bbh_fewshot_snarks"}


def test_what_is_known_is_not_measured_again(run, two, monkeypatch):
    first = run("piqa,arc_easy")
    calls = []
    real = measure.measure
    monkeypatch.setattr(evaluation, "measure", lambda *args: calls.append(args[1].name) or real(*args))
    assert run("piqa,arc_easy") == first
    assert calls == []
    run("piqa,boolq")
    assert calls == ["boolq", "boolq"]
    calls.clear()
    found = run("piqa", prompt="none")
    assert calls == ["piqa"], "only the pruned model had been asked with a prompt"
    assert set(found["results"][str(two[0])]) == {"piqa", "arc_easy", "boolq"}
    calls.clear()
    run("piqa", prompt="none", limit=3)
    assert calls == ["piqa", "piqa"]


def test_other_weights_under_the_same_name_are_measured_again(run, two, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(two[1], own)
    before = run("c4@64,arc_easy", models=[own])["results"][str(own)]
    model = tiny_model("llama", seed=5, max_position_embeddings=4096)
    model.save_pretrained(own)
    after = run("c4@64", models=[own])["results"][str(own)]
    assert set(after) == {"c4@64"}, "figures of the old weights are gone"
    assert after["c4@64"]["value"] != before["c4@64"]["value"]


def test_interrupted_it_goes_on(run, monkeypatch, two):
    real = measure.measure

    def stops(subject, wanted, *args):
        if wanted.name == "boolq":
            raise KeyboardInterrupt
        return real(subject, wanted, *args)

    monkeypatch.setattr(evaluation, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run("piqa,boolq,arc_easy")
    kept = json.loads(run.output.read_text())["results"]
    assert list(kept[str(two[0])]) == ["piqa"]
    calls = []
    monkeypatch.setattr(evaluation, "measure", lambda *args: calls.append(args[1].name) or real(*args))
    run("piqa,boolq,arc_easy")
    assert calls == ["boolq", "arc_easy", "piqa", "boolq", "arc_easy"]


def test_two_commands_do_not_measure_into_one_file(run, two, local, tmp_path, capsys):
    run("piqa")
    kept = run.output.read_bytes()
    holding = "import sys\nfrom pathlib import Path\nfrom compresso.one_at_a_time import alone_at\n"
    holding += f"with alone_at(Path({str(run.output)!r})):\n    print(flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen([sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        words = ["evaluate", str(two[1]), "--suite", "boolq", "--limit", "2", "--data-dir", str(local)]
        assert main([*words, "--output", str(run.output), "--no-cost"]) == 2
        assert "another command is at work with" in capsys.readouterr().err
        assert run.output.read_bytes() == kept
        other.kill()  # the lock goes with the process
    found = run("boolq")
    assert {"piqa", "boolq"} <= set(found["results"][str(two[1])])
    assert sorted(path.name for path in tmp_path.glob("*eval*")) == ["eval.json", "eval.md"]
    assert not list(tmp_path.glob(".eval*"))


def test_one_bad_file_loses_nothing_else(run, local, tmp_path, two):
    spoiled = tmp_path / "spoiled"
    shutil.copytree(local, spoiled)
    (spoiled / "boolq.jsonl").write_text('{"wrong": "columns"}\n' * 3)
    with pytest.raises(ValueError, match=r"not measured: boolq: .*\. The rest is in .*eval.json"):
        run("piqa,boolq,arc_easy", data_dir=str(spoiled))
    found = json.loads(run.output.read_text())
    assert set(found["results"][str(two[0])]) == {"piqa", "arc_easy"}
    assert "boolq" in found["left_out"]


def test_the_papers_prompt_stands_before_requests_and_in_mmlus_introduction(run, two, monkeypatch):
    """In the paper's form: with its header and tail, for MMLU without them but with a sentence in the introduction."""
    seen = {}
    real = measure.run_task

    def spy(lm, task, *args, **kwargs):
        samples, results = real(lm, task, *args, **kwargs)
        request = samples[0]["arguments"][0][0]
        seen[task.task_name] = lm.tokenizer.decode(lm.prefix), request
        return samples, results

    monkeypatch.setattr(measure, "run_task", spy)
    run("piqa,mmlu", models=two[:1])
    prefix, request = seen["piqa"]
    assert prefix.startswith("###System Instruction:\nYou are being pruned.\n\nBelow is an")
    assert prefix.endswith("###Input:\n")
    assert request.startswith("Question: the quick")
    prefix, request = seen["mmlu_anatomy"]
    assert prefix == "You are being pruned.\n\n"
    assert "about anatomy. Please take full consideration of the System Instruction" in request
    run("mmlu", models=two[:1], prompt="none")
    prefix, request = seen["mmlu_anatomy"]
    assert prefix == ""
    assert "about anatomy.\n\n" in request


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "comonsense"], "unknown suite or task 'comonsense'; the nearest are commonsense"),
        (["--suite", "arc_eazy"], "arc_easy"),
        (["--suite", "wikitext3@512"], "no perplexity; write wikitext2, ptb or c4"),
        (["--suite", "wikitext2@big"], "no perplexity"),
        (
            ["--suite", "race_high"],
            "nothing to measure. race_high: no file race_high.jsonl or race.jsonl in the folder of --data-dir",
        ),
        (["--suite", "ptb@512"], "nothing to measure. ptb@512: no such text in"),
        (["--suite", "piqa", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--suite", "piqa", "--batch-size", "many"], "batch_size must be a number of at least 1, or auto"),
        (["--suite", "piqa", "--data-dir", "nowhere"], "no folder nowhere (--data-dir)"),
        (["--suite", "piqa", "--prompt", "lang"], "prompt 'lang' is neither one of"),
        (["--suite", "piqa", "--output", "table.csv"], "output must be a .json file"),
        (["--suite", "wikitext2@8192"], "exceed the context of 4096"),
    ],
)
def test_what_a_user_can_get_wrong(arguments, message, two, local, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    local_data = [] if "--data-dir" in arguments else ["--data-dir", str(local)]
    assert main(["evaluate", str(two[0]), *arguments, *local_data, "--no-cost"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_model_without_a_tokenizer_and_a_foreign_file(two, local, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(two[1], bare)
    for file in bare.glob("token*"):
        file.unlink()
    common = ["--suite", "piqa", "--data-dir", str(local), "--no-cost"]
    assert main(["evaluate", str(two[1]), "./none", *common, "--output", str(tmp_path / "x.json")]) == 2
    assert "no checkpoint folder none" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists(), "it was said before the first was measured"
    assert main(["evaluate", str(bare), *common, "--output", str(tmp_path / "x.json")]) == 2
    assert f"the tokenizer of {bare} cannot be loaded" in capsys.readouterr().err.replace("\n", " ")
    foreign = tmp_path / "results.json"
    foreign.write_text('{"mine": 1}')
    assert main(["evaluate", str(two[1]), *common, "--output", str(foreign)]) == 2
    assert "is not an eval.json of this version" in capsys.readouterr().err.replace("\n", " ")
    assert foreign.read_text() == '{"mine": 1}'


def test_requests_beyond_the_window_are_counted_and_said(run, tokenizer, tmp_path, capsys):
    small = tmp_path / "small"
    tiny_model("llama", max_position_embeddings=24).save_pretrained(small)
    tokenizer.save_pretrained(small)
    found = run("boolq,piqa", models=[small])
    assert found["results"][str(small)]["boolq"]["cut"] == 4
    assert "boolq: 4 of 4 documents are longer than the window of 24 tokens" in capsys.readouterr().out


def test_any_family_can_be_evaluated(run, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gpt_neox", **settings, intermediate_size=64, max_position_embeddings=2048)
    folder = tmp_path / "neox"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = run("piqa", models=[folder], prompt="short", prompt_format="alpaca")
    assert found["results"][str(folder)]["piqa"]["prompt"] == "short"


def test_settings_that_change_a_figure_are_its_key(two, local):
    from compresso.config import EvaluateConfig
    from compresso.tasks import Wanted

    base = EvaluateConfig(suite="piqa", data_dir=str(local))
    subject = evaluation._load(str(two[0]), base, torch.device("cpu"))
    wanted = Wanted("piqa", "piqa", files={"test": str(local / "piqa.jsonl")})
    assert settings_of(subject, wanted, base)["prompt"] == "short"
    assert settings_of(subject, Wanted("c4@64"), base)["prompt"] == "none"


def test_parts_of_groups_and_tasks_of_the_same_name_stand_apart(run, two):
    model = str(two[1])
    found = run("mmlu", models=[model])["results"][model]
    assert (found["mmlu"]["n"], found["mmlu"]["parts"], found["mmlu"]["group_size"]) == (8, 2, 57)
    assert "2 of 57 parts" in run.output.with_suffix(".md").read_text()
    found = run("mmlu_anatomy", models=[model])["results"][model]
    assert found["mmlu_anatomy"]["shots"] == 0
    assert found["mmlu"]["n"] == 8, "the group is still whole"


def test_what_was_asked_in_two_ways_is_not_pooled(run, two, monkeypatch):
    model = str(two[1])
    run("mmlu,commonsense", models=[model])
    real = evaluation.measure

    def stops(subject, task, *args):
        if task.name in ("mmlu/mmlu_astronomy", "hellaswag"):
            raise KeyboardInterrupt
        return real(subject, task, *args)

    monkeypatch.setattr(evaluation, "measure", stops)
    for suite in ("mmlu", "piqa,hellaswag"):
        with pytest.raises(KeyboardInterrupt):
            run(suite, models=[model], prompt="short")
    found = json.loads(run.output.read_text())
    assert found["results"][model]["mmlu/mmlu_anatomy"]["prompt"] == "short"
    assert found["results"][model]["mmlu/mmlu_astronomy"]["prompt"] == "none"
    assert "mmlu" not in found["results"][model]
    assert "commonsense" not in found["averages"][model]


def test_a_figure_that_is_no_mean_over_documents_keeps_lm_evals_value():
    samples = [{"filter": "none", "metrics": ["perplexity", "acc"], "perplexity": v, "acc": 1.0} for v in (-2.0, -4.0)]
    found = measure._metrics(samples, {"perplexity,none": 20.08, "acc,none": 1.0})
    assert found["perplexity"] == {"value": 20.08, "stderr": None, "scores": None}
    assert found["acc"]["scores"] == [1.0, 1.0]


def test_a_limit_below_a_window_measures_one(run, two):
    found = run("wikitext2@1024,wikitext2@128", models=[two[1]], limit=1)["results"][str(two[1])]
    assert (found["wikitext2@1024"]["n"], found["wikitext2@128"]["n"]) == (1, 4)


def test_a_failure_leaves_the_older_figure_and_names_all_models(run, two):
    before = run("wikitext2@64,piqa")
    with pytest.raises(ValueError, match=rf"exceed the context.*{two[0]}.*exceed.*{two[1]}"):
        run("wikitext2@4096,piqa", prompt="long", prompt_format="alpaca")
    after = json.loads(run.output.read_text())
    for model in map(str, two):
        assert after["results"][model]["wikitext2@64"] == before["results"][model]["wikitext2@64"]


def test_a_model_of_nans_is_an_error_and_the_file_stays_json(run, two, tmp_path):
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "nan"
    shutil.copytree(two[1], broken)
    model = AutoModelForCausalLM.from_pretrained(two[1])
    model.model.norm.weight.data[:] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(ValueError, match=r"wikitext2@64: .*not numbers.*"):
        run("piqa,wikitext2@64", models=[broken])
    found = json.loads(run.output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["results"][str(broken)] == {}


def test_damaged_files_are_named(run, two, local, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(local, data)
    (data / "piqa.jsonl").write_text('{"goal": "x"}\nnot json\n')
    (data / "boolq.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"piqa.jsonl, line 2 is not an object in JSON.*boolq.jsonl is empty"):
        run("piqa,boolq,arc_easy", models=[two[1]], data_dir=str(data))
    assert json.loads(run.output.read_text())["results"][str(two[1])]["arc_easy"]["n"] == 4
    for damage in ('"results":{"x":[]}', '"models":{"x":[]}'):
        (tmp_path / "bad.json").write_text('{"schema":"compresso-eval/1",' + damage + "}")
        with pytest.raises(ValueError, match=r"bad.json is not an eval.json"):
            run("piqa", output=str(tmp_path / "bad.json"))
    (tmp_path / "mine.md").write_text("# Mine")
    with pytest.raises(ValueError, match=r"mine.md, where the table would go, is another text"):
        run("piqa", output=str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match=r"cannot write /proc/x\.json"):
        run("piqa", output="/proc/x.json")
    with pytest.raises(ValueError, match="named twice"):
        run("piqa", models=[two[1], f"{two[1]}/"])


def test_few_shot_tasks_in_turns_of_the_chat_template(run, two):
    found = run("mmlu,piqa", models=[two[0]], chat_template=True, prompt="short", prompt_format="chat")
    assert found["results"][str(two[0])]["mmlu"]["prompt"] == "short"


def test_a_model_with_few_positions_has_a_cost(run, tokenizer, tmp_path):
    small = tmp_path / "small"
    tiny_model("llama", max_position_embeddings=20).save_pretrained(small)
    tokenizer.save_pretrained(small)
    cost = run("wikitext2@16", models=[small], cost=True)["cost"][str(small)]
    assert cost["context"] + cost["new_tokens"] <= 20
