import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset

from simct.data.records import load_records, part_of, place_of, read_prompts, reference_answer, rows

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = [
    {"prompt": "2 + 2?", "answer": "4", "completion": "It is 4.", "teacher": "math", "teacher_context": "Sums."},
    {"prompt": TURNS[:1], "answer": None},
    {"messages": TURNS, "prompt": None},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def parquet(path, *records):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(records)), path)
    return path


def test_jsonl_gives_a_list_with_prompts_and_every_column(tmp_path):
    records = load_records(jsonl(tmp_path / "data.jsonl", GOOD[0], "", *GOOD[1:]))
    assert isinstance(records, list)
    assert [r["prompt"] for r in records] == ["2 + 2?", TURNS[:1], TURNS[:1]]
    assert {**records[0]} == GOOD[0]
    assert [reference_answer(r) for r in records] == ["It is 4.", None, "Hello"]


def test_parquet_gives_a_data_set(tmp_path):
    records = load_records(
        parquet(tmp_path / "a.parquet", {"messages": TURNS, "id": 3}, {"messages": TURNS[:1], "id": 4})
    )
    assert isinstance(records, Dataset) and len(records) == 2
    assert [reference_answer(r) for r in records] == ["Hello", None]
    assert list(rows(records)) == [records[0], records[1]]
    assert list(rows(records, ["id"])) == [{"id": 3}, {"id": 4}]


def test_keys_that_a_table_adds_to_messages_do_not_reach_a_template(tmp_path):
    turns = [{"role": "system", "content": "Be brief.", "name": "house"}, {"role": "user", "content": "Hi"}]
    stream = load_records(parquet(tmp_path / "a.parquet", {"prompt": turns}), streaming=True)
    assert [r["prompt"] for r in stream] == [turns]  # the second message of the table has name=None


BAD = [
    ("{not json", "not JSON"),
    ("[1, 2]", "expected a JSON object, got list"),
    ("[" * 100000, "nested too deeply"),
    ({"text": "x"}, "expected a field 'prompt' or 'messages'"),
    ({"prompt": "x", "answer": 4}, "field 'answer' is 4: expected a string"),
    ({"prompt": "x", "completion": TURNS}, "field 'completion' is"),
    ({"prompt": "x", "teacher": ["a"]}, "field 'teacher' is"),
    ({"messages": [TURNS[0], {"role": "assistant"}]}, "field 'messages', the last message is"),
    ('{"prompt": "a\\ud800b"}', "half a character"),
    ('{"prompt": "x", "completion": "\\uDFFF"}', "half a character"),
    ('{"prompt": "x", "\\udc80": 1}', "half a character"),
    ('{"prompt": [{"role": "user", "content": "x", "\\ud9ab": "y"}]}', "half a character"),
    (f'{{"prompt": "x", "n": {"9" * 5000}}}', "a number that cannot be read"),
    ({"prompt": "x", "answer": ["\n\x1b[31mline 3: fine"]}, r"field 'answer' is \['\\n\\x1b"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines_are_named_or_left_out_and_reported(tmp_path, line, message, streaming):
    path = jsonl(tmp_path / "data.jsonl", GOOD[0], line, GOOD[1])
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{message}"):
        list(load_records(path, streaming=streaming))
    with pytest.warns(UserWarning, match=f"1 of 3 rows of .*data.jsonl left out: .*line 2: .*{message}"):
        assert len(list(load_records(path, streaming=streaming, on_bad_row="skip"))) == 2


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_prompts(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["prompt", "note", "messages"])
def test_text_in_a_table_that_is_not_utf8_is_named_or_left_out(tmp_path, column, streaming):
    """A table is read without a look at its text: also in a column that only the training would have read."""
    words = pa.array([b"one", b"\xff", b"three"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, words.buffers())
    if column == "messages":
        turn = pa.StructArray.from_arrays([pa.array(["user"] * 3), broken], ["role", "content"])
        columns = {"messages": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), turn)}
    else:
        columns = {"prompt": pa.array(["a", "b", "c"]), column: broken}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    path = tmp_path / "data.parquet"
    with pytest.raises(ValueError, match=f"data.parquet, row 1: field '{column}' is not UTF-8"):
        list(load_records(path, streaming=streaming))
    told = []
    records = load_records(path, streaming=streaming, on_bad_row="skip", report=told.append)
    assert len(list(records)) == 2 and told[0].startswith("1 of 3 rows")


def test_a_stream_of_the_hub_names_text_that_is_not_utf8(monkeypatch):
    words = pa.array([b"one", b"\xff", b"three"], pa.binary())
    table = pa.table({"prompt": pa.Array.from_buffers(pa.string(), 3, words.buffers())})
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: Dataset(table).to_iterable_dataset())
    with pytest.raises(ValueError, match="org/set, row 1: field 'prompt' is not UTF-8"):
        list(load_records("org/set", streaming=True))
    told = []
    found = load_records("org/set", streaming=True, on_bad_row="skip", report=told.append)
    assert [r["prompt"] for r in found] == ["one", "three"] and told[0].startswith("1 of 3 rows")


