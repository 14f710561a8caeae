"""A hub that fails: what passes is tried again and said, what does not is told with the command to run."""

import errno
import time
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub import constants, file_download

from compresso import checkpoint as checkpoints
from compresso import hub, records, streamed, tasks, texts
from compresso.cli import main
from small_hub import serving
from tiny import tiny_model

NAME = "org/tiny"
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/tiny is restricted."}
MISSING = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
WRONG_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """Nobody sleeps; how long they would have."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def served(checkpoint, waited, tmp_path, monkeypatch):
    """A hub that serves the tiny checkpoint, and an empty cache."""
    with serving(checkpoint) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the hub of the last test
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        yield server


def same_weights(model) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model("llama").parameters(), strict=True))


@pytest.mark.parametrize(
    ("troubles", "pauses"), [([(503,), (503,)], [1, 4]), ([(429, {"Retry-After": "7"}), (500,)], [7, 4])]
)
def test_a_checkpoint_arrives_after_failures_and_the_user_is_told(served, waited, troubles, pauses, capfd):
    served.troubles = list(troubles)
    model, tokenizer = checkpoints.load(NAME)
    assert same_weights(model)
    assert tokenizer("fox")["input_ids"]
    assert waited == pauses
    said = capfd.readouterr().err
    assert f"{NAME}: HTTP {troubles[0][0]}" in said
    assert f"trying again in {pauses[1]} s (3 of 4)" in said
    served.always = (503,)
    assert same_weights(checkpoints.load(NAME)[0]), "what has arrived needs no hub"


@pytest.mark.parametrize("trouble", ["torn", 502, 504])
def test_weights_that_break_off_arrive(served, waited, trouble):
    served.aimed_at, served.troubles = r"GET .*/model\.safetensors", [(trouble,)] * 2
    assert same_weights(checkpoints.load(NAME)[0])
    assert not served.troubles
    assert waited


@pytest.mark.parametrize(
    ("always", "words"),
    [
        ((404, MISSING), ["the hub has no model 'org/tiny'", "spelling", "private", "hf auth login", "HF_TOKEN"]),
        ((401, MISSING), ["the hub has no model 'org/tiny'", "hf auth login"]),
        ((401, GATED), ["org/tiny is gated", "Accept its conditions at", "/org/tiny", "hf auth login", "HF_TOKEN"]),
        ((403, GATED), ["org/tiny is gated", "Accept its conditions at"]),
        ((401, WRONG_TOKEN), ["the hub refuses org/tiny (HTTP 401", "hf auth whoami", "hf auth login"]),
        ((503,), ["did not give org/tiny in 4 tries: HTTP 503", "HTTPS_PROXY", "hf download org/tiny"]),
        ((429, {"Retry-After": "3600"}), ["asks to wait for 3600 s"]),
    ],
)
def test_what_does_not_pass_is_told_with_the_command_to_run(served, waited, always, words, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    served.always = always
    assert main(["export", NAME, "--check"]) == 2
    said = capfd.readouterr().err
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert len(waited) == (3 if always == (503,) else 0), "only what can pass is tried again"


def test_a_hub_that_never_answers_is_given_up(served, waited, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.05)
    monkeypatch.setattr(hub, "WAITS", (1.0,))
    served.always = ("silent",)
    with pytest.raises(hub.Unavailable, match=r"in 2 tries: .*[Tt]ime"):
        checkpoints.find(NAME)
    assert waited == [1]


def test_no_hub_at_all(served, waited, monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(hub.Unavailable, match="Connect"):
        streamed.folder_of(NAME)
    assert waited == list(hub.WAITS)


def test_files_for_streaming_are_fetched_in_the_same_way(served, waited, monkeypatch):
    served.troubles = [(503,), (504,)]
    place = streamed.folder_of(NAME)
    assert (place / "model.safetensors").is_file()
    assert waited[:2] == [1, 4]


def test_a_repository_that_holds_no_model(served, tmp_path):
    served.folder = tmp_path
    with pytest.raises(FileNotFoundError, match="no folder 'org/tiny', and the hub gave no such model"):
        checkpoints.find(NAME)


def test_offline_names_the_switch_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for ask in (lambda: checkpoints.find(NAME), lambda: streamed.folder_of(NAME)):
        with pytest.raises(
            hub.Unavailable, match=r"HF_HUB_OFFLINE is set, .* no model 'org/tiny'.*`hf download org/tiny`"
        ):
            ask()
    with pytest.raises(hub.Unavailable, match=r"HF_HUB_OFFLINE is set.*hf download org/tiny --repo-type dataset"):
        records.read_sources(NAME)


@pytest.mark.parametrize(
    ("always", "words"),
    [
        ((404, MISSING), "the hub has no dataset 'org/tiny'.*datasets\\?search=tiny"),
        ((403, GATED), "org/tiny is gated.*/datasets/org/tiny"),
        ((500,), "in 4 tries: HTTP 500.*--repo-type dataset"),
    ],
)
def test_records_of_the_hub(served, always, words):
    served.always = always
    with pytest.raises(FileNotFoundError, match=f"no file 'org/tiny', and .*{words}.*--data demo"):
        records.read_sources(NAME)


def test_texts_of_the_hub(served, monkeypatch):
    monkeypatch.setitem(texts.TEXTS, "wikitext2", texts.Text((), {"path": NAME}, "text", "\n", True))
    served.always = (404, MISSING)
    with pytest.raises(FileNotFoundError, match=r"has no dataset 'org/tiny'.*--data-dir"):
        texts.read_text("wikitext2", None)


def test_tasks_of_the_hub(served, waited):
    manager = SimpleNamespace(task_index={"x": SimpleNamespace(cfg={"dataset_path": NAME})}, load=pytest.fail)
    served.always = (503,)
    with pytest.raises(hub.Unavailable, match="did not give org/tiny in 4 tries: HTTP 503"):
        tasks.build(tasks.Wanted("x", "x"), manager, prompted=False)
    assert waited == [1, 4, 15]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME to a folder on a larger disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/models/x.lock"), "/models/x.lock cannot be written"),
    ],
)
def test_a_cache_that_takes_no_more(served, monkeypatch, error, words):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(file_download, "_download_to_tmp_and_move", full)
    with pytest.raises(hub.Unavailable, match=words):
        checkpoints.find(NAME)


def test_errors_of_other_things_stay_what_they_are(served, waited):
    with pytest.raises(KeyError):
        hub.fetch(NAME, lambda: {}["x"])
    assert waited == []


def test_local_folders_ask_no_hub(served, checkpoint):
    checkpoints.load(checkpoint)
    assert not [path for path in served.seen if "/org/" in path]


def test_lines_of_a_file_are_the_rows_of_the_hub(tmp_path):
    """WikiText's rows keep the ends of their lines; PTB's are bare sentences."""
    (tmp_path / "ptb.txt").write_text(" no it was n't black monday \n but while <unk> \n\n")
    assert texts.read_text("ptb", tmp_path)[0] == "no it was n't black monday\n\nbut while <unk>"
    (tmp_path / "wikitext2.txt").write_text(" \n = Robert = \n \n An actor . \n")
    rows = ["", " = Robert = \n", "", " An actor . \n"]
    assert texts.read_text("wikitext2", tmp_path)[0] == "\n\n".join(rows)
