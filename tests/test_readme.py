"""The README's commands and code run, on the tiny model in place of the demo's."""

import re
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from compresso.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
QUICK = [
    "--steps",
    "4",
    "--recover-steps",
    "1",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--prompt",
    "short",
    "--max-length",
    "48",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own
def test_commands(place, checkpoint, data, local, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("compresso ")]
    assert {line.split()[1] for line in commands} == set(COMMANDS)
    for line in commands:
        message = re.search(r'--message "(.*)"', line)
        words = re.sub(r' --message ".*"', "", line).split()[1:]
        words = [{"1000": "2", "200": "1", "100": "2", "50": "3"}.get(word, word) for word in words]
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        for flag, value in (("--model", checkpoint), ("--data", data)):
            if flag in words:
                words[words.index(flag) + 1] = str(value)
        if words[0] == "prune" and "--resume" not in words:
            words += QUICK
        if words[0] in ("evaluate", "compare"):
            words = [str(checkpoint) if word == "demo" else word for word in words]
        if words[0] == "extract":
            words = [str(checkpoint) if word in ("./my-llama", "./my-smollm2") else word for word in words]
        if words[0] == "evaluate":
            words += ["--data-dir", str(local), "--device", "cpu"]
        if message:
            words += ["--message", message[1], "--max-new-tokens", "5"]
        assert main(words) == 0, (line, capsys.readouterr().err)


def test_python(place, checkpoint, data, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ours, loading = blocks("python")
    quick = f'data="{data}", batch_size=4, device="cpu", prompt="short", '
    ours = ours.replace("steps=50", "steps=3")
    exec(ours.replace('"demo"', f'"{checkpoint}"', 1).replace('data="demo", ', quick), {})
    assert "'before'" in capsys.readouterr().out
    names: dict = {}
    exec(loading.replace("runs/first", "runs/from-python"), names)
    assert names["model"].num_parameters() > 0


def test_every_file_that_is_linked_exists():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_examples(checkpoint, tmp_path, capsys):
    example = ROOT / "examples" / "hand_made_plan.py"
    runpy.run_path(str(example))["main"](str(checkpoint), str(tmp_path))
    assert "% of the prunable parameters removed" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 2
