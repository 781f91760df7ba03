"""What a run checks of its records before its first step."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pytest
from datasets import Dataset
from transformers import LlamaConfig

from simct.data.records import load_records
from simct.training.checks import usable_records

STUDENT = SimpleNamespace(config=LlamaConfig(max_position_embeddings=64))


def render(record) -> list[int]:
    """A model that refuses what its tokenizer would."""
    prompt = record["prompt"]
    if "refused" in prompt:
        raise ValueError("refused\n\x1b[2Jrecord 0: fine")
    return list(prompt.encode())


def usable(records, on_bad_row: str):
    scorer = SimpleNamespace(teacher=SimpleNamespace(context_length=float("inf")), render=render)
    config = SimpleNamespace(max_new_tokens=8, on_bad_row=on_bad_row)
    return usable_records("train_dataset", records, STUDENT, render, {"teacher": scorer}, config)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "refused"}, r"refused \\x1b\[2Jrecord 0: fine"),
        ({"prompt": "x" * 100}, "the prompt has 100 student tokens"),
        ({"prompt": "x", "completion": "\ud800"}, "field 'completion' holds half a character"),
        ({"prompt": "x", "completion": 3}, "field 'completion' is 3"),
        ({"prompt": "x", "messages": [{"role": "assistant", "content": "\udfff"}]}, "field .messages. holds half"),
    ],
    ids=str,
)
def test_a_bad_record_is_named_before_the_first_step_or_left_out_and_counted(bad, message):
    records = [{"prompt": "one"}, bad, {"prompt": "two"}]
    with pytest.raises(ValueError, match=f"train_dataset, record 1: {message}"):
        usable(records, "stop")
    with pytest.warns(UserWarning, match=f"1 of 3 records are skipped; train_dataset, record 1: {message}") as told:
        assert usable(records, "skip") == ([records[0], records[2]], 1)
    assert all(c.isprintable() for c in str(told[0].message))


def test_a_record_of_a_file_is_named_by_its_line(tmp_path):
    lines = [{"prompt": "one"}, {"prompt": 3}, {"prompt": "two"}, {"prompt": "refused"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = load_records(tmp_path / "data.jsonl", on_bad_row="skip", report=lambda text: None)
    with pytest.raises(ValueError, match=r"data.jsonl, line 4 \(train_dataset, record 2\): refused"):
        usable(records, "stop")
    Dataset.from_list([{"prompt": "one"}, {"prompt": "refused"}]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data.parquet, row 1 \(train_dataset, record 1\): refused"):
        usable(load_records(tmp_path / "data.parquet"), "stop")


def test_a_table_of_the_users_own_may_hold_what_is_no_text():
    words = pa.array([b"one", b"\xff", b"three"], pa.binary())
    records = Dataset(pa.table({"prompt": pa.Array.from_buffers(pa.string(), 3, words.buffers())}))
    with pytest.raises(ValueError, match="train_dataset, record 1: field 'prompt' is not UTF-8"):
        usable(records, "stop")
    with pytest.warns(UserWarning, match="1 of 3 records are skipped"):
        found, skipped = usable(records, "skip")
    assert found["prompt"][:] == ["one", "three"] and skipped == 1
