"""What the table says of a model, against what the forms accept."""

import json

import pytest

from compresso import extract
from compresso.cli import main
from compresso.compatibility import check, verdicts
from test_extract import gates_of
from tiny import tiny_model

EQUAL = {"kv_group": [1, 1, 1], "intermediate": [30, 30, 30]}
FFN = {"intermediate": [40, 17, 33]}
UNEQUAL = {"kv_group": [2, 1, 1], "intermediate": [40, 17, 33]}
DROPPED = {"kv_group": [0, 1, 2], "intermediate": [40, 0, 33]}


def loads(model_type, widths, **settings):
    model = tiny_model(model_type, **settings)
    return {v.runtime: v for v in verdicts(extract(model, gates_of(model, widths)))}


def test_equal_widths_load_everywhere():
    found = loads("llama", EQUAL)
    assert all(found[name].loads for name in ("transformers", "vLLM", "SGLang", "TensorRT-LLM", "MLX"))
    assert "architecture llama" in found["llama.cpp, Ollama, LM Studio"].why


def test_a_class_that_derives_the_width_of_a_head_does_not_take_fewer_heads():
    """Qwen2's own class there makes heads of hidden size / heads, whatever head_dim the config names."""
    for model_type, runtimes in (("qwen2", ("MLX", "vLLM", "SGLang")), ("granite", ("MLX",))):
        whole, fewer = (loads(model_type, widths) for widths in ({"intermediate": [30, 30, 30]}, EQUAL))
        for name in runtimes:
            assert whole[name].loads
            assert not fewer[name].loads
            assert fewer[name].do == "prune --units intermediate"
    assert loads("granite", EQUAL)["vLLM"].loads
    ffn = {"intermediate": [30, 30, 30]}
    assert not loads("gpt_neox", ffn)["MLX"].loads
    assert loads("gpt_neox", ffn)["vLLM"].loads


@pytest.mark.parametrize(
    ("widths", "vllm", "sglang"), [(FFN, True, True), (UNEQUAL, True, False), (DROPPED, False, False)]
)
def test_unequal_widths_load_where_the_backend_reads_them(widths, vllm, sglang):
    found = loads("llama", widths)
    assert not found["vLLM, own classes"].loads
    assert "nemotron-nas" in found["vLLM, own classes"].do
    assert found["vLLM, transformers backend"].loads == vllm
    assert found["SGLang, transformers backend"].loads == sglang
    assert "architecture deci" in found["llama.cpp, Ollama, LM Studio"].why


def test_what_llama_cpp_has_no_architecture_for_is_said():
    found = loads("qwen3", UNEQUAL, tie_word_embeddings=False)
    assert "no architecture" in found["llama.cpp, Ollama, LM Studio"].why
    assert found["vLLM, own classes"].do == "export --to padded"


def test_what_no_runtime_has_a_class_for_is_said():
    found = loads("opt", {"intermediate": [30, 30, 30]})
    assert found["vLLM"].loads
    assert not found["MLX"].loads
    assert "no architecture for opt" in found["llama.cpp, Ollama, LM Studio"].why
    assert "gguf" not in found["llama.cpp, Ollama, LM Studio"].do
    heads = loads("opt", EQUAL)
    assert heads["vLLM, own classes"].do == "export --to padded"
    assert heads["MLX"].do == "another runtime"


def test_the_command_prints_and_writes_the_table(checkpoint, capsys):
    assert main(["export", str(checkpoint), "--check"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((checkpoint / "compatibility.json").read_text())
    assert {entry["runtime"] for entry in written} == {v.runtime for v in check(str(checkpoint))}
    assert all(word in printed for word in ("onnxruntime", "MLX", "after export"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "gguff", "--output", "x"], "unknown format 'gguff'"),
        (["--to", "gguf"], "--to FORMAT and --output FOLDER are needed"),
        (["--to", "gguf", "--type", "q4", "--output", "x"], "unknown number format 'q4'; formats are f32, f16"),
    ],
)
def test_mistakes_are_told(flags, message, checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(checkpoint), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_written_to(checkpoint, capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", str(checkpoint), "--to", "hf", "--output", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