def test_every_record_knows_its_file_and_line(tmp_path):
    jsonl(tmp_path / "j" / "a.jsonl", GOOD[0], "", "{", GOOD[1])
    jsonl(tmp_path / "j" / "b.jsonl", GOOD[2])
    parquet(tmp_path / "p" / "a.parquet", {"prompt": ""}, {"prompt": "2"})
    parquet(tmp_path / "p" / "b.parquet", {"prompt": "3"}, {"prompt": "4"})
    for folder, expected in (
        ("j", ["a.jsonl, line 1", "a.jsonl, line 4", "b.jsonl, line 1"]),
        ("p", ["a.parquet, row 1", "b.parquet, row 0", "b.parquet, row 1"]),
    ):
        records = load_records(tmp_path / folder, on_bad_row="skip", report=lambda text: None)
        assert [place_of(records, i) for i in range(3)] == [f"{tmp_path / folder}/{place}" for place in expected]
        part = part_of(records, 1, 3)
        assert [part[i] for i in range(2)] == [records[1], records[2]]
        assert [place_of(part, i) for i in range(2)] == [f"{tmp_path / folder}/{place}" for place in expected[1:]]
    assert place_of([{"prompt": "x"}], 0) is None


def test_a_report_is_one_line_whatever_a_file_is_called(tmp_path):
    told = []
    load_records(jsonl(tmp_path / "a\n\x1b[2J.jsonl", GOOD[0], "{"), on_bad_row="skip", report=told.append)
    assert told[0].startswith("1 of 2 rows") and "a \\x1b[2J.jsonl, line 2: not JSON" in told[0]
    assert "\n" not in told[0] and "\x1b" not in told[0]


def test_only_the_first_bad_rows_are_shown_and_all_are_counted(tmp_path):
    path, told = jsonl(tmp_path / "data.jsonl", GOOD[0], *["{"] * 5), []
    load_records(path, on_bad_row="skip", report=told.append)
    assert len(told) == 1 and told[0].startswith("5 of 6 rows") and told[0].endswith("; and 2 more")
    assert told[0].count("not JSON") == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_parquet_are_named_by_their_file(tmp_path, streaming):
    parquet(tmp_path / "d" / "a.parquet", {"prompt": "1"}, {"prompt": "2"})
    parquet(tmp_path / "d" / "b.parquet", {"prompt": "3"}, {"prompt": ""}, {"prompt": "5"})
    with pytest.raises(ValueError, match=r"b.parquet, row 1: field 'prompt' is an empty string"):
        list(load_records(tmp_path / "d", streaming=streaming))
    told = []
    records = load_records(tmp_path / "d", streaming=streaming, on_bad_row="skip", report=told.append)
    assert [r["prompt"] for r in records] == ["1", "2", "3", "5"]
    assert len(told) == 1 and f"1 of {3 if streaming else 5} rows" in told[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_only_bad_rows_and_no_rows_are_errors(tmp_path, write, streaming):
    suffix = "jsonl" if write is jsonl else "parquet"
    with pytest.raises(ValueError, match="has only bad rows, 2 of them, the first: .* 'prompt' is an empty string"):
        list(
            load_records(
                write(tmp_path / f"bad.{suffix}", {"prompt": ""}, {"prompt": ""}),
                streaming=streaming,
                on_bad_row="skip",
            )
        )
    empty = tmp_path / f"empty.{suffix}"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), empty) if write is parquet else empty.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        list(load_records(empty, streaming=streaming))


