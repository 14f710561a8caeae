"""What a run writes: markup of others stays text, secrets of the environment stay out, no file drowns a page."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compresso import charts
from compresso.cli import main
from compresso.plan import save as save_plan
from compresso.report import report
from fuzz import run_files
from tiny import random_plan, tiny_model

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"
SECRETS = {
    name: f"secret-{i}-of-the-environment"
    for i, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "WANDB_API_KEY",
            "MY_PASSWORD",
        )
    )
}


class Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        assert not [key for key, _ in attrs if key.startswith("on")], "an event handler"
        assert all((value or "").startswith(("data:", "#")) for key, value in attrs if key in ("src", "href", "srcset"))


def test_a_run_keeps_secrets_out_and_markup_as_text(checkpoint, data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(charts, "picture", lambda draw: charts.Picture("data:,", "data:,", b"", 1, 1))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    model = shutil.copytree(checkpoint, tmp_path / "a <script>alert(1)<" / "script>")
    out = tmp_path / "<b onclick=x>run"
    args = ["--model", model, "--data", data, "--output", out, "--sample", SCRIPT, "--steps", 1, "--recover-steps", 1]
    quick = ["--batch-size", 2, "--device", "cpu", "--prompt", "short", "--max-length", 48]
    assert main([*map(str, ["prune", *args, *quick])]) == 0
    (out / "eval.json").write_text(run_files()["eval.json"].replace("piqa", SCRIPT))
    page = report(out).read_text()
    assert not {"script", "b"} & Tags(page).found
    assert "&lt;script&gt;alert(1)" in page
    said = "".join(capfd.readouterr())
    written = [file for file in out.rglob("*") if file.is_file()]
    assert {"env.json", "config.yaml", "report.html", "README.md", "summary.json"} <= {file.name for file in written}
    for secret in SECRETS.values():
        assert secret not in said
        assert not [file for file in written if secret.encode() in file.read_bytes()]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder of a stranger, with pictures that take no time."""
    monkeypatch.setattr(charts, "picture", lambda draw: charts.Picture("data:,", "data:,", b"", 1, 1))
    save_plan(random_plan(tiny_model("llama")), tmp_path, {})
    (tmp_path / "config.yaml").write_text("model: x\n")
    for name, content in run_files().items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_no_text_of_a_file_becomes_markup(run):
    """Every text that the files hold, keys included, is a script."""

    def spoiled(value):
        if isinstance(value, dict):
            named = {key: isinstance(inner, dict) and key in ("a", "b", "piqa") for key, inner in value.items()}
            return {SCRIPT + key if named[key] else key: spoiled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoiled(inner) for inner in value]
        kept = ("compresso-eval/1", "dense", "recovered")
        named = f"{SCRIPT}{value}" if value in ("a", "b", "piqa") else SCRIPT
        return named if isinstance(value, str) and value not in kept else value

    for name in ("summary.json", "eval.json", "env.json"):
        (run / name).write_text(json.dumps(spoiled(json.loads((run / name).read_text()))))
    lines = (run / "metrics.jsonl").read_text().replace('"prune"', '"<script>"').replace('"ramp"', '"<script>"')
    (run / "metrics.jsonl").write_text(lines)
    (run / "config.yaml").write_text(f"model: '{SCRIPT}'\ndata: '{SCRIPT}'\n")
    page = report(run).read_text()
    assert "script" not in Tags(page).found
    assert page.count("&lt;script&gt;") > 10


def test_files_that_would_drown_a_page(run, capsys):
    evaluation, summary = (json.loads((run / name).read_text()) for name in ("eval.json", "summary.json"))
    one = {"stage": "dense", "parameters": 1}
    entry = evaluation["results"]["a"]["piqa"]
    for name, content, words in (
        ("eval.json", {**evaluation, "models": {str(i): one for i in range(5000)}}, "more than 50 models"),
        ("eval.json", {**evaluation, "results": {"a": {str(i): entry for i in range(400)}}}, "have 400 rows"),
        ("eval.json", {**evaluation, "results": {"a": {str(i): entry for i in range(2000)}}}, "or 1000 figures of one"),
        ("eval.json", {**evaluation, "schema": 10**400}, "eval.json is damaged"),
        ("summary.json", {**summary, "seconds": 10**400}, "a number of 401 digits"),
        ("summary.json", {**summary, "loss": "low"}, "expected: object"),
        ("summary.json", [[]], "summary.json is damaged"),
    ):
        before = (run / name).read_text()
        (run / name).write_text(json.dumps(content))
        assert main(["report", str(run)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
        (run / name).write_text(before)
    row = {"stage": "prune", "loss": 1.0}
    for phases in (range(300), ["x" * 50]):
        (run / "metrics.jsonl").write_text("\n".join(json.dumps({**row, "phase": str(phase)}) for phase in phases))
        assert main(["report", str(run)]) == 2
        assert "changes of phase" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("[" * 100_000)
    assert main(["report", str(run)]) == 2
