"""A run that is cut short goes on as if it had not been, and meets trouble once by itself."""

import gc
import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compresso
from compresso import prepare, savepoints, train, usable_records
from compresso.cli import main
from compresso.setbacks import stopped
from compresso.stopping import DIVERGED, INTERRUPTED, NO_MEMORY, NO_ROOM, Stopped
from compresso.workbench import Workbench
from faults import VARIANTS, Harness, contents, differences
from tiny import QUICK, tiny_model

KINDS = ("fp32", "bf16")
SETTINGS = {**QUICK, "target_sparsity": 0.3, "checkpoint_seconds": 0.0, "warm_start": False}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def place(checkpoint, data, tmp_path, monkeypatch):
    """Settings of a run in tmp_path, whose folder has the same name wherever it is."""
    monkeypatch.chdir(tmp_path)
    return {**SETTINGS, "model": str(checkpoint), "data": str(data), "output": "run"}


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory):
    """A run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        compresso.prune(**SETTINGS, model=str(checkpoint), data=str(data), output="run")
        return Path("run").resolve()


def trouble(monkeypatch, at, what):
    """`what` is called with the losses of these training steps, counted from 1 over all attempts."""
    original, steps = train.mixed_loss, itertools.count(1)

    def troubled(model, batch, teacher):
        losses = original(model, batch, teacher)
        return what(losses) if torch.is_grad_enabled() and next(steps) in at else losses

    monkeypatch.setattr("compresso.train.mixed_loss", troubled)


def interrupt(losses):
    raise KeyboardInterrupt


def not_a_number(losses):
    return tuple(loss * float("nan") for loss in losses)


def out_of_memory(losses):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def metrics(run="run"):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments_it_ends_as_if_left_alone(harness, variant):
    harness.survive(variant, random.Random(variant), kills=1)


@pytest.mark.parametrize("variant", ["all weights", "recover"])
def test_a_call_to_the_disk_that_fails_loses_nothing(harness, variant):
    harness.fail(variant, random.Random(variant))


@pytest.mark.parametrize("step", [1, 10])
def test_ctrl_c_saves_and_tells_how_to_go_on(place, whole, monkeypatch, step):
    trouble(monkeypatch, {step}, interrupt)
    with pytest.raises(Stopped, match=r"interrupted; `compresso prune --resume run` goes on") as stopped:
        compresso.prune(**{**place, "checkpoint_seconds": 1e6})
    assert stopped.value.exit_code == INTERRUPTED
    assert len(metrics()) == step - 1
    with pytest.raises(ValueError, match=r"exists and is not empty.*; `compresso prune --resume run` goes on"):
        compresso.prune(**place)
    assert main(["prune", "--resume", "run"]) == 0
    differing = differences(whole, Path("run").resolve())
    assert set(differing) <= {"config.yaml"}, differing


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("state-00001.safetensors", cut_short, "bytes,"),
        ("state-00001.safetensors", flip, "SHA-256 differs"),
        ("state-00001.safetensors", Path.unlink, "is missing"),
        ("facts.json", flip, "SHA-256 differs"),
        ("manifest.json", cut_short, "is damaged or missing"),
        ("manifest.json", Path.unlink, "is damaged or missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, damage, said):
    for step in (4, 5):
        savepoints.save(tmp_path, "prune", step, {"a": torch.ones(99)}, {"step": step}, keep=2)
    assert savepoints.newest(tmp_path, "prune")[0].facts["step"] == 5
    damage(tmp_path / "checkpoints" / "prune-000005" / file)
    found, wrong = savepoints.newest(tmp_path, "prune")
    assert found.facts["step"] == 4
    assert torch.equal(found.tensors()["a"], torch.ones(99))
    assert f"prune-000005/{file}" in wrong[0]
    assert said in wrong[0]


def test_a_run_goes_on_from_the_newest_whole_checkpoint(place, whole, monkeypatch, capsys):
    trouble(monkeypatch, {6}, interrupt)
    with pytest.raises(Stopped):
        compresso.prune(**place)
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["prune-000004", "prune-000005"]
    flip(Path("run/checkpoints/prune-000005/state-00001.safetensors"))
    compresso.resume("run")
    told = " ".join(capsys.readouterr().out.split())
    assert "is not what was written (its SHA-256 differs); going on from the one of step 4" in told
    assert not differences(whole, Path("run").resolve())


def test_without_a_whole_checkpoint_a_stage_begins_again(place, whole, monkeypatch):
    trouble(monkeypatch, {6}, interrupt)
    with pytest.raises(Stopped):
        compresso.prune(**place)
    for folder in Path("run/checkpoints").iterdir():
        flip(folder / "state-00001.safetensors")
    compresso.resume("run")
    assert not differences(whole, Path("run").resolve())


def test_a_loss_that_diverges_goes_back_once_with_smaller_steps(place, whole, monkeypatch, capsys):
    trouble(monkeypatch, {5}, not_a_number)
    summary = compresso.prune(**place)
    assert "at step 5 the loss is nan" in capsys.readouterr().out
    assert summary["setbacks"] == [{"kind": "diverged", "stage": "prune", "step": 4}]
    rates = [row["learning_rate"] for row in metrics() if row["stage"] == "prune"]
    assert [row["step"] for row in metrics() if row["stage"] == "prune"] == list(range(1, 9))
    before = [row["learning_rate"] for row in metrics(whole) if row["stage"] == "prune"]
    assert rates == pytest.approx(before[:4] + [rate / 2 for rate in before[4:]])


def test_a_recovery_may_go_back_after_the_gates_have(place, monkeypatch):
    trouble(monkeypatch, {5, 11}, not_a_number)
    summary = compresso.prune(**place)
    assert [setback["stage"] for setback in summary["setbacks"]] == ["prune", "recover"]


@pytest.mark.parametrize("losses", [not_a_number, lambda losses: tuple(loss * 50 for loss in losses)])
def test_a_loss_that_diverges_twice_stops(place, monkeypatch, losses):
    trouble(monkeypatch, set(range(5, 100)), losses)
    with pytest.raises(
        Stopped, match=r"at step 5 the loss is .*with smaller steps too. Lower --learning-rate"
    ) as stopped:
        compresso.prune(**place)
    assert stopped.value.exit_code == DIVERGED
    assert len(metrics()) == 4
    assert savepoints.newest(Path("run"), "prune")[0].facts["training"]["step"] == 4


def test_out_of_memory_halves_the_batch_once(place, monkeypatch, capsys):
    trouble(monkeypatch, {3}, out_of_memory)
    summary = compresso.prune(**place)
    assert "a batch is taken in 2 parts (--accumulation 2)" in " ".join(capsys.readouterr().out.split())
    assert summary["setbacks"] == [{"kind": "memory", "stage": "", "step": 0}]
    compresso.prune(**{**place, "output": "other"})
    for row, other in zip(metrics(), metrics("other"), strict=True):
        assert row["step"] == other["step"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4), "the same global batches"


def test_nothing_of_the_first_attempt_is_in_memory_when_the_second_begins(place, monkeypatch):
    trouble(monkeypatch, {3}, out_of_memory)
    left = []

    def again(folder):
        gc.collect()
        left.extend(thing for thing in gc.get_objects() if type(thing) is Workbench)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compresso.pipeline._again", again)
        with pytest.raises(KeyboardInterrupt):
            compresso.prune(**place)
    assert not left


def test_two_commands_that_begin_at_once_do_not_share_a_folder(place, monkeypatch):
    """The second is there when the first has looked and found nothing."""
    calls = itertools.count()
    original = usable_records.read_records

    def meanwhile(*given):
        if not next(calls):
            compresso.prune(**place, seed=1)
        return original(*given)

    monkeypatch.setattr("compresso.prepare.read_records", meanwhile)
    with pytest.raises(ValueError, match="exists and is not empty"):
        compresso.prune(**place)
    assert json.loads(Path("run/summary.json").read_text())["seed"] == 1


def test_a_smaller_run_that_was_recovered_meanwhile_stays(place, monkeypatch, capsys):
    trouble(monkeypatch, {8}, interrupt)
    with pytest.raises(Stopped):
        compresso.prune(**place, also=(0.1,))
    shutil.rmtree("run/checkpoints")  # as if it had been killed before it could save a later one
    recovered = compresso.recover("run/also/0.1", recover_steps=2)
    assert main(["prune", "--resume", "run"]) == 0
    assert "was recovered; it stays as it is" in " ".join(capsys.readouterr().out.split())
    assert json.loads(Path("run/also/0.1/summary.json").read_text())["loss"] == recovered["loss"]


def test_a_recovery_goes_on_only_with_the_teacher_and_the_records_that_it_began_with(
    place, whole, tmp_path, checkpoint, data, monkeypatch
):
    shutil.copytree(whole, "run")
    shutil.copytree(checkpoint, "dense")
    settings = Path("run/config.yaml")
    settings.write_text(settings.read_text().replace(f"model: {checkpoint}", f"model: {tmp_path / 'dense'}"))
    records = tmp_path / "other.jsonl"
    records.write_text(data.read_text())
    trouble(monkeypatch, {2}, interrupt)
    with pytest.raises(Stopped):
        compresso.recover("run", recover_steps=4, distill=0.5, data=str(records))
    kept = records.read_text()
    records.write_text("\n".join(kept.splitlines()[:-1]))
    with pytest.raises(ValueError, match="the records of the recovery of run: not what the run began with"):
        compresso.resume("run")
    records.write_text(kept)
    tiny_model("llama", seed=5, max_position_embeddings=512).save_pretrained("dense")
    with pytest.raises(ValueError, match="the model of run: not what the run began with"):
        compresso.resume("run")


def test_a_run_goes_on_where_another_number_format_is_native(place):
    found = [prepare.prepare(compresso.PruneConfig(**{**place, "output": kind, "precision": kind})) for kind in KINDS]
    assert found[0].progress.inputs == found[1].progress.inputs
    assert found[0].model.dtype != found[1].model.dtype


def test_out_of_memory_twice_stops(place, monkeypatch):
    trouble(monkeypatch, set(range(3, 100)), out_of_memory)
    with pytest.raises(Stopped, match=r"memory ran out .*Lower --batch-size") as stopped:
        compresso.prune(**place)
    assert stopped.value.exit_code == NO_MEMORY


@pytest.mark.parametrize("call", [8, 20, 45])
def test_a_disk_that_fails_stops_the_run_and_loses_nothing(place, whole, call):
    """Every write of the run goes through an fsync, which is where this disk is full."""
    with pytest.MonkeyPatch.context() as patch:
        calls = itertools.count(1)

        def full(descriptor):
            if next(calls) >= call:  # the first seven are of the run folder itself
                raise OSError(28, "No space left on device")

        patch.setattr("os.fsync", full)
        with pytest.raises(Stopped, match=r"No space left on device.*--resume run") as stopped:
            compresso.prune(**place)
    assert stopped.value.exit_code == NO_ROOM
    assert not list(Path("run").rglob("checkpoints/.*.compresso-partial"))
    compresso.resume("run")
    assert not differences(whole, Path("run").resolve())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("records", "the records of run: not what the run began with"),
        ("model", "the model of run: not what the run began with"),
        ("processes", "run was begun by 2 processes, and this launch has 1"),
        ("progress", "is damaged"),
        ("no progress", "has no progress.json"),
        ("nothing", "is no run folder"),
    ],
)
def test_what_cannot_go_on_is_refused(place, monkeypatch, tmp_path, capsys, change, message):
    shutil.copytree(place["model"], tmp_path / "dense")
    shutil.copy(place["data"], tmp_path / "records.jsonl")
    trouble(monkeypatch, {3}, interrupt)
    with pytest.raises(Stopped):
        compresso.prune(**{**place, "model": "dense", "data": "records.jsonl"})
    now = Path("run/progress.json")
    match change:
        case "records":
            with Path("records.jsonl").open("a") as file:
                file.write('\n{"instruction": "say", "output": "hello"}')
        case "model":
            other = compresso.load("dense")[0]
            other.model.layers[1].mlp.up_proj.weight.data *= 1.01
            other.save_pretrained("dense")
        case "processes":
            now.write_text(now.read_text().replace('"processes": 1', '"processes": 2'))
        case "progress":
            now.write_text(now.read_text()[:20])
        case "no progress":
            now.unlink()
        case "nothing":
            shutil.rmtree("run")
    assert main(["prune", "--resume", "run"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_resume_takes_no_other_settings_and_leaves_a_finished_run(whole, capsys, monkeypatch):
    assert main(["prune", "--resume", str(whole), "--steps", "9"]) == 2
    assert "leave out --steps 9" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(["prune", "--resume", str(whole)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_run_that_was_being_replaced_is_not_lost(place, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / ".run.compresso-old")  # as if it had ended between the two renamings
    assert main(["prune", "--resume", "run"]) == 0
    assert "run is finished" in capsys.readouterr().out
    assert not differences(whole, tmp_path / "run")


def test_a_recovery_that_was_stopped_goes_on(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("left alone", "stopped"):
        shutil.copytree(whole, tmp_path / name / "run")
    monkeypatch.chdir(tmp_path / "left alone")
    compresso.recover("run", recover_steps=6, learning_rate=1e-4)
    monkeypatch.chdir(tmp_path / "stopped")
    trouble(monkeypatch, {4}, interrupt)
    with pytest.raises(Stopped):
        compresso.recover("run", recover_steps=6, learning_rate=1e-4)
    compresso.resume("run")
    assert not differences(tmp_path / "left alone" / "run", tmp_path / "stopped" / "run")


def test_two_commands_do_not_work_in_one_run(whole, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    progress = json.loads(Path("run/progress.json").read_text())
    Path("run/progress.json").write_text(json.dumps({**progress, "done": False}))
    holding = "import sys\nfrom pathlib import Path\nfrom compresso.one_at_a_time import alone_in\n"
    holding += "with alone_in(Path('run')):\n    print(flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen([sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = contents(Path("run"))
        settings = ["--config", "run/config.yaml"]
        for words in (["prune", "--resume", "run"], ["recover", "run"], ["prune", *settings, "--overwrite"]):
            assert main(words) == 2
            assert "another command is at work in run" in capfd.readouterr().err
        assert contents(Path("run")) == before
        assert main(["doctor", "run"]) == 0
        assert "a command is at work in it" in capfd.readouterr().out
        other.kill()  # the lock goes with the process
    assert main(["prune", "--resume", "run"]) == 0


def test_files_that_cannot_be_copied_are_told_of_once(tmp_path):
    copies = [(f"a/{name}", f"b/{name}", f"[Errno 28] No space left on device: 'b/{name}'") for name in "xyz"]
    assert str(stopped(tmp_path, shutil.Error(copies))).startswith("[Errno 28] No space left on device: 'b/x'. What")