def test_a_stream_is_read_when_asked_and_its_files_are_its_shards(tmp_path):
    for name in "abc":
        jsonl(tmp_path / "d" / f"{name}.jsonl", {"prompt": name}, {"prompt": name * 2})
    jsonl(tmp_path / "d" / "c.jsonl", {"prompt": "c"}, "{")
    stream = load_records(tmp_path / "d", streaming=True)
    assert isinstance(stream, IterableDataset) and stream.num_shards == 3
    assert [r["prompt"] for r in stream.take(4)] == ["a", "aa", "b", "bb"]
    with pytest.raises(ValueError, match="c.jsonl, line 2"):
        list(stream)
    assert [r["prompt"] for r in stream.shard(num_shards=3, index=1)] == ["b", "bb"]


def test_a_trainers_loader_with_workers_reads_a_stream(tmp_path):
    from torch.utils.data import DataLoader

    for name in "ab":
        jsonl(tmp_path / "d" / f"{name}.jsonl", *[{"prompt": f"{name}{i}"} for i in range(3)])
    loader = DataLoader(load_records(tmp_path / "d", streaming=True), batch_size=2, num_workers=2, collate_fn=list)
    assert sorted(r["prompt"] for batch in loader for r in batch) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_of_a_folder_only_the_split_is_read(tmp_path):
    folder = tmp_path / "d"
    jsonl(folder / "train-0.jsonl", {"prompt": "train"})
    jsonl(folder / "test.jsonl", {"prompt": "held out"})
    (folder / "README.md").write_text("about")
    assert [r["prompt"] for r in load_records(folder)] == ["train"]
    assert [r["prompt"] for r in load_records(folder, split="test")] == ["held out"]
    with pytest.raises(ValueError, match="has no split 'dev': expected one of train, test"):
        load_records(folder, split="dev")


def test_a_hub_name_with_its_configuration(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        dataset = Dataset.from_list([{"prompt": "1", "n": 1}, {"prompt": "", "n": 2}, {"prompt": "3", "n": 3}])
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for streaming in False, True:
        with pytest.raises(ValueError, match="org/set:main, row 1: field 'prompt' is an empty string"):
            list(load_records("org/set:main", split="test", streaming=streaming))
        told = []
        found = load_records("org/set", streaming=streaming, on_bad_row="skip", report=told.append)
        assert [r["n"] for r in found] == [1, 3] and "1 of 3" in told[0]
    assert asked == [("org/set", c, s, x) for x in (False, True) for c, s in (("main", "test"), (None, "train"))]


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "nowhere.jsonl", "nowhere.jsonl' does not exist"),
        ("./nowhere", "'./nowhere' does not exist"),
        ("org/no-such-data-set", "neither a file nor a folder here, and cannot be loaded as a data set of the hub"),
        (tmp_path / "empty", "holds no data: expected .jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            load_records(source)
    broken = tmp_path / "broken.parquet"
    broken.write_text("no table")
    for streaming in False, True:
        with pytest.raises(ValueError, match="broken.parquet'? cannot be read as Parquet"):
            list(load_records(broken, streaming=streaming))
    with pytest.raises(ValueError, match="expected a column 'prompt' or 'messages', found only .'question'"):
        load_records(parquet(tmp_path / "q.parquet", {"question": "x"}))
    jsonl(tmp_path / "both" / "a.jsonl", GOOD[0])
    parquet(tmp_path / "both" / "b.parquet", {"prompt": "x"})
    with pytest.raises(ValueError, match="both JSONL and Parquet"):
        load_records(tmp_path / "both")
    with pytest.raises(ValueError, match="on_bad_row is 'drop': expected one of stop, skip"):
        load_records(tmp_path / "both", on_bad_row="drop")


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_many_rows_are_read_by_blocks(tmp_path, write):
    path = write(tmp_path / ("many.jsonl" if write is jsonl else "many.parquet"), *[{"prompt": "x" * 200}] * 50_000)
    start = time.process_time()
    assert len(load_records(path)) == 50_000
    assert time.process_time() - start < 4  # row by row from a table takes longer than this on one slow core
