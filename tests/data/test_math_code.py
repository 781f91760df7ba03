"""The recipes' data come from a program that names each source and its licence; here the hub is in memory."""

import datasets
import pytest

from simct.commands.recipe import find_recipe, list_recipes
from simct.console import UsageError
from simct.data.math_code import SOURCES, after_marks, boxed, main
from simct.data.records import load_records

COLUMNS = {
    "openai/gsm8k": {"answer": "3 + 4 = 7\n#### 1,007"},
    "nvidia/OpenMathInstruct-1": {"expected_answer": "5"},
    "EleutherAI/hendrycks_math": {"solution": r"so \boxed{1} or \boxed{\frac{1}{2}}"},
}


@pytest.fixture
def hub(monkeypatch):
    """Of each data set 40 rows of a part, every fourth of them not usable; how often each part was read."""
    read = []

    def load(name, config, split, streaming):
        assert split == "train" and streaming
        read.append((name, config))
        source = next(found for found in SOURCES if found.name == name)
        texts = [f"{config} {i}" if i % 4 else ("x" * 4000 if i else "") for i in range(40)]
        rows = [{source.prompt: text, **COLUMNS.get(name, {})} for text in texts]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    return read


def test_the_prompts_of_the_recipes(hub, tmp_path, capsys):
    main([str(tmp_path / "data" / "math-code.jsonl"), "--share", "0.01"])
    records = load_records(tmp_path / "data" / "math-code.jsonl")
    assert len(records) == 100 == len({(record["prompt"], record["source"]) for record in records})
    shown = capsys.readouterr().out
    for source in SOURCES:
        own = [record for record in records if record["source"] == f"{source.name} ({source.licence})"]
        assert len(own) == source.count // 100 and f"{source.name}, {source.licence}" in shown
        assert all(0 < len(record["prompt"]) < 100 for record in own)
    answers = {record["source"].split(" ")[0]: record.get("answer") for record in records}
    assert answers["openai/gsm8k"] == "1007" and answers["EleutherAI/hendrycks_math"] == r"\frac{1}{2}"
    assert answers["nvidia/OpenMathInstruct-1"] == "5" and answers["KodCode/KodCode-V1"] is None
    assert len([config for name, config in hub if name == "EleutherAI/hendrycks_math"]) == 7  # subjects


def test_a_source_that_does_not_give_enough_is_said(hub, tmp_path):
    with pytest.raises(ValueError, match=r"openai/gsm8k has 30 usable prompts in main: expected 1,800"):
        main([str(tmp_path / "all.jsonl")])
    assert not (tmp_path / "all.jsonl").exists()
    with pytest.raises(UsageError, match="--share is 2.0: expected a number above 0"):
        main([str(tmp_path / "all.jsonl"), "--share", "2"])


def test_results_of_solutions():
    assert boxed("none") is None and boxed(r"\boxed{1") is None and boxed(r"\boxed{a{b}c} d") == "a{b}c"
    assert after_marks("7") is None and after_marks("#### 12 ") == "12"


def test_recipes_say_where_their_data_come_from():
    assert sum(source.count for source in SOURCES) == 10_000
    for name in list_recipes():
        text = find_recipe(name).read_text()
        if "data/math-code.jsonl" in text:
            assert "python -m simct.data.math_code data/math-code.jsonl" in text, name
