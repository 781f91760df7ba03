"""The quality study: its texts, its tokenizers, and a whole run at tiny sizes."""

import csv
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.quality import gradients, settings, show
from bench.quality.__main__ import Results
from bench.quality.arms import ARMS
from bench.quality.means import mean_with_error
from bench.quality.runs import Plan, run
from bench.quality.settings import STUDENTS, TEACHER, Size, prepare
from bench.quality.texts import answer, make_sum, make_texts
from bench.record import REPOSITORY
from simct import SimCTConfig, TokenizerPair
from simct.demo import ASSETS


@pytest.fixture(scope="module")
def texts():
    """Of a part of the standard library: reading all of it takes seconds."""
    some = {"stdlib": str(Path(sysconfig.get_paths()["stdlib"]) / "asyncio")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda: some)
        return make_texts(prompts=64, held_out=16)


def test_no_prompt_is_in_two_places(texts):
    splits = [{record["prompt"] for record in part} for part in (texts.train, texts.validation, texts.test)]
    assert [len(part) for part in splits] == [64, 16, 16]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    for document in texts.documents:
        prompt = document.split("\n")[0] + "\n"
        assert not any(prompt in part for part in splits)
    for part in (texts.train, texts.validation, texts.test):
        assert sum("answer" in record for record in part) == len(part) // 2


def test_sums_and_their_answers():
    assert make_sum(17, 5, 8) == ("17+5-8\n", "17+5=22\n22-8=14\n#14")
    assert answer("17+5=22\n22-8=14\n#14") == "14" and answer("#1\n#2") == "2" and answer("22") is None


@pytest.mark.slow
def test_the_mismatch_is_dialled():
    """In all texts of the study."""
    texts = make_texts(prompts=64, held_out=16)
    teacher = TEACHER.make(texts.documents)
    samples = [document.split("\n", 1)[1] for document in texts.documents[:200]]
    single = {}
    for name, spelling in STUDENTS.items():
        pair = TokenizerPair(spelling.make(texts.documents), teacher)
        single[name] = pair.coverage(samples).rules["simpleopd"].single
    assert single["nested"] > 0.9 > single["digits"] > 0.6 > single["fine"] > single["trailing"] > 0.2, single


def test_every_arm_is_a_configuration(tmp_path):
    for arm in ARMS.values():
        SimCTConfig(output_dir=str(tmp_path), use_cpu=True, **arm.options)


def test_the_learning_rate_is_chosen_on_the_validation_prompts():
    def row(rate, reverse, forward, split="validation"):
        kl = {"reverse_kl_per_byte": reverse, "forward_kl_per_byte": forward}
        return {"setting": "fine", "arm": "simct", "learning_rate": rate, "split": split, **kl}

    rows = [row("0.1", "3", "1"), row("0.2", "1.5", "2"), row("0.3", "0", "0", "test"), row("0.4", "4", "4")]
    assert show.best_rate(rows, "fine", "simct") == 0.2


def test_differences_are_by_seed():
    def row(arm, seed, value, split="test", rate=0.1):
        judged = dict.fromkeys(show.COMPARED, str(value))
        return {"setting": "fine", "arm": arm, "seed": seed, "split": split, "learning_rate": rate, **judged}

    rows = [
        row("strict", "1", 1.0),
        row("strict", "2", 5.0),
        row("simct", "2", 4.5),
        row("simct", "1", 0.7),
        row("simct", "3", 9),
    ]
    rows += [row(arm, "0", 1.0, "validation") for arm in ("strict", "simct")]
    rows += [row("simct", seed, 100.0, rate=0.2) for seed in "123"]  # another learning rate than the best
    assert show.differences(rows, "fine", "simct", "strict")[0] == "-0.400 ± 0.100"


def test_mean_with_error():
    mean, error = mean_with_error([1.0, 2.0, 6.0])
    assert mean == 3.0 and error == pytest.approx((14 / 2 / 3) ** 0.5)


def test_a_run_is_repeatable_and_is_not_run_again(tmp_path, texts, monkeypatch):
    # Its models are made in this process; `test_quick_study` has those of processes of their own.
    monkeypatch.setattr(settings, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    sizes = {"teacher": Size(32, 1, 2), "student": Size(32, 1, 1)}
    prepare(tmp_path, ["digits"], texts, sizes, progress=lambda line: None)
    plan = Plan(steps=2, prompts=4, tokens=16, log_every=1)
    one = ("digits", "strict-strings", 3e-4, 1, "test")
    first, again = (run(*one, tmp_path, texts, plan) for _ in range(2))
    for row in first, again:
        row[0].pop("seconds")
    assert repr(first) == repr(again) and [row["step"] for row in first] == [2, 1, 2]
    results = Results(tmp_path)
    assert not results.has(one)
    results.add(first)
    assert Results(tmp_path).has(one) and not Results(tmp_path).has((*one[:3], 2, "test"))
    assert len(Results(tmp_path).curves) == 2


def test_gradients_by_option(tmp_path):
    target = tmp_path / "gradients.csv"
    command = [f"--student={ASSETS / 'student'}", f"--teacher={ASSETS / 'teacher'}", f"--data={ASSETS / 'eval.jsonl'}"]
    command += [f"--output={target}", "--responses=6", "--max_new_tokens=16"]
    for pair in "a", "b", "a":
        gradients.main([*command, f"--pair={pair}"])
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["pair"] for row in rows] == ["b"] * 6 + ["a"] * 6
    assert rows[:6] == [{**row, "pair": "b"} for row in rows[6:]], "one seed, one result"
    for row in rows:
        assert -1 <= float(row["cosine"]) <= 1 and float(row["norm_ratio"]) > 0
        assert -1 <= float(row["first_token_gradient"]) <= 1 and 0 <= float(row["extending_mass"]) <= 1
    by_option = {(row["score"], row["candidates"]): row for row in rows}
    # What the options change are the longer units alone.
    assert len({row["single_loss"] for row in rows if row["score"] != "mean_logit"}) == 1
    assert by_option["mean_logprob", "paper"]["longer_loss"] != by_option["sum_logprob", "paper"]["longer_loss"]


def test_extensions_are_longer_and_begin_alike():
    found = gradients.Extensions([b"a", b"ab", None, b"abc", b"b", b"a\xff", b"a"])
    assert sorted(found.of(b"a").tolist()) == [1, 3, 5] and found.of(b"abc").tolist() == [] == found.of(b"z").tolist()


@pytest.mark.slow
def test_quick_study(tmp_path):
    command = [sys.executable, "-m", "bench.quality", "--quick", "--output", str(tmp_path), "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"none", "strict", "simct", "sft"}
    assert all(float(row["forward_kl_per_byte"]) > 0 for row in rows)
    tables = (tmp_path / "tables.md").read_text()
    assert tables.count("±") == 1 + 4 * 7 + 2 * 3 + 4 * 7, (
        "the arms' own, two of them less the first, and the highest rate"
    )
    assert "SimCT (paper)" in tables
    for name in "summary", "rates", "curves", "collapse":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
