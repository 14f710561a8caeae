"""Records are read from every form, and bad ones are counted and named."""

import itertools
import json

import pytest
from datasets import Dataset

from compresso.records import Source, hold_out, parse, read_sources, similar_lengths
from compresso.streams import Stream, mixed, open_streams, take_held_out

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


def test_values_of_a_csv_file_are_texts_as_they_stand(tmp_path):
    lines = ["instruction,input,output", "a,None,None", "b,,N/A", "c,x,007", "d,,True", '"e, f",,"two\nlines"']
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    read = read_sources(str(tmp_path / "a.csv"))[0].records
    assert [record.response for record in read] == ["None", "N/A", "007", "True", "two\nlines"]
    assert read[0].messages[0]["content"] == "a\n\nNone"
    assert read[4].instruction == "e, f"


def test_a_context_is_an_input():
    row = {"instruction": "What?", "context": "A lake.", "response": "Water.", "category": "qa"}
    assert parse(row) == parse({"instruction": "What?", "input": "A lake.", "output": "Water."})


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
        ("a.csv", "", "cannot be read as .csv: it has no line with the columns' names"),
        ("a.csv", b"instruction,output\na,\xe9", "cannot be read as .csv: it is not UTF-8 text"),
        ("a.parquet", "no parquet", "cannot be read as .parquet"),
        ("a.txt", "x", "cannot read .txt"),
    ],
)
def test_a_file_of_no_use_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_sources(str(tmp_path / name))


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        read_sources(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no data file"):
        read_sources(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no data file fits"):
        read_sources(f"{tmp_path}/*.jsonl")


def test_weights_decide_how_often_a_source_is_drawn(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": name, "output": name}))
    sources = read_sources(f"{tmp_path}/a.jsonl:0.7,{tmp_path}/b.jsonl:0.3")
    drawn = [record.response for record in itertools.islice(mixed(sources, 0), 2000)]
    assert drawn.count("a") / 2000 == pytest.approx(0.7, abs=0.04)
    with pytest.raises(ValueError, match="every source"):
        read_sources(f"{tmp_path}/a.jsonl:0.7,{tmp_path}/b.jsonl")
    with pytest.raises(ValueError, match="above 0"):
        read_sources(f"{tmp_path}/a.jsonl:-1")


def test_an_epoch_is_every_record_once_in_the_order_of_the_seed():
    source = Source("x", None, [parse({"text": str(i)}) for i in range(50)])
    first, again, other = ([r.text for r in itertools.islice(mixed([source], seed), 100)] for seed in (1, 1, 2))
    assert sorted(first[:50]) == sorted(first[50:]) == sorted(r.text for r in source.records)
    assert first == again != other


def test_grouping_by_length_loses_no_record():
    source = Source("x", None, [parse({"text": "x" * (1 + i * 7 % 50)}) for i in range(64)])

    def lengths(records):
        return [len(record.text) for record in records]

    groups = list(itertools.islice(similar_lengths(mixed([source], 0), 8, 4, 0, lengths), 8))
    assert sorted(r.text for g in groups for r in g) == sorted(r.text for r in source.records)
    assert max(max(lengths(g)) - min(lengths(g)) for g in groups) < 30


def test_held_out_records_are_not_trained_on():
    source = Source("x", None, [parse({"text": str(i)}) for i in range(20)])
    rest, held = hold_out([source], 48, 0)
    assert len(held) == 4
    assert not {r.text for r in held} & {r.text for r in rest[0].records}


def shards(folder, count: int, each: int, name: str = "shard") -> str:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        rows = [json.dumps({"instruction": "say", "output": f"{i} {j}"}) for j in range(each)]
        (folder / f"{name}{i}.jsonl").write_text("\n".join(rows))
    return str(folder)


def append(file, line: str) -> None:
    file.write_text(f"{file.read_text()}\n{line}")


def test_a_folder_and_a_pattern_of_files_are_one_source(tmp_path):
    folder = shards(tmp_path / "data", 3, 4)
    (tmp_path / "data" / "notes.txt").write_text("not data")
    append(tmp_path / "data" / "shard1.jsonl", "broken")
    for name, count in ((folder, 12), (f"{folder}/shard[12].jsonl", 8)):
        (source,) = read_sources(name)
        assert len(source.records) == count
        assert source.skipped == [(5, "shard1.jsonl: not JSON")]


def test_a_stream_gives_every_record_once_an_epoch_in_an_order_of_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("compresso.streams.BUFFER", 10)
    folder = shards(tmp_path / "data", 6, 20)
    append(tmp_path / "data" / "shard3.jsonl", '{"instruction": "say"}')

    def drawn(seed: int, count: int) -> list[str]:
        streams, held = take_held_out(open_streams(folder, lambda record: None), 4, 0)
        assert [record.response for record in held] == ["0 0", "0 1", "0 2", "0 3"]
        return [record.response for record in itertools.islice(mixed(streams, seed), count)]

    epochs = drawn(1, 2 * 116)
    everything = {f"{i} {j}" for i in range(6) for j in range(20)} - {"0 0", "0 1", "0 2", "0 3"}
    assert set(epochs[:116]) == set(epochs[116:]) == everything
    assert epochs[:116] != epochs[116:]
    assert drawn(1, 50) == epochs[:50]
    assert drawn(2, 50) != epochs[:50]
    assert len({response.split()[0] for response in epochs[:20]}) > 1, "a buffer mixes files"


def test_a_stream_names_what_it_leaves_out_and_refuses_to_be_empty(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"instruction": "say", "output": "no"}\nbroken\n')
    (stream,) = open_streams(str(file), lambda record: "the template refuses it")
    with pytest.raises(
        ValueError, match=r"no usable record.*line 1: the template refuses it; data.jsonl line 2: not JSON"
    ):
        stream.hold_out(4)
    with pytest.raises(FileNotFoundError):
        open_streams(str(tmp_path / "none.jsonl"), lambda record: None)


def test_tables_and_weights_stream_too(tmp_path):
    rows = [{"instruction": "say", "output": f"t{i}"} for i in range(30)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    folder = shards(tmp_path / "data", 2, 30)
    streams = open_streams(f"{tmp_path / 'a.parquet'}:0.25,{folder}:0.75", lambda record: None)
    assert all(isinstance(stream, Stream) for stream in streams)
    drawn = [record.response for record in itertools.islice(mixed(streams, 0), 1000)]
    assert sum(response.startswith("t") for response in drawn) / 1000 == pytest.approx(0.25, abs=0.05)
