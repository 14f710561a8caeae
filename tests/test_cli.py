"""What users type wrong: the exit code, the message, and that nothing is left behind."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from compresso import checkpoint as checkpoints
from compresso.cli import main
from compresso.config import PRESETS, STEPS, PruneConfig, changed, read_yaml
from tiny import tiny_model

QUICK = ["--steps", "4", "--recover-steps", "1", "--batch-size", "4", "--device", "cpu", "--prompt", "short"]


@pytest.fixture
def say(capsys, monkeypatch, checkpoint, data, tmp_path):
    """Run `compresso prune` with the tiny model and data unless told otherwise; gives exit code and message."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*flags: str) -> tuple[int, str]:
        given = dict(zip(["--model", "--data", "--output"], [checkpoint, data, tmp_path / "out"], strict=True))
        args = ["prune", *QUICK]
        for flag, value in given.items():
            if flag not in flags:
                args += [flag, str(value)]
        code = main([*args, *flags])
        return code, capsys.readouterr().err

    return run


def broken(folder, what, source):
    """A copy of a checkpoint with one thing wrong."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    match what:
        case "empty":
            for file in folder.iterdir():
                file.unlink()
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "pickled":
            (folder / "model.safetensors").unlink()
            torch.save({}, folder / "pytorch_model.bin")
        case "torn weights":
            whole = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        case "no tokenizer":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        case "torn config":
            (folder / "config.json").write_text("{")
        case "family":
            config["model_type"] = "gpt_bigcode"
            (folder / "config.json").write_text(json.dumps(config))
        case "quantised":
            config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
            (folder / "config.json").write_text(json.dumps(config))
        case "missing layer":
            config["num_hidden_layers"] = 4
            (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "has no config.json"),
        ("no weights", "has no *.safetensors"),
        ("pickled", "only as a pickle (pytorch_model.bin)"),
        ("torn weights", "cannot be loaded"),
        ("no tokenizer", "the tokenizer of"),
        ("torn config", "config.json is damaged"),
        ("family", "model_type 'gpt_bigcode' is not supported; supported are: llama, mistral, qwen2, qwen3"),
        ("quantised", "is quantised (gptq)"),
        ("missing layer", "lacks weights that its config asks for"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(say, checkpoint, tmp_path, what, message):
    code, said = say("--model", broken(tmp_path / "model", what, checkpoint))
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./nowhere"], "no checkpoint folder"),
        (["--model", "no-such-org/no-such-model"], "no folder 'no-such-org/no-such-model', and HF_HUB_OFFLINE is set"),
        (["--model", "broken.gguf"], "no file broken.gguf"),
        (["--target-sparsity", "0"], "target_sparsity must lie in (0, 1), got 0.0"),
        (["--target-sparsity", "1.5"], "target_sparsity must lie in (0, 1), got 1.5"),
        (["--target-sparsity", "0.9", "--units", "kv_group"], "can remove at most 0.2000"),
        (["--units", "kv_group,heads"], "unknown unit 'heads'"),
        (["--round-to", "512"], "--round-to 512 is wider"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--refit"], "--refit is for methods that score groups and channels"),
        (["--also", "0.1,0.3"], "sparsities on the way to target_sparsity (0.2), got 0.1,0.3"),
        (["--also", "0.1", "--method", "wanda"], "only l0 passes smaller sparsities"),
        (["--also", "0.1", "--precision", "4bit"], "--also needs whole weights"),
        (["--own-share", "0.5", "--precision", "4bit"], "--own-share needs whole weights"),
        (["--own-share", "1"], "own_share must lie in [0, 1)"),
        (["--tune", "full", "--precision", "4bit"], "--tune full needs whole weights"),
        (["--prompt", "lnog"], "prompt 'lnog' is neither"),
        (["--data", "none.jsonl"], "no data file none.jsonl"),
        (["--text", "none.txt"], "no text file none.txt"),
        (["--device", "tpu"], "--device must be"),
        (["--lora-targets", "query_proj"], "no matrix is called 'query_proj'"),
        (["--lora-targets", "lm_head"], "no matrix is called 'lm_head'"),
        (["--device", "mps"], "no Apple GPU"),
        (["--tracker", "wandb"], "its package is not installed"),
        (["--config", "none.yaml"], "no config file none.yaml"),
        (["--learning-rate", "-1"], "learning_rate must be above 0"),
    ],
)
def test_a_setting_that_cannot_be_met(say, tmp_path, flags, message):
    code, said = say(*flags)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_prompt_longer_than_the_context(say, tokenizer, tmp_path):
    tiny_model("llama", max_position_embeddings=128).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    code, said = say("--model", str(tmp_path / "short"), "--prompt", "long")
    assert code == 2
    assert "context only 128" in said


def test_a_chat_format_without_a_template(say, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").unlink()
    code, said = say("--model", str(tmp_path / "plain"), "--prompt-format", "chat")
    assert code == 2
    assert "the tokenizer has no chat template; use alpaca" in said


def test_records_of_no_use(say, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x", "output": ""}\n{"instruction": 1, "output": "y"}\n')
    code, said = say("--data", str(tmp_path / "bad.jsonl"))
    assert code == 2
    assert "line 1: no response; line 2: instruction must be text, found int" in said


def test_a_file_that_is_no_gguf(say, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"MZ not at all")
    code, said = say("--model", str(tmp_path / "x.gguf"))
    assert code == 2
    assert "is not a GGUF file" in said
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00torn")
    code, said = say("--model", str(tmp_path / "x.gguf"))
    assert code == 2
    assert "cannot be read as GGUF" in said


def test_an_output_that_exists_is_not_touched_without_overwrite(say, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for flags, message in (
        ((), "--overwrite to replace it"),
        (("--overwrite",), "is not a run folder (config.yaml and env.json are missing)"),
    ):
        code, said = say(*flags)
        assert code == 2
        assert message in said
    (out / "config.yaml").touch()
    (out / "env.json").touch()
    shutil.copytree(checkpoint, out / "model")
    for flags, message in (
        (("--overwrite", "--target-sparsity", "5"), "must lie in (0, 1)"),
        (("--overwrite", "--model", str(out / "model")), "which --overwrite would replace"),
    ):
        code, said = say(*flags)
        assert code == 2
        assert message in said
        assert (out / "mine.txt").read_text() == "mine"
    code, _ = say("--overwrite")
    assert code == 0
    assert not (out / "mine.txt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target_sparsty: 0.3", "unknown setting 'target_sparsty' (did you mean 'target_sparsity'?)"),
        ("target_sparsity: much", "target_sparsity must be a number, got 'much'"),
        ("data: 5", "data must be a text, got 5"),
        ("units: 5", "units must be a list, got 5"),
        ("units: [1]", "unknown unit '1'"),
        ("steps: 1.5", "steps must be a whole number, got 1.5"),
        ("gate_learning_rate: fast", "gate_learning_rate must be a number, got 'fast'"),
        ("- 1", "must hold settings"),
        ("a: [", "not valid YAML"),
        ("schedule: exponential", "schedule must be one of linear, cubic"),
        ("x: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_config_file_with_a_mistake_names_it(say, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    code, said = say("--config", str(tmp_path / "c.yaml"))
    assert code == 2
    assert message in said


def test_flags_override_the_file_and_print_config_shows_the_result(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("target_sparsity: 0.3\nunits: [intermediate]\nsteps: 7\n")
    args = ["prune", "--config", str(tmp_path / "c.yaml"), "--target-sparsity", "0.4", "--print-config"]
    assert main([*args, "--units", "kv_group,hidden"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = PruneConfig(**read_yaml(tmp_path / "printed.yaml"))
    assert (config.target_sparsity, config.steps, config.units) == (0.4, 7, ("kv_group", "hidden"))


@pytest.mark.parametrize(
    ("of_file", "args", "steps"),
    [
        ("", ["--preset", "fast"], PRESETS["fast"]),
        ("", ["--preset=best", "--steps", "9"], (9, PRESETS["best"][1])),
        ("preset: best", [], PRESETS["best"]),
        ("steps: 7", [], (7, PRESETS["default"][1])),
        ("steps: 7\nrecover_steps: 8", ["--preset", "best"], PRESETS["best"]),
    ],
)
def test_the_preset_on_the_command_line_sets_the_steps(capsys, tmp_path, of_file, args, steps):
    (tmp_path / "c.yaml").write_text(of_file or "seed: 1")
    assert main(["prune", "--config", str(tmp_path / "c.yaml"), *args, "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["steps"], printed["recover_steps"]) == steps


def test_a_preset_takes_the_place_of_former_steps():
    before = vars(PruneConfig(steps=7, recover_steps=8))
    assert [changed(before, {"preset": "fast"})[name] for name in STEPS] == [-1, -1]
    assert [changed(before, {"seed": 1})[name] for name in STEPS] == [7, 8]
    assert [changed(before, {"preset": "fast", "steps": 9})[name] for name in STEPS] == [9, -1]


def test_unknown_commands_and_flags(capsys):
    assert main(["prnue"]) == 2
    assert "did you mean 'prune'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["prune", "--target-sparsty", "0.3"])
    assert stop.value.code == 2
    assert "--target-sparsity" in capsys.readouterr().err


def test_recover_and_chat_need_a_run(capsys, tmp_path):
    assert main(["recover", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "none"), "--message", "hi"]) == 2
    assert "no checkpoint folder" in capsys.readouterr().err


def test_help_writes_settings_as_paragraphs_and_lists_as_they_are_typed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("--units A,B,... ") for line in lines)
    assert any(line.startswith("--data STR ") for line in lines)
    at = next(i for i, line in enumerate(lines) if line.startswith("--refit"))
    assert len(lines[at]) > 70
    assert len(lines[at + 1]) > 60


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["prune"],
        ["recover"],
        ["evaluate"],
        ["compare"],
        ["report"],
        ["extract"],
        ["export"],
        ["estimate"],
        ["chat"],
        ["doctor"],
    ],
)
def test_help_shows_examples_and_explains_every_flag(capsys, command):
    if command:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    else:
        assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert f"compresso {command[0] if command else 'prune'} " in said
    joined = " ".join(word for word in said.split() if word != "│")
    assert not re.search(r"[^.)] \((default:|required)", joined), "a flag is not explained"


def test_the_installed_command_stops_cleanly_on_ctrl_c(checkpoint, data, tmp_path):
    import signal
    import time

    args = ["prune", "--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out"), *QUICK]
    command = [sys.executable, "-m", "compresso.cli", *args, "--steps", "100000"]

    def hear():  # a job in the background of a script is born deaf to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=silent, text=True, preexec_fn=hear)
    metrics = tmp_path / "out" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; `compresso prune --resume {tmp_path / 'out'}` goes on" in said
    assert "Traceback" not in said


def test_a_pickle_is_never_opened(checkpoint, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("exploded",))

    folder = broken(tmp_path / "m", "no weights", checkpoint)
    torch.save(Bomb(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only as a pickle"):
        checkpoints.load(folder)
