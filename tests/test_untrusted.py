"""Hostile checkpoints and files: each ends in exit code 2 and a message, before anything is run or allocated."""

import ast
import copy
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import gguf
import pytest

import compresso
from compresso import bounded, nemotron_nas, per_layer, untrusted
from compresso import checkpoint as checkpoints
from compresso.cli import main
from compresso.extract import extract
from compresso.plan import save as save_plan
from compresso.prompts import find_prompt
from test_gguf import ROPE, write_gguf
from tiny import random_plan, tiny_model

WEIGHTS = "model.safetensors"
EXABYTES = 2**62
DEEP = "[" * 100_000


class Evil:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def model(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def evil(tmp_path) -> bytes:
    return pickle.dumps(Evil(tmp_path / "it ran"))


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Run a command that must be refused at once, with a message that holds `words`."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(words: str, *args: str) -> None:
        began = time.perf_counter()
        code, said = main([*map(str, args)]), capsys.readouterr().err
        assert code == 2, said
        assert words in said
        assert "Traceback" not in said
        assert len(said) < 1500
        assert time.perf_counter() - began < 10
        assert not (tmp_path / "it ran").exists()

    return run


def chat(model: Path) -> list[str]:
    return ["chat", str(model), "--message", "hi", "--max-new-tokens", "2"]


def put(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


CONFIGS = [
    ("hidden_size", 10**6, "asks for"),
    ("hidden_size", -1, "hidden_size is '-1', expected a whole number from 1"),
    ("hidden_size", "32", "hidden_size is '32', expected a whole number"),
    ("hidden_size", 1e300, "expected a whole number"),
    ("hidden_size", 10**30, "expected a whole number"),
    ("hidden_size", True, "expected a whole number"),
    ("num_hidden_layers", 10**7, "num_hidden_layers is '10000000', expected a whole number from 1 to 2,048"),
    ("num_hidden_layers", 0, "expected a whole number"),
    ("num_hidden_layers", 2000, "asks for"),
    ("vocab_size", 10**12, "expected a whole number"),
    ("vocab_size", 10**8, "asks for 6,400,023,264 parameters, and its files hold 42,"),
    ("intermediate_size", 10**6, "asks for"),
    ("num_attention_heads", 0, "expected a whole number"),
    ("num_key_value_heads", 0, "expected a whole number"),
    ("head_dim", 0, "expected a whole number"),
    ("num_labels", 10**9, "expected a whole number"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps is 'nan', expected a number from 0 to 1"),
    ("rms_norm_eps", "small", "expected a number"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_theta is '0'"),
    ("rope_parameters", {"rope_type": "evil"}, "cannot be read"),
    ("hidden_act", "__import__", "cannot be read"),
    ("dtype", "evil", "cannot be read"),
    ("dtype", 7, "cannot be read"),
    ("layer_types", ["full_attention"] * 10**5, "cannot be read"),
    ("model_type", 5, "names no model_type"),
    ("model_type", "../evil", "is not supported"),
    ("quantization_config", "x", "cannot be read"),
    ("per_layer_config", "x", "cannot be read"),
    ("pad_token_id", 10**9, "cannot be read"),
    ("sub_configs", {"a": "b"}, "cannot be read"),
    ("attn_implementation", "evil/kernel", "would fetch code from the hub"),
    ("_attn_implementation", "kernels-community/evil", "would fetch code from the hub"),
    ("text_config", {"attn_implementation": {"": "evil/kernel"}}, "would fetch code from the hub"),
    ("transformers_weights", "pytorch_model.bin", "expected model.safetensors"),
    ("transformers_weights", "../other.safetensors", "expected model.safetensors"),
]


@pytest.mark.parametrize(("key", "value", "words"), CONFIGS, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(CONFIGS)])
def test_a_config_that_no_model_has(refused, model, tmp_path, data, key, value, words):
    change(model / "config.json", **{key: value})
    refused(words, "prune", "--model", model, "--data", data, "--output", tmp_path / "out", "--device", "cpu")
    assert not (tmp_path / "out").exists()
    if words != "asks for" and "files hold" not in words and key != "model_type":
        refused(words, "estimate", "--model", model)
        if key != "quantization_config":
            refused(words, *chat(model))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"model_type": "llama", "x": ' + DEEP, "config.json is damaged"),
        ("config.json", '{"model_type": "llama", "x": ' + '{"a":' * 200 + "1" + "}" * 201, "levels deep"),
        ("config.json", b'{"model_type": "llama"' + b" " * 5_000_000 + b"}", "expected at most 4"),
        ("generation_config.json", DEEP, "is damaged"),
        ("generation_config.json", '{"num_beams": 1000000000}', "num_beams is '1000000000'"),
        ("generation_config.json", '{"cache_implementation": "evil"}', "cannot be loaded"),
        ("generation_config.json", '{"penalty_alpha": 1, "top_k": 5}', "trust_remote_code"),
        ("tokenizer.json", DEEP, "is damaged"),
        (
            "tokenizer.json",
            b'{"x": "' + b"a" * 2**26 + b'"}',
            "expected at most 64",
        ),
        ("tokenizer.json", "{}", "the tokenizer of"),
        ("tokenizer_config.json", b" " * 17_000_000, "expected at most 16"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "the tokenizer of"),
        ("chat_template.jinja", "x" * 1_100_000, "expected at most 1"),
        ("adapter_config.json", '{"base_model_name_or_path": "/etc"}', "names another model to load instead"),
        (untrusted.INDEX, DEEP, "is damaged"),
        (untrusted.INDEX, "5", "has no weight_map"),
        (untrusted.INDEX, '{"weight_map": {}}', "has no weight_map"),
        (untrusted.INDEX, '{"weight_map": {"a": 5}}', "names '5'"),
    ],
)
def test_a_file_that_no_checkpoint_has(refused, model, name, content, words):
    put(model, name, content)
    refused(words, *chat(model))


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10**6}),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "xx"}] * 40},
        ),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>"}}] * 100_000}),
    ],
)
def test_a_tokenizer_that_makes_gigabytes_of_a_word(refused, model, part, settings):
    change(model / "tokenizer.json", **{part: settings})
    refused("expected at most 64 and 100,000", *chat(model))


