"""A slice of tests/fuzz.py in every run of the tests; `make fuzz` does more."""

import datasets

import fuzz


def test_what_is_not_changed_is_taken(tmp_path, monkeypatch):
    """Else the fuzzer would see refusals of something else."""
    monkeypatch.setattr(fuzz.charts, "picture", lambda draw: fuzz.charts.Picture("", "", b"", 1, 1))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = fuzz.Kinds(tmp_path / "base")
    assert set(kinds.seeds) == set(fuzz.SHARES)
    for kind, files in kinds.seeds.items():
        name, content = next(iter(files.items()))
        where = tmp_path / kind
        where.mkdir()
        kinds.read("run" if kind == "pictures" else kind, name, content, where)


def test_damaged_files_are_taken_or_refused_and_nothing_else(tmp_path):
    result = fuzz.fuzz(300, 0, tmp_path / "kept", tmp_path / "base", leave_out=("pictures",))
    assert not result.failed, "\n".join(result.failed.values())
    assert sum(result.taken.values()) > 50
    assert sum(result.refused.values()) > 100


def test_what_fails_is_found_kept_and_repeated(tmp_path, monkeypatch):
    """Tracebacks, hangs, crashes and memory: the fuzzer tells them, and goes on after each."""
    kinds_read = fuzz.Kinds.read

    def broken(self, kind, name, data, where):
        if kind == "yaml":
            with (tmp_path / "calls").open("a") as calls:
                calls.write("x")
            match (tmp_path / "calls").stat().st_size:
                case 1:
                    raise KeyError("x")
                case 2:
                    fuzz.os.abort()
                case 3:
                    fuzz.time.sleep(60)
                case 4:
                    self.large = bytearray(2**30 + 2**28)
        kinds_read(self, kind, name, data, where)

    monkeypatch.setattr(fuzz.Kinds, "read", broken)
    monkeypatch.setattr(fuzz, "SHARES", {"yaml": 80, "jsonl": 20})
    monkeypatch.setattr(fuzz, "SECONDS", 10)
    result = fuzz.fuzz(5, 3, tmp_path / "kept", tmp_path / "base")
    told = list(result.failed.values())
    assert [words.strip().splitlines()[-1] for words in told] == [
        "KeyError: 'x'",
        "crashed with status 6",
        "took more than 10 s",
        "took 1.3 GB",
    ]
    assert result.taken["jsonl"] == 1
    name = next(iter(result.failed)).replace(":", "-")
    assert (tmp_path / "kept" / name / "c.yaml").is_file()
    assert "KeyError" in (tmp_path / "kept" / name / "what.txt").read_text()
