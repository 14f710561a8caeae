"""What `compresso doctor` says of machines and runs that lack something."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from compresso import installation, prune, run_folder, savepoints
from compresso.cli import main
from compresso.findings import Finding, show
from compresso.progress import Progress
from compresso.workbench import compute_dtype
from tiny import tiny_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint, data) -> Path:
    """A run with another one inside, as of a smaller sparsity on its way."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    quick = {"steps": 3, "recover_steps": 1, "batch_size": 4, "device": "cpu", "prompt": "short", "max_length": 48}
    prune(model=str(checkpoint), data=str(data), output=str(folder), **quick)
    smaller = folder.with_name("smaller")
    shutil.copytree(folder, smaller)
    shutil.move(smaller, folder / "also" / "0.1")
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def states(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in run_folder.examine(folder)}


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_finished_run_is_whole(finished, capsys):
    found = states(finished)
    assert {finding.state for finding in found.values()} == {"good"}
    assert {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "plan.json",
        "cut",
        "model",
        "progress.json",
        "summary.json",
    } <= set(found)
    assert {"report.html", "also/0.1"} <= set(found)
    assert found["metrics.jsonl"].told == "3 steps of prune, 1 steps of recover"
    assert f"compresso chat {finished}" in found["next"].told
    assert run_folder.examine(finished / "model")[0].state == "good"


@pytest.mark.parametrize(
    ("damage", "name", "told", "following"),
    [
        (lambda run: (run / "config.yaml").write_text("[model"), "config.yaml", "is not valid YAML", "compresso chat"),
        (lambda run: (run / "env.json").write_text("["), "env.json", "env.json is damaged", "compresso chat"),
        (
            lambda run: half(run / "metrics.jsonl"),
            "metrics.jsonl",
            "metrics.jsonl, line 2 is damaged",
            "compresso chat",
        ),
        (lambda run: half(run / "plan.safetensors"), "plan.json", "plan.safetensors is damaged", "compresso chat"),
        (lambda run: half(run / "model/model.safetensors"), "model", "download it again", "compresso recover"),
        (lambda run: (run / "model/config.json").unlink(), "model", "no config.json", "compresso recover"),
        (lambda run: half(run / "model/tokenizer.json"), "model", "tokenizer.json is damaged", "compresso recover"),
        (lambda run: half(run / "cut/model.safetensors"), "cut", "download it again", "compresso chat"),
        (lambda run: half(run / "summary.json"), "summary.json", "summary.json is damaged", "compresso extract"),
        (lambda run: half(run / "report.html"), "report.html", "breaks off", "compresso chat"),
        (lambda run: (run / "eval.json").write_text("{}"), "eval.json", "is not an eval.json", "compresso chat"),
        (
            lambda run: half(run / "also/0.1/model/model.safetensors"),
            "also/0.1",
            "wrong in it: model",
            "compresso chat",
        ),
    ],
)
def test_a_damaged_file_is_named_with_what_mends_it(run, damage, name, told, following, capsys, monkeypatch):
    monkeypatch.setattr(installation, "examine", list)
    damage(run)
    found = states(run)
    assert found[name].state == "wrong"
    assert told in found[name].told
    assert found[name].do
    assert [n for n, finding in found.items() if finding.state == "wrong"] in ([name], [name, "next"])
    assert following in f"{found['next'].told} {found['next'].do}"
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert f"WRONG  {name}" in said
    assert f"  {name}: {found[name].do}" in said.partition("What to do")[2]


