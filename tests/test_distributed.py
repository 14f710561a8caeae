"""Two processes do what one does with the same global batch; one that dies stops the other with a message."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file

import compresso
from compresso.cli import main
from compresso.launch import in_parts
from faults import differences
from tiny import tiny_model

SETTINGS = {
    "steps": 6,
    "recover_steps": 3,
    "max_length": 48,
    "own_texts": 2,
    "prompt": "short",
    "device": "cpu",
    "precision": "fp32",
}


def launch(checkpoint: Path, data: Path, output: Path, **settings) -> subprocess.Popen:
    flags = {"model": checkpoint, "data": data, "output": output, **SETTINGS, **settings}
    words = []
    for key, value in flags.items():
        name = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return launch_prune(words)


def launch_prune(words: list[str]) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "compresso.cli", "prune", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(started: subprocess.Popen) -> str:
    """What it said; killed with all its children if it does not end."""
    try:
        return started.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        return started.communicate()[0] + "\nIT DID NOT END"


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_two_processes_equal_one_with_the_same_global_batch(checkpoint, data, tmp_path, tune):
    started = launch(checkpoint, data, tmp_path / "two", batch_size=3, tune=tune)
    together = {**SETTINGS, "batch_size": 6, "tune": tune}
    compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / "one"), **together)
    said = finish(started)
    assert started.returncode == 0, said
    assert said.count("largest logit difference") == 1, "one process speaks for all"
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(rows[0]) == len(rows[1]) == 9
    for one, two in zip(*rows, strict=True):
        assert (one["phase"], one["tokens"]) == (two["phase"], two["tokens"])
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
    plans = [load_file(tmp_path / name / "plan.safetensors") for name in ("one", "two")]
    for key in plans[0]:
        one, two = (plan[key] for plan in plans)
        assert torch.equal(one > 0, two > 0), key
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for key in weights[0]:
        torch.testing.assert_close(
            *(w[key] for w in weights), rtol=0, atol=5e-5, msg=lambda said, key=key: f"{key}: {said}"
        )


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("qwen3", {"gradient_checkpointing": True, "prompt": "none", "accumulation": 2})],
    ids=["prompt", "tied and recomputed"],
)
def test_weights_split_over_two_processes_give_what_one_process_gives(data, tokenizer, tmp_path, model_type, settings):
    checkpoint = tmp_path / "dense"
    tiny_model(model_type, max_position_embeddings=512).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    settings = {"shrink": False, "tune": "lora", "own_texts": 0, **settings}  # a model in parts writes no texts
    started = launch(checkpoint, data, tmp_path / "two", batch_size=3, sharded=True, **settings)
    together = {**SETTINGS, **settings}
    one = compresso.prune(model=str(checkpoint), data=str(data), output=str(tmp_path / "one"), batch_size=6, **together)
    said = finish(started)
    assert started.returncode == 0, said
    plans = [load_file(tmp_path / name / "plan.safetensors") for name in ("one", "two")]
    for key in plans[0]:
        torch.testing.assert_close(plans[0][key], plans[1][key], rtol=0, atol=1e-5)
    for folder in ("cut", "model"):
        weights = [load_file(tmp_path / name / folder / "model.safetensors") for name in ("one", "two")]
        assert set(weights[0]) == set(weights[1])
        for key in weights[0]:
            torch.testing.assert_close(
                *(w[key] for w in weights), rtol=0, atol=1e-5, msg=lambda said, key=key: f"{key}: {said}"
            )
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    for key in ("parameters", "prunable_parameters", "sparsity", "widths"):
        assert two[key] == json.loads(json.dumps(one[key])), key
    for key in ("loss", "perplexity"):
        assert two[key] == pytest.approx(one[key], rel=1e-3)
    assert two["max_logit_difference"] < 1e-3
    assert (tmp_path / "two" / "report.html").exists()


def test_a_process_that_dies_stops_the_other_and_the_run_goes_on_as_if_it_had_not(checkpoint, data, tmp_path):
    run, settings = tmp_path / "run", {"batch_size": 3, "steps": 30, "tune": "lora", "checkpoint_seconds": 0.0}
    started = launch(checkpoint, data, run, **settings)
    try:
        metrics = run / "metrics.jsonl"
        for _ in range(1200):
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                break
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.1)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        second = next(c for c in children if b"RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes())
        os.kill(int(second), signal.SIGKILL)
    finally:
        said = finish(started)
    assert started.returncode != 0
    with pytest.raises(ValueError, match="was begun by 2 processes, and this launch has 1"):
        compresso.resume(str(run))
    again = launch_prune(["--resume", str(run)])
    said = finish(again)
    assert again.returncode == 0, said
    assert "prune goes on after step" in said
    whole = launch(checkpoint, data, tmp_path / "whole", **settings)
    assert finish(whole)
    assert set(differences(tmp_path / "whole", run)) <= {"config.yaml"}


@pytest.mark.parametrize(
    ("kind", "stage", "split"),
    [("MULTI_GPU", None, False), ("FSDP", None, True), ("DEEPSPEED", 2, False), ("DEEPSPEED", 3, True)],
)
def test_a_launch_that_asks_for_split_weights_is_understood(kind, stage, split):
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], deepspeed_plugin=plugin)
    assert in_parts(compresso.PruneConfig(), accelerator) == split
    assert in_parts(compresso.PruneConfig(sharded=True), accelerator)


def test_splitting_in_one_process_is_refused(checkpoint, data, tmp_path, capsys):
    words = ["--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "run"), "--sharded"]
    assert main(["prune", *words]) == 2
    assert "launch with accelerate, or with torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