def test_a_tokenizer_that_makes_its_library_panic(refused, model):
    """Rust's panics reach Python as no Exception."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    change(model / "tokenizer.json", model={**vocabulary, "continuing_subword_prefix": "{{ 7 * 7 }}"})
    refused("the tokenizer of", *chat(model))


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "../model.safetensors",
        "/etc/passwd",
        "/dev/zero",
        "a/b.safetensors",
        "..",
        "",
        "x.safetensors",
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_an_index_that_leads_elsewhere(refused, model, evil, tmp_path, name, beside):
    """A pickle is neither opened where an index names it beside good weights, nor a file outside the folder."""
    put(model, "pytorch_model.bin", evil)
    put(tmp_path, WEIGHTS, (model / WEIGHTS).read_bytes())
    if not beside:
        (model / WEIGHTS).rename(model / "other.safetensors")
    put(model, untrusted.INDEX, json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    words = "which is missing" if name == "x.safetensors" else "expected a *.safetensors file in the same folder"
    refused(words, *chat(model))
    refused(words, "export", model, "--check")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_pickles_are_refused_alone_and_never_opened_beside_weights(refused, model, evil, capsys, suffix):
    for stem in ("pytorch_model", "adapter_model", "training_args", "model"):
        put(model, f"{stem}.{suffix}", evil)
    put(model, "pytorch_model.bin.index.json", json.dumps({"metadata": {}, "weight_map": {"x": f"model.{suffix}"}}))
    assert main(chat(model)) == 0
    (model / WEIGHTS).unlink()
    refused("only as a pickle", *chat(model))
    put(model, WEIGHTS, evil)
    refused("cannot be loaded", *chat(model))
    put(model, "x.gguf", evil)
    refused("is not a GGUF file", *chat(model / "x.gguf"))


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "../elsewhere"])
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_links_that_leave_the_folder(refused, model, tmp_path, target, name):
    shutil.copy(model / name, tmp_path / "elsewhere")
    (model / name).unlink()
    (model / name).symlink_to(target)
    words = "leads out" if target != "/dev/zero" else "has no config.json" if name == "config.json" else "no plain file"
    refused(words, *chat(model))


def test_links_of_the_hubs_cache_are_followed(model, tmp_path, capsys):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert main(chat(snapshot)) == 0


def test_a_pipe_is_not_waited_for(refused, model):
    (model / WEIGHTS).unlink()
    os.mkfifo(model / WEIGHTS)
    refused("no plain file", *chat(model))


def header_of(whole: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def packed(header: object, body: bytes, told: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if told is None else told) + text + body


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"data_offsets": [0, 2**40]}, "takes 38400 bytes"),
        ({"data_offsets": [0, 2**60]}, "expected a dtype, a shape and two offsets"),
        ({"data_offsets": [-4, 38396]}, "expected a dtype"),
        ({"data_offsets": ["0", "4"]}, "expected a dtype"),
        ({"data_offsets": [0]}, "expected a dtype"),
        ({"data_offsets": [38400, 76800]}, "begins at"),
        ({"shape": [2**40, 2**40]}, "takes"),
        ({"shape": [-300, -32]}, "expected a dtype"),
        ({"shape": [1] * 1000}, "expected a dtype"),
        ({"shape": "300"}, "expected a dtype"),
        ({"dtype": "F128"}, "expected a dtype"),
        ({"dtype": ["F32"]}, "expected a dtype"),
        ({"dtype": "I8"}, "takes 9600 bytes"),
    ],
)
def test_a_safetensors_header_that_lies(refused, model, entry, words):
    header, body = header_of((model / WEIGHTS).read_bytes())
    put(model, WEIGHTS, packed({**header, "lm_head.weight": {**header["lm_head.weight"], **entry}}, body))
    refused(words, *chat(model))


def test_a_safetensors_file_that_is_none(refused, model, tmp_path):
    header, body = header_of((model / WEIGHTS).read_bytes())
    double = json.dumps(header)[:-1] + ', "lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    for content, words in (
        (packed(header, body, told=EXABYTES), f"a header of {EXABYTES} bytes in a file of"),
        (packed(header, body, told=2**64 - 1), "bytes in a file of"),
        (packed(header, body, told=0), "a header of 0 bytes"),
        (packed(b"{" + b" " * untrusted.LARGEST_HEADER + b"}", b""), "a header of"),
        (packed(DEEP.encode(), body), "cannot be loaded"),
        (packed([], body), "no object"),
        (packed(double.encode(), body), "names a tensor twice"),
        (packed(header, body + b"x"), "bytes, and"),
        (packed(header, body[:-1]), "bytes, and"),
        (b"", "in a file of 0"),
    ):
        put(model, WEIGHTS, content)
        refused(words, *chat(model))
        refused(words, "export", model, "--check")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "was stopped"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "was stopped"),
        ("{{ 'x' * 10 ** 10 }}", "was stopped"),
        (DOUBLING, "was stopped"),
        ("{{ '%10000000000d' % 5 }}", "was stopped"),
        ("{{ 'x' * 3000000 }}", "writes 3,0"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses it"),
        ("{{ cycler.__init__.__globals__ }}", "refuses it"),
        ("{% include '/etc/passwd' %}", "fails: TypeError: no loader"),
        ("{{ raise_exception('no') }}", "refuses it: no"),
        ("{% for %}", "refuses it"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ messages + 5 }}", "fails: TypeError"),
    ],
)
def test_a_template_that_never_ends_or_looks_around(refused, model, monkeypatch, data, tmp_path, template, words):
    monkeypatch.setattr("compresso.bounded.SECONDS", 0.5)
    put(model, "chat_template.jinja", template + "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    refused(words, *chat(model))
    if words == "was stopped":  # and not once for each record
        args = ["--data", data, "--output", tmp_path / "out", "--device", "cpu", "--prompt", "short"]
        refused(words, "prune", "--model", model, *args)


@pytest.mark.parametrize(
    "prompt",
    ["x", {"name": "a"}, {"name": 1, "body": 2, "format": 3}, {"name": "a", "body": "x" * 10**6, "format": "chat"}],
)
def test_a_prompt_that_is_none(refused, model, prompt):
    change(model / "config.json", collaborative_prompt=prompt)
    refused("collaborative_prompt in config.json must have name, body and format", *chat(model))


def test_code_that_a_checkpoint_brings_is_never_run(model, tmp_path, capsys):
    code = f"import os\nos.mkdir({str(tmp_path / 'it ran')!r})\nclass X: pass\n"
    (tmp_path / "outside.py").write_text(code)
    for name in ("evil.py", "tokenization_evil.py", "generate.py", "__init__.py", "modeling_compresso.py"):
        put(model, name, code)
    (model / "custom_generate").mkdir()
    put(model / "custom_generate", "generate.py", code)
    paths = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "../outside.X", "AutoTokenizer": ["evil.X", "a/b--evil.X"]}
    change(model / "config.json", auto_map=paths)
    change(model / "tokenizer_config.json", auto_map=paths)
    assert main(chat(model)) == 0
    change(model / "config.json", model_type="evil", architectures=["X"])
    assert main(chat(model)) == 2
    assert not (tmp_path / "it ran").exists()
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture
def small_gguf(tmp_path, tokenizer) -> Path:
    model = tiny_model("llama", vocab_size=len(tokenizer), intermediate_size=64, rope_parameters=ROPE)
    return write_gguf(tmp_path / "x.gguf", model, tokenizer)


def test_a_gguf_header_that_lies(refused, small_gguf):
    """Counts and lengths of exabytes, kinds that are none, tensors outside the file."""
    whole = small_gguf.read_bytes()
    key = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    tensor = whole.index(b"token_embd.weight") + len("token_embd.weight")
    for place, number, words in (
        (8, EXABYTES, "tensors and"),
        (16, EXABYTES, "entries, expected at most"),
        (24, EXABYTES, "bytes are named in its header"),
        (key + 8, EXABYTES, "an array of"),
        (key + 16, EXABYTES, "bytes are named in its header"),
        (tensor + 4, EXABYTES, "lies outside the file"),
        (tensor + 4 + 16 + 4, EXABYTES, "lies outside the file"),
        (4, 99, "version 99"),
    ):
        size = 4 if number == 99 else 8
        small_gguf.write_bytes(whole[:place] + number.to_bytes(size, "little") + whole[place + size :])
        refused(words, *chat(small_gguf))
        refused(words, "estimate", "--model", small_gguf)
    small_gguf.write_bytes(whole[: len(whole) // 2])
    refused("lies outside the file", *chat(small_gguf))


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda writer: writer.add_block_count(10**7), "num_hidden_layers is '10000000'"),
        (lambda writer: writer.add_embedding_length(2**30), "hidden_size is"),
        (lambda writer: writer.add_uint32("general.alignment", 2**31), "alignment"),
        (lambda writer: writer.add_array("llama.x", ["a" * 10_000] * 30_000), "bytes are named in its header"),
    ],
)
def test_a_gguf_file_that_asks_for_too_much(refused, tmp_path, add, words):
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(words, *chat(tmp_path / "y.gguf"))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "an alias (*a), expected each value written out"),
        ("&a [*a]", "an alias"),
        ("model: !!python/object/apply:os.mkdir ['it ran']", "not valid YAML"),
        ("units: " + "[" * 50_000, "not valid YAML"),
        ("units: " + "{" * 50_000, "not valid YAML"),
        ("steps: " + "9" * 90_000, "c.yaml"),
        ("x: 2001-99-99", "not valid YAML"),
        ("#" * 200_000, "more than 100,000 bytes"),
        ("k" * 1_000 + ": 1", "unknown setting"),
        ("clip: .nan", "clip must be a number"),
        ("lora_only: .inf", "lora_only must be a number"),
        ("steps: {a: b}", "steps must be a whole number"),
    ],
)
def test_settings_that_explode(refused, tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    refused(words, "prune", "--config", tmp_path / "c.yaml", "--print-config")
    refused(words, "estimate", "--config", tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda plan: plan["shape"]["layers"][0].update(intermediate_size=10**12), "no whole numbers"),
        (lambda plan: plan["shape"]["layers"][0].update(intermediate_size=10**6), "expected {"),
        (lambda plan: plan["shape"]["layers"][0].update(num_key_value_heads=-1), "no whole numbers"),
        (lambda plan: plan["shape"]["layers"][0].update(head_dim="8"), "no whole numbers"),
        (lambda plan: plan["shape"].update(hidden_size=float("nan")), "no whole numbers"),
        (lambda plan: plan["shape"].update(layers=[]), "no whole numbers"),
        (lambda plan: plan["shape"].update(layers=5), "is damaged"),
        (lambda plan: plan.update(shape=None), "is damaged"),
        (lambda plan: plan.update(format=99), "format 99"),
    ],
)
def test_a_plan_of_a_stranger(refused, checkpoint, tmp_path, edit, words):
    save_plan(random_plan(tiny_model("llama")), tmp_path, {})
    plan = json.loads((tmp_path / "plan.json").read_text())
    edit(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refused(words, "extract", checkpoint, tmp_path, "--output", tmp_path / "new")
    put(tmp_path, "plan.json", DEEP)
    refused("is damaged", "extract", checkpoint, tmp_path, "--output", tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", DEEP + "\n" + "9" * 10_000 + "\n\x00\n\xff\n"),
        ("a.json", DEEP),
        ("a.json", '{"a":' * 50_000),
        ("a.csv", "a,b\n" + '"' * 1001),
        ("a.csv", "\x00\xff\xfe"),
        ("a.parquet", b"PAR1" + b"\xff" * 64 + b"\xff\xff\xff\x7fPAR1"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pandas leaves a file open
def test_data_that_is_none(refused, checkpoint, tmp_path, name, content):
    put(tmp_path, name, content)
    args = ["--model", checkpoint, "--device", "cpu", "--prompt", "short", "--output", tmp_path / "out"]
    refused(name, "prune", "--data", tmp_path / name, *args)


def test_a_loading_script_of_a_dataset_is_never_run(refused, checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "org" / "evil"
    folder.mkdir(parents=True)
    put(folder, "evil.py", f"import os\nos.mkdir({str(tmp_path / 'it ran')!r})\n")
    monkeypatch.chdir(tmp_path)
    args = ["--model", checkpoint, "--device", "cpu", "--prompt", "short", "--output", tmp_path / "out"]
    refused("holds no data file", "prune", "--data", "org/evil", *args)
    refused("cannot read .py", "prune", "--data", "org/evil/evil.py", *args)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: piqa\ndoc_to_text: !function evil.run\n", "!function"),
        ("task: piqa\nx: !!python/object/apply:os.mkdir ['it ran']\n", "more than settings"),
        ("include: ../../outside.yaml\n", "includes"),
        ("include: /etc/passwd\n", "includes"),
    ],
)
def test_task_files_beside_documents_run_no_code(refused, checkpoint, local, tmp_path, text, words):
    folder = shutil.copytree(local, tmp_path / "local")
    put(folder, "evil.yaml", text)
    put(folder, "evil.py", f"import os\nos.mkdir({str(tmp_path / 'it ran')!r})\n")
    args = ["--suite", "piqa", "--data-dir", folder, "--limit", "1", "--output", tmp_path / "e.json", "--device", "cpu"]
    refused(words, "evaluate", checkpoint, *args)


def test_the_source_reads_no_pickle_and_trusts_no_code():
    banned = {"pickle", "joblib", "marshal", "shelve", "dill", "eval", "exec", "torch.load", "yaml.unsafe_load"}
    for file in Path(compresso.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names) | ast.ImportFrom(names=names):
                    used = {name.name for name in names} | {getattr(node, "module", None)}
                case ast.Call(func, keywords=keywords):
                    used = {ast.unparse(func)}
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                    assert given.get("trust_remote_code", "False") == "False", f"{file}:{node.lineno}"
                    assert given.get("weights_only", "True") == "True", f"{file}:{node.lineno}"
                    assert not used & {"yaml.load"} or ast.unparse(node).endswith("_Plain)"), f"{file}:{node.lineno}"
                case _:
                    continue
            assert not used & banned, f"{file}:{node.lineno}"


def test_our_own_remote_code_is_copied_unchanged_and_takes_no_text(model, tmp_path, tokenizer):
    """What travels with a checkpoint is our file, byte for byte, whatever names and templates the model brought."""
    dense = tiny_model("llama")
    dense.config._name_or_path = "'''); import os; os.mkdir('it ran')"
    smaller = extract(dense, random_plan(dense))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ '<script>' }}"
    checkpoints.save(smaller, tokenizer, find_prompt("none", "alpaca"), tmp_path / "new", "card")
    code = [file for file in (tmp_path / "new").iterdir() if file.suffix == ".py"]
    assert [file.name for file in code] == ["modeling_compresso.py"]
    assert code[0].read_bytes() == Path(per_layer.__file__).read_bytes()
    for module in (per_layer, nemotron_nas):
        text = Path(module.__file__).read_text()
        assert not re.search(r"\b(open|eval|exec|compile|__import__|environ|subprocess)\b", text)
        imported = set(re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE))
        assert imported <= {"copy", "torch", "huggingface_hub.dataclasses"} | {
            m for m in imported if m.startswith("transformers")
        }


@pytest.mark.parametrize("at", ["exists", "read_text"])
def test_ctrl_c_while_a_template_gets_its_limits_is_not_lost(at, tokenizer, monkeypatch):
    """It was taken for a template that fails: the record was left out, and the run went on."""

    class Statm:
        def exists(self):
            return self._told("exists", True)

        def read_text(self):
            return self._told("read_text", "1000 0 0")

        def _told(self, name, value):
            if name == at:
                signal.raise_signal(signal.SIGINT)
            return value

    before = signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(bounded, "STATM", Statm())
    monkeypatch.setattr(bounded, "BYTES", 2**60)
    with pytest.raises(KeyboardInterrupt):
        bounded.render(tokenizer, [{"role": "user", "content": "Hello"}], True)
    assert (signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)) == before
