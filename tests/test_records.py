"""Records are read from every form, and bad ones are counted and named."""

import itertools
import json

import pytest
from datasets import Dataset

from compresso.records import Source, hold_out, parse, read_sources, similar_lengths, stream

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


def test_the_same_record_from_every_kind_of_file(tmp_path):
    rows = [GOOD, {**GOOD, "input": ""}, {**GOOD, "output": "three"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    read = [
        read_sources(str(tmp_path / n))[0].records for n in ("a.json", "a.jsonl", "lines.json", "a.csv", "a.parquet")
    ]
    assert len(read[0]) == 3
    assert all(records == read[0] for records in read[1:])
    assert read[0][0].messages[0]["content"] == "Add.\n\n1 2"
    assert read[0][0].response == "3"


def test_conversations_and_texts():
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    record = parse({"messages": turns})
    assert [t["role"] for t in record.messages] == ["user", "assistant"]
    assert parse({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}).response == "yo"
    assert parse({"text": "plain"}).text == "plain"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "expected an object"),
        ({"instruction": "x", "output": ""}, "no response"),
        ({"instruction": "x", "output": None}, "no response"),
        ({"instruction": "", "output": "x"}, "no instruction"),
        ({"instruction": 5, "output": "x"}, "instruction must be text, found int"),
        ({"instruction": "x", "output": ["y"]}, "output must be text, found list"),
        ({"messages": "hi"}, "list of turns"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no response"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no instruction"),
        ({"messages": [{"role": "user", "content": 1}]}, "role and a content"),
        ({"text": "  "}, "empty text"),
        ({"text": 3}, "text must be text"),
        ({"a": 1}, "found: a"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse(row)


def test_bad_lines_are_counted_and_the_first_five_named(tmp_path):
    path = tmp_path / "mixed.jsonl"
    bad = [json.dumps({"instruction": "x", "output": ""})] * 6
    path.write_text("\n".join([json.dumps(GOOD), "{torn", *bad, json.dumps(GOOD)]))
    (source,) = read_sources(str(path))
    assert len(source.records) == 2
    report = source.report()
    assert "skipped 7 of 9" in report
    assert "line 2: not JSON; line 3: no response" in report
    assert "line 6" in report
    assert "line 7" not in report


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "no usable record"),
        ("a.jsonl", '{"x": 1}', "line 1: no instruction/input/output"),
        ("a.json", "{}", "must hold a list"),
        ("a.json", "[1, ", "not valid JSON"),
        ("a.csv", "", "cannot be read as .csv"),
        ("a.parquet", "no parquet", "cannot be read as .parquet"),
        ("a.txt", "x", "cannot read .txt"),
    ],
)
def test_a_file_of_no_use_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sources(str(tmp_path / name))


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        read_sources(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="is a folder"):
        read_sources(str(tmp_path))


def test_weights_decide_how_often_a_source_is_drawn(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": name, "output": name}))
    sources = read_sources(f"{tmp_path}/a.jsonl:0.7,{tmp_path}/b.jsonl:0.3")
    drawn = [record.response for record in itertools.islice(stream(sources, 0), 2000)]
    assert drawn.count("a") / 2000 == pytest.approx(0.7, abs=0.04)
    with pytest.raises(ValueError, match="every source"):
        read_sources(f"{tmp_path}/a.jsonl:0.7,{tmp_path}/b.jsonl")
    with pytest.raises(ValueError, match="above 0"):
        read_sources(f"{tmp_path}/a.jsonl:-1")


def test_an_epoch_is_every_record_once_in_the_order_of_the_seed():
    source = Source("x", None, [parse({"text": str(i)}) for i in range(50)])
    first, again, other = ([r.text for r in itertools.islice(stream([source], seed), 100)] for seed in (1, 1, 2))
    assert sorted(first[:50]) == sorted(first[50:]) == sorted(r.text for r in source.records)
    assert first == again != other


def test_grouping_by_length_loses_no_record():
    source = Source("x", None, [parse({"text": "x" * (1 + i * 7 % 50)}) for i in range(64)])
    groups = list(itertools.islice(similar_lengths(stream([source], 0), 8, 4, 0), 8))
    assert sorted(r.length() for g in groups for r in g) == sorted(r.length() for r in source.records)
    assert max(max(r.length() for r in g) - min(r.length() for r in g) for g in groups) < 30


def test_held_out_records_are_not_trained_on():
    source = Source("x", None, [parse({"text": str(i)}) for i in range(20)])
    rest, held = hold_out([source], 48, 0)
    assert len(held) == 4
    assert not {r.text for r in held} & {r.text for r in rest[0].records}
