"""Answers for the warm-up: sampled, checked, chosen, written."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct.commands import answers
from simct.commands.answers import AnswerArguments, as_columns, choose, write_answers
from simct.commands.recipe import find_recipe, list_recipes, read_options
from simct.data.prompts import prompt_of, render_prompt
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.rollouts import engines
from simct.rollouts.transformers_engines import StaticBatching


def right(text: str, answer: str) -> bool:
    return answer in text


@pytest.mark.parametrize(
    ("texts", "answer", "keep", "expected"),
    [
        (["it is 42", "42", "7"], "42", "shortest_correct", 1),
        (["it is 42", None, "7"], "42", "shortest_correct", 0),  # None: it did not end
        (["8", "7"], "42", "shortest_correct", None),
        (["it is 42", "7"], "42", "shortest", 1),
        (["long one", "short"], None, "shortest_correct", 1),  # nothing to check
        ([None, ""], None, "shortest", None),
        (["b 42", "a 42"], "42", "shortest_correct", 0),  # of equals the first
    ],
)
def test_choose(texts, answer, keep, expected):
    assert choose(texts, answer, keep, right) == expected


def test_no_more_is_graded_than_needed():
    graded = []
    choose(["1 long", "1", "1 longer"], "1", "shortest_correct", lambda text, answer: graded.append(text) or True)
    assert graded == ["1"]


@pytest.fixture
def data(tmp_path):
    lines = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()[:6]]
    for i, line in enumerate(lines):
        if i < 4:
            line["answer"] = "e" if i < 3 else "\u2603"  # a letter that some answer will have, and one that none has
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def arguments(data, tmp_path, **changes) -> AnswerArguments:
    defaults = dict(samples=6, max_new_tokens=40, temperature=1.0, top_p=1.0, dtype="float32")
    return AnswerArguments(
        str(ASSETS / "teacher"), str(data), str(tmp_path / "out" / "train.jsonl"), **defaults | changes
    )


def test_answers_are_written_for_the_warm_up(data, tmp_path):
    seen = []
    options = arguments(data, tmp_path)
    counts = write_answers(options, grade=right, progress=lambda done, of: seen.append((done, of)))
    assert sum(counts.values()) == 6 and counts["kept"] >= 1 and counts["kept_unchecked"] >= 1
    assert counts["no_correct_answer"] + counts["no_ended_answer"] >= 1, "the snowman is in no answer"
    assert seen == [(6, 6)]
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == counts["kept"] + counts["kept_unchecked"]
    for row in rows:
        turns = row["messages"]
        assert [turn["role"] for turn in turns][-2:] == ["user", "assistant"] and turns[-1]["content"]
    prompts = [prompt_of(record) for record in read_prompts(data)]
    assert rows[0]["messages"][0]["content"] in prompts
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]
    again = arguments(data, tmp_path / "again", columns="prompt_completion")
    assert write_answers(again, grade=right) == counts  # the same seed, the same answers
    for row, line in zip(rows, (tmp_path / "again" / "out" / "train.jsonl").read_text().splitlines(), strict=True):
        other = json.loads(line)
        assert other["prompt"] + other["completion"] == row["messages"]


@pytest.mark.parametrize("name", ["vllm", "vllm-server"])
def test_vllm_answers_with_a_context_for_the_longest_prompt(name, data, tmp_path, monkeypatch):
    """vLLM itself stands aside: what it is made with, and that its samples are those that are written."""
    made = []

    class Stand(StaticBatching):
        def __init__(self, where, **options):
            made.append((where, options))
            super().__init__(AutoModelForCausalLM.from_pretrained(ASSETS / "teacher", dtype=torch.float32))

    monkeypatch.setattr(engines, "_vllm_engine", lambda: SimpleNamespace(ColocatedVLLM=Stand))
    monkeypatch.setattr("simct.rollouts.vllm_server.ServedVLLM", Stand)
    url = {"vllm_server_url": "http://127.0.0.1:9"} if name == "vllm-server" else {}
    counts = write_answers(arguments(data, tmp_path, rollout_engine=name, **url), grade=right)
    plain = arguments(data, tmp_path / "plain")
    assert write_answers(plain, grade=right) == counts and counts["kept"]
    assert Path(plain.output).read_bytes() == (tmp_path / "out" / "train.jsonl").read_bytes()
    ((where, options),) = made
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    longest = max(len(render_prompt(prompt_of(record), tokenizer)) for record in read_prompts(data))
    assert options["max_model_len"] == longest + 40
    assert where == (url.get("vllm_server_url") or str(ASSETS / "teacher"))
    assert (options.get("dtype"), options.get("gpu_memory_utilization")) == (
        ("float32", 0.9) if name == "vllm" else (None, None)
    )


def test_engines_that_are_not_there_are_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="rollout_engine is 'vllm', but vLLM is not installed"):
        write_answers(arguments(data, tmp_path, rollout_engine="vllm"), grade=right)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "BATCH", 2)
    whole = arguments(data, tmp_path / "whole")
    counts = write_answers(whole, grade=right)

    class Stopped(Exception):
        pass

    def stop(done, of):
        if done == 4:
            raise Stopped

    stopped = arguments(data, tmp_path / "stopped")
    with pytest.raises(Stopped):
        write_answers(stopped, grade=right, progress=stop)
    (partial,) = (tmp_path / "stopped" / "out").iterdir()
    partial.write_bytes(partial.read_bytes()[:-5])  # as if it had been killed while it wrote its second part
    with pytest.raises(
        ValueError, match=r"unfinished run that differs \(samples: 6, now 5\): repeat its options, or remove"
    ):
        write_answers(dataclasses.replace(stopped, samples=5), grade=right)
    done = []
    with pytest.warns(UserWarning, match="going on after 1 finished parts"):
        assert write_answers(stopped, grade=right, progress=lambda n, of: done.append(n)) == counts
    assert done == [4, 6]
    files = [(tmp_path / name / "out" / "train.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1] and not partial.exists()


def test_data_that_changed_are_not_gone_on_with(data, tmp_path):
    options = arguments(data, tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_answers(options, grade=right, progress=lambda done, of: 1 / 0)
    data.write_text(data.read_text().replace("\\u2603", "7"))
    with pytest.raises(ValueError, match="unfinished run that differs .data: '6 prompts, sha256"):
        write_answers(options, grade=right)


def test_as_columns_keeps_a_conversation():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert as_columns(turns, "4", "messages")["messages"] == [*turns, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "longest"}, "keep is 'longest': expected one of 'shortest_correct', 'shortest'"),
        ({"columns": "text"}, "columns is 'text'"),
        ({"samples": 0}, "samples is 0: expected at least 1"),
        ({"dtype": "int4ish"}, "dtype is 'int4ish'"),
        ({"rollout_engine": "vllms"}, "rollout_engine is 'vllms': expected one of 'auto'"),
        ({"rollout_engine": "vllm-server"}, "vllm_server_url is not given: expected http://host:port"),
    ],
)
def test_options_out_of_range(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(data, tmp_path, **changes)


def test_bad_input_ends_before_any_sampling(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for changes, message in (
        ({"data": "nowhere.jsonl"}, "data file 'nowhere.jsonl' does not exist"),
        ({"model": str(tmp_path / "nowhere")}, "model .* cannot be loaded"),
        ({"output": str(tmp_path / "file" / "train.jsonl")}, "output .* cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            write_answers(dataclasses.replace(arguments(data, tmp_path), **changes), grade=right)
    assert not list(tmp_path.glob("**/*.partial")), "nothing was begun"


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.endswith("/answers")])
def test_recipes_hold_its_options(name):
    AnswerArguments(**read_options(find_recipe(name)))