def test_tensors_that_the_config_asks_for_and_no_file_has(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    (found,) = run_folder.examine(folder)
    assert found.state == "wrong"
    assert "9 tensors are missing, the first is model.layers.3." in found.told


def test_tensors_that_files_call_by_another_name_are_there(tokenizer, tmp_path):
    tiny_model("gpt_neox").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (found,) = run_folder.examine(tmp_path)
    assert found.state == "good", found.told


def gone(*names):
    def remove(run):
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return remove


def unrecovered(run):
    summary = json.loads((run / "summary.json").read_text())
    for key in ("loss", "perplexity", "sample"):
        del summary[key]["recovered"]
    (run / "summary.json").write_text(json.dumps(summary))
    gone("model", "report.html")(run)


def saved(run):
    """Checkpoints as a run leaves them, the newest of which is torn, and one that was being written."""
    gone("model", "cut", "summary.json", "report.html", "also")(run)
    for step in (90, 100, 1000):
        savepoints.save(run, "prune", step, {"weights": torch.ones(step)}, {}, keep=3)
    half(run / "checkpoints/prune-001000/state-00001.safetensors")
    (run / "checkpoints/.prune-001010.compresso-partial").mkdir()
    Progress().write(run)


@pytest.mark.parametrize(
    ("stage", "told", "following"),
    [
        (unrecovered, "not recovered", "compresso recover {run}"),
        (gone("model"), "damaged or gone", "compresso recover {run}"),
        (
            gone("model", "cut", "summary.json"),
            "the model was not saved",
            "compresso extract {model} {run} --output {run}-cut",
        ),
        (
            gone("model", "cut", "summary.json", "plan.json"),
            "nothing of it can be continued",
            "compresso prune --config {run}/config.yaml --overwrite",
        ),
        (saved, "checkpoints/prune-000100 is the newest checkpoint that is whole", "compresso prune --resume {run}"),
    ],
)
def test_an_unfinished_run_says_how_to_go_on(run, stage, told, following, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(installation, "examine", list)
    stage(run)
    found = states(run)
    assert told in found["next"].told
    assert found["next"].do == following.format(run=run, model=checkpoint)
    assert main(["doctor", str(run)]) == 1
    if stage is saved:
        assert "bytes, 4,080 were written" in found["checkpoints/prune-001000"].told
        assert found["checkpoints/.prune-001010.compresso-partial"].told == "unfinished"
        assert found["progress.json"].state == "good"


def test_what_was_left_by_a_stopped_command_is_only_a_note(run, monkeypatch):
    monkeypatch.setattr(installation, "examine", list)
    (run / ".cut.compresso-partial").mkdir()
    (run / "also").mkdir(exist_ok=True)
    (run / "also/.DS_Store").touch()
    found = states(run)
    assert found[".cut.compresso-partial"].state == "note"
    assert main(["doctor", str(run)]) == 0


def test_no_run(tmp_path, capsys, finished):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is no run folder of `compresso prune`" in capsys.readouterr().err
    assert main(["doctor", str(finished)[:-1]]) == 2
    assert f"did you mean '{finished}'?" in capsys.readouterr().err


def test_this_machine_is_fit_and_the_token_stays_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in said
    assert "GFLOP/s, what --precision auto takes" in said
    assert "hub token     there is one" in said
    assert "HF_HUB_OFFLINE is set" in said
    assert "hf_secret" not in said


@pytest.mark.parametrize(("factor", "advised"), [(1.6, True), (1.2, False)])
def test_numbers_that_are_notably_faster_than_what_auto_takes_are_advised(factor, advised, monkeypatch):
    own = compute_dtype("auto", torch.device("cpu"))
    monkeypatch.setattr(installation, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(installation, "rate", lambda device, dtype: 1e11 if dtype == own else factor * 1e11)
    notes = [finding for finding in installation.examine() if finding.name == "precision"]
    assert [note.do for note in notes] == ([f"--precision {'bf16' if own == torch.float32 else 'fp32'}"] * advised)


def test_a_machine_that_lacks_things(monkeypatch, tmp_path):
    real = importlib.metadata.version

    def version(name):
        if name in ("lm-eval", "rich"):
            raise importlib.metadata.PackageNotFoundError(name)
        return {"transformers": "4.1.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 8e9, "available": 1e9}))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Disk", (), {"free": 1e9}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(installation, "rate", lambda device, dtype: 1e9)
    found = {finding.name: finding for finding in installation.examine()}
    assert found["transformers"].state == "wrong"
    assert "4.1.0, needed >=" in found["transformers"].told
    assert found["transformers"].do.startswith("pip install 'transformers>=")
    assert (found["rich"].state, found["rich"].told) == ("wrong", "not installed")
    assert found["[eval]"].state == "note"
    assert "pip install 'compresso-llm[eval]'" in found["[eval]"].told
    assert {found[name].state for name in ("memory", "this folder", "hub's cache")} == {"note"}
    assert "HF_HOME" in found["hub's cache"].do


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    found = next(f for f in installation.examine() if f.name == "memory")
    assert found.told == "2.0 GB free of 3.0 GB that this container or job may take"
    assert found.state == "note"


def test_marks_have_colours_on_a_terminal_and_none_elsewhere():
    findings = [Finding("one", "good", "[fine]"), Finding("two", "wrong", "broken")]
    for terminal, good, wrong in (
        (True, "\x1b[32m✓", "\x1b[31m✗"),
        (False, "  ok     one  [fine]", "  WRONG  two  broken"),
    ):
        console = Console(force_terminal=terminal, color_system="standard" if terminal else None, width=60)
        with console.capture() as said:
            show("Title", findings, console)
        assert good in said.get()
        assert wrong in said.get()
        assert "[fine]" in said.get()
