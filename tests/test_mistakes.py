"""The likeliest mistakes of users: what was typed, the exit code, and what must be told so that they can go on."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from compresso import quantised
from compresso.cli import COMMANDS, main
from compresso.config import PruneConfig

ROOT = Path(__file__).parent.parent
PRUNE = "prune --model tiny --data records.jsonl --prompt short --device cpu --output out"
OFFLINE = ["HF_HUB_OFFLINE is set", "Unset it", "hf download"]

MISTAKES = [
    # commands and flags
    ("pruen --model tiny", ["unknown command 'pruen' (did you mean 'prune'?)", "commands are prune, recover"]),
    ("train --model tiny", ["unknown command 'train'; commands are prune"]),
    ("prune tiny", ["compresso prune --model tiny"]),
    ("prune --model tiny --sparsity 0.2", ["--sparsity", "Perhaps you meant", "--target-sparsity"]),
    ("prune --model tiny --target-sparsity 20%", ["--target-sparsity", "'20%'", "Share of the prunable parameters"]),
    (f"{PRUNE} --method wnada", ["'wnada'", "'wanda'"]),
    (f"{PRUNE} --precision fp16", ["'fp16'", "'bf16'"]),
    (f"{PRUNE} --units kv_group,heads", ["unknown unit 'heads'", "units are kv_group", "key/value head"]),
    (f"{PRUNE} --shape tp8", ["unknown --shape 'tp8'", "tp:N"]),
    (f"{PRUNE} --target-sparsity 0", ["must lie in (0, 1), got 0.0"]),
    (f"{PRUNE} --target-sparsity 1", ["must lie in (0, 1), got 1.0"]),
    (f"{PRUNE} --target-sparsity 20", ["must lie in (0, 1), got 20.0", "it is a share: 0.2 removes 20 %"]),
    (f"{PRUNE} --target-sparsity 0.95", ["can remove at most 0.7875", "lower --target-sparsity or add --units"]),
    (f"{PRUNE} --accumulation 16", ["accumulation (16)", "only 8 records", "raise --batch-size"]),
    (f"{PRUNE} --max-length 4", ["max_length must be at least 16, got 4"]),
    (f"{PRUNE} --device cuda", ["sees no CUDA device", "compresso doctor", "--device cpu"]),
    (f"{PRUNE} --device gpu", ["must be auto, cpu, cuda or mps, got 'gpu'"]),
    (f"{PRUNE} --sharded", ["splits the weights over processes", "torchrun --nproc-per-node 2 -m compresso.cli prune"]),
    (f"{PRUNE} --prompt long", ["has 871 tokens", "context only 512", "--prompt short"]),
    (f"{PRUNE} --prompt logn", ["'logn' is neither one of long, ", "nor a text file"]),
    # a file of settings
    ("prune --config key.yaml", ["key.yaml: unknown setting 'target_sparsty' (did you mean 'target_sparsity'?)"]),
    ("prune --config unit.yaml", ["unit.yaml: unknown unit 'heads'", "units are"]),
    ("prune --config percent.yaml", ["percent.yaml: target_sparsity must be a number, got '20%'"]),
    ("prune --config run", ["run is a folder; pass run/config.yaml"]),
    ("prune --config kye.yaml", ["no config file kye.yaml (did you mean 'key.yaml'?)", "--print-config"]),
    # models
    ("prune --model ./tniy", ["no checkpoint folder tniy (did you mean 'tiny'?)", "config.json and *.safetensors"]),
    ("prune --model models/tiyn --data records.jsonl", ["did you mean 'models/tiny'?", *OFFLINE]),
    ("prune --model meta-llama/Llama-3.1-8B --data records.jsonl", ["no folder 'meta-llama/Llama-3.1-8B'", *OFFLINE]),
    ("prune --model https://huggingface.co/org/name --data records.jsonl", ["pass the hub id alone (org/name)"]),
    ("prune --model no-weights --data records.jsonl", ["no *.safetensors weights", "--local-dir no-weights"]),
    ("prune --model empty --data records.jsonl", ["empty has no config.json", "expected config.json, *.safetensors"]),
    ("prune --model adapter --data records.jsonl", ["it holds an adapter, merge it first"]),
    ("prune --model run --data records.jsonl", ["it is a run folder, pass run/model"]),
    (
        "prune --model words --data records.jsonl --prompt short --device cpu --output out",
        ["no usable record", "gives the token '|>' the number", "the model's embedding has 300 rows"],
    ),
    # data
    (f"{PRUNE} --data recrods.jsonl", ["no data file recrods.jsonl (did you mean 'records.jsonl'?)", ".parquet"]),
    (f"{PRUNE} --data empty.jsonl", ["empty.jsonl is empty", "Expected instruction/input/output, messages or text"]),
    (f"{PRUNE} --data keys.jsonl", ["line 1", "found: question, reply", "Expected instruction/input/output"]),
    (f"{PRUNE} --data notes.txt", ["cannot read .txt", ".jsonl"]),
    (f"{PRUNE} --data nested.json", ["must hold a list of records, found an object (data)", "a record a line"]),
    (f"{PRUNE} --data records.jsonl:0.5,more.jsonl", ["has a weight (a.jsonl:0.7,b.jsonl:0.3) or none has"]),
    (
        f"{PRUNE} --data tatsu-lab/alpaca",
        ["no file 'tatsu-lab/alpaca'", *OFFLINE, "--repo-type dataset", "--data demo"],
    ),
    # outputs
    (f"{PRUNE} --output run", ["run exists and is not empty", "--overwrite to replace it"]),
    (f"{PRUNE} --output full --overwrite", ["is not a run folder", "choose another --output"]),
    (f"{PRUNE} --output notes.txt", ["notes.txt is a file; name a folder"]),
    # the other commands
    ("recover rnu", ["no run folder rnu (did you mean 'run'?)"]),
    ("recover run", ["run has no summary.json", "`compresso doctor run` tells what can be continued"]),
    ("report run", ["run has no summary.json", "`compresso prune --resume run`"]),
    ("chat notes.txt --message hi", ["notes.txt is a file; expected a checkpoint folder, a .gguf file or a hub id"]),
    ("chat run hello", ['compresso chat MODEL --message "hello"']),
    ("evaluate run --suite wikitxt@512", ["'wikitxt@512' is no perplexity; write wikitext2, ptb or c4"]),
    ("evaluate run --suite wikitext2@5", ["at least 16"]),
    ("evaluate run --data-dir nowhere", ["no folder nowhere (--data-dir)"]),
    ("evaluate run --suite wikitext2@64 --data-dir empty", ["nothing to measure", "docs/evaluation.md"]),
    ("export run", ["--to FORMAT and --output FOLDER are needed", "--check"]),
    ("export run --to ggfu --output small", ["unknown format 'ggfu' (did you mean 'gguf'?)"]),
    ("export run --to gguf --type int8 --output small", ["unknown number format 'int8'", "q8_0"]),
    ("extract tiny run", ["--output"]),
    ("extract planned tiny --output small", ["comes first, then the run: compresso extract tiny planned"]),
    ("doctor empty", ["empty is no run folder of `compresso prune`"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint, data) -> Path:
    """A folder such as users have."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("tiny", "models/tiny", "run/model"):
        shutil.copytree(checkpoint, folder / name)
    for name in ("empty", "full", "adapter", "no-weights", "planned"):
        (folder / name).mkdir()
    shutil.copy(data, folder / "records.jsonl")
    shutil.copy(data, folder / "more.jsonl")
    shutil.copy(checkpoint / "config.json", folder / "no-weights")
    texts = {
        "run/config.yaml": PruneConfig(model="tiny", data="records.jsonl").to_yaml(),
        "run/env.json": "{}",
        "full/mine.txt": "mine",
        "adapter/adapter_config.json": "{}",
        "planned/plan.json": "{}",
        "empty.jsonl": "",
        "keys.jsonl": '{"question": "a", "reply": "b"}\n',
        "nested.json": json.dumps({"data": []}),
        "notes.txt": "words",
        "key.yaml": "target_sparsty: 0.3",
        "unit.yaml": "units: [heads]",
        "percent.yaml": "target_sparsity: 20%",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    shutil.copytree(checkpoint, folder / "words")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([*(f"<{number}>" for number in range(300)), "|>"])
    tokenizer.save_pretrained(folder / "words")
    return folder


@pytest.fixture
def say(place, monkeypatch, capsys):
    """Run a command line there; gives its exit code and all that it said on stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "2000")

    def run(line: str) -> tuple[int, str]:
        before = sorted(place.rglob("*"))
        try:
            code = main(shlex.split(line))
        except SystemExit as stop:  # the parser's way
            code = int(str(stop.code))
        assert sorted(place.rglob("*")) == before, "a mistake leaves nothing behind"
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_told_so_that_it_can_be_mended(say, line, words):
    code, said = say(line)
    assert code == 2
    assert "Traceback" not in said
    for word in words:
        assert word in re.sub(r"\s+", " ", said)


def test_4bit_without_its_package(say, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    code, said = say(f"{PRUNE} --precision 4bit")
    assert code == 2
    assert "pip install 'compresso-llm[4bit]'" in said


def test_small_numbers_in_yaml_are_no_texts(tmp_path):
    assert PruneConfig(learning_rate="1e-4").learning_rate == 1e-4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning_rate must be a number, got '1e'"):
        PruneConfig(learning_rate="1e")  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_lists_the_commands(word, capsys):
    assert main([word]) == 0
    said = capsys.readouterr().out
    assert all(f"compresso {command} " in said for command in COMMANDS)


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"compresso \d+\.\d+\.\d+\n", capsys.readouterr().out)


def start(folder: Path, package: str, **options) -> subprocess.Popen:
    """The command as it is installed, with another package in place of ours."""
    (folder / "compresso").mkdir()
    (folder / "compresso" / "__init__.py").write_text(package)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src")])}
    command = [sys.executable, "-m", "compresso_command", "prune"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


@pytest.mark.parametrize(("number", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_ctrl_c_while_libraries_are_imported_ends_quietly(tmp_path, number, code, word):
    def hear():  # a job in the background of a script is born deaf to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = start(tmp_path, "print('importing', flush=True)\nimport time\ntime.sleep(20)", preexec_fn=hear)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (code, f"compresso: {word}\n")


def test_a_library_that_is_missing_is_named(tmp_path):
    process = start(tmp_path, "import no_such_library")
    _, said = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "No module named 'no_such_library'. `pip check` tells what is missing" in said
    assert "Traceback" not in said
