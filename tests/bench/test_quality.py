"""The quality study: its texts, its order, its statistics, its sampler, and a whole run at tiny sizes."""

import csv
import math
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.quality import __main__ as study_command
from bench.quality import contrasts, gradients, probe, processes
from bench.quality.arms import ARMS, CORE, LADDER
from bench.quality.judges import Judge, Scope, student_sums
from bench.quality.means import mean_with_error
from bench.quality.results import Results
from bench.quality.runs import Data, Key, run
from bench.quality.sampling import LlamaSampler, draw, engine
from bench.quality.settings import STUDENTS, TEACHER, Size, draw_teacher, is_made, make_model
from bench.quality.study import QUICK, Design, Task, data_of, rates, tasks
from bench.quality.texts import answer, make_sum, make_texts
from bench.record import REPOSITORY
from simct import SimCTConfig, SimCTTrainer, TokenizerPair
from simct.demo import ASSETS
from simct.rollouts.protocol import Sampling


@pytest.fixture(scope="module")
def texts():
    """Of a part of the standard library: reading all of it takes seconds."""
    some = {"stdlib": str(Path(sysconfig.get_paths()["stdlib"]) / "asyncio")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda: some)
        return make_texts(prompts=32, validation=8, sums=8, prose=8)


def operands(prompt: str) -> tuple:
    """Of a sum, without their order."""
    sides, subtracted = prompt.strip().split("-")
    return (*sorted(map(int, sides.split("+"))), int(subtracted))


def test_no_prompt_is_in_two_places_and_no_sum_with_its_operands_swapped(texts):
    splits = texts.train, texts.validation, texts.test
    assert [len(part) for part in splits] == [32, 8, 16]
    assert [sum("answer" in record for record in part) for part in splits] == [16, 8, 8]
    prompts = [{record["prompt"] for record in part} for part in splits]
    sums = [{operands(r["prompt"]) for r in part if "answer" in r} for part in splits]
    written = {document.split("\n")[0] + "\n" for document in texts.documents}
    known = {operands(prompt) for prompt in written if prompt[0].isdigit() and "+" in prompt}
    for found, rest in (prompts, written), (sums, known):
        for i, part in enumerate(found):
            assert part and not part & rest and not any(part & other for other in found[i + 1 :])
    assert any(a != b for a, b, _ in known) and (1, 2, 1) in {(a, b, c) for part in (*sums, known) for a, b, c in part}


def test_sums_and_their_answers():
    assert make_sum(17, 5, 8) == ("17+5-8\n", "17+5=22\n22-8=14\n#14")
    assert answer("17+5=22\n22-8=14\n#14") == "14" and answer("#1\n#2") == "2" and answer("22") is None


@pytest.mark.slow
def test_the_mismatch_is_dialled():
    """In all texts of the study."""
    texts = make_texts(prompts=64)
    teacher = TEACHER.make(texts.documents)
    samples = [document.split("\n", 1)[1] for document in texts.documents[:200]]
    single = {}
    for name, spelling in STUDENTS.items():
        pair = TokenizerPair(spelling.make(texts.documents), teacher)
        single[name] = pair.coverage(samples).rules["simpleopd"].single
    assert single.pop("nested") > 0.9 and all(0.5 < share < 0.75 for share in single.values()), single


def test_every_arm_is_a_configuration(tmp_path):
    for arm in ARMS.values():
        SimCTConfig(output_dir=str(tmp_path), use_cpu=True, **arm.options)


def row(pair, arm, rate, seed, split, **judged):
    return {"pair": pair, "arm": arm, "learning_rate": str(rate), "seed": str(seed), "split": split, **judged}


def test_the_learning_rate_is_the_best_on_validation_sums_and_the_grid_grows_on_an_edge():
    design = Design()

    def chosen(accuracies):
        rows = [row("fine", "simct", rate, 0, "validation", accuracy=str(found)) for rate, found in accuracies.items()]
        return rates(design, [*rows, row("fine", "simct", 1e-3, 1, "test", accuracy="1")], "fine", "simct")

    assert chosen({}) == ([1e-4, 3e-4, 1e-3], None)
    inner = {1e-4: 0.2, 3e-4: 0.5, 1e-3: 0.4}
    assert chosen(inner) == ([1e-4, 3e-4, 1e-3], 3e-4)
    assert chosen(inner | {1e-4: 0.6}) == ([3e-5, 1e-4, 3e-4, 1e-3], None)
    assert chosen(inner | {1e-4: 0.6, 3e-5: 0.7}) == ([3e-5, 1e-4, 3e-4, 1e-3], 3e-5)
    assert chosen(inner | {1e-3: 0.6, 3e-3: 0.1}) == ([1e-4, 3e-4, 1e-3, 3e-3], 1e-3)


def test_a_seed_has_all_its_arms_before_the_next():
    design = Design()
    rows = [
        row(pair, arm, rate, 0, "validation", accuracy="0.9" if rate == 3e-4 else "0.1")
        for pair in design.pairs
        for arm in ARMS
        for rate in LADDER
    ]
    found = [task.key for task in tasks(design, rows) if task.kind == "run" and task.key.split == "test"]
    size = 1 + len(CORE)
    assert [key.arm for key in found][: 6 * size] == ["none", *CORE] * 6
    stages = [("nested", 1), ("nested", 2), ("nested", 3), ("digits", 1), ("digits", 2), ("digits", 3), ("nested", 4)]
    assert [(key.pair, key.seed) for key in found][: 7 * size : size] == stages
    assert {key.learning_rate for key in found if key.arm != "none"} == {3e-4}
    assert len(set(found)) == (6 + 3 + 6 + 3) * (1 + len(ARMS))
    # What is learnt from is drawn before, at its own temperature.
    assert data_of(["strict", "sft"]) == [Task("data")] and data_of(["sft-sharp"]) == [
        Task("data"),
        Task("data", "sharp"),
    ]
    assert {Task("data"), Task("data", "sharp")} <= set(tasks(design, []))
    # Nothing is chosen yet: no test run of an arm.
    assert {task.key.arm for task in tasks(design, []) if task.key and task.key.split == "test"} == {"none"}


def test_contrasts_are_paired_by_seed_and_corrected():
    design = replace(Design(), stages=(("fine", 1, 6),))
    rows = [
        row("fine", arm, rate, 0, "validation", accuracy=str(best if rate == 3e-4 else 0.1))
        for arm, best in {"sft": 0.9, "strict": 0.5, "simct": 0.6, "escd": 0.55, "kd": 0.9}.items()
        for rate in LADDER
    ]
    levels = {"sft": 0.40, "strict": 0.50, "simct": 0.505}
    own = {1: 0.0, 2: 0.2, 3: -0.1, 4: 0.1}  # what a seed's arms have in common cancels
    extra = {"sft": 0.0, "strict": 0.0, "simct": 0.01}
    rows += [
        row(
            "fine",
            arm,
            3e-4,
            seed,
            "test",
            accuracy=str(level + shift + extra[arm] * (seed - 2.5)),
            forward_kl_per_byte="0.3",
        )
        for arm, level in levels.items()
        for seed, shift in own.items()
    ]
    rows += [row("fine", "simct", 1e-3, 1, "test", accuracy="9", forward_kl_per_byte="9")]  # not its rate
    rows += [
        row("fine", "strict", 3e-4, 5, "test", accuracy="9", forward_kl_per_byte="9")
    ]  # a seed that the others lack
    found = {(one.name, one.judge): one for one in contrasts.of_study(design, rows)}
    gain = found["best on-policy - SFT", "accuracy"]
    assert (gain.arm, gain.seeds, gain.df) == ("simct", ("1", "2", "3", "4"), 3)
    # By hand: differences .09, .10, .11, .12; their standard error is sqrt(5/3)/2 hundredths, t(3) at 97.5 % is 3.182.
    error = 0.01 * math.sqrt(5 / 3) / 2
    assert gain.mean == pytest.approx(0.105) and gain.high - gain.mean == pytest.approx(3.1824 * error, rel=1e-4)
    assert gain.holm == pytest.approx(contrasts.TESTS * gain.p) and gain.verdict == "better"
    assert replace(gain, seeds=gain.seeds[:2]).verdict == "not decided"
    same = found["SimCT - strict", "accuracy"]
    assert same.mean == pytest.approx(0.005) and same.verdict == "equivalent within ±5 points"
    assert found["SimCT - strict", "forward_kl_per_byte"].verdict == "not decided"
    assert contrasts.holm([0.001, 0.004, 0.003]) == pytest.approx([0.016, 0.056, 0.045])
    # The best is known when all are.
    known = [one for one in rows if (one["arm"], one["split"]) != ("escd", "validation")]
    assert contrasts.best_on_policy(design, rows, "fine") == "simct" and not contrasts.best_on_policy(
        design, known, "fine"
    )


def test_mean_with_error():
    mean, error = mean_with_error([1.0, 2.0, 6.0])
    assert mean == 3.0 and error == pytest.approx((14 / 2 / 3) ** 0.5)


def test_the_sampler_has_the_models_own_probabilities():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    sampler = engine(model)
    assert isinstance(sampler, LlamaSampler)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    drawn = sampler.generate(prompts, Sampling((0, 1), 0, 12, temperature=1.5, top_p=0.99), seed=3)
    for prompt, response in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt + response.token_ids])
        rows = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        own = rows.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        assert torch.allclose(torch.tensor(response.logprobs), own, atol=1e-4), "filling, places or the cache"
        assert (response.finish_reason == "stop") == (response.token_ids[-1] in (0, 1))
        assert not {0, 1} & set(response.token_ids[:-1])
    assert len({len(response.token_ids) for response in drawn}) > 1, "one ends before the others"
    # Two tokens hold 0.9 of the mass, the third would be too many: it is never drawn, they are in proportion.
    logits = np.log(np.tile(np.float32([0.05, 0.6, 0.05, 0.3]), (4000, 1)))
    uniform = np.random.default_rng(0).random(4000)
    counts = np.bincount(draw(logits, uniform, 1.0, 0.85, np.random.default_rng(1)), minlength=4) / 4000
    assert counts[0] == counts[2] == 0 and abs(counts[1] - 2 / 3) < 0.03
    counts = np.bincount(draw(logits, uniform, 0.5, 1.0, np.random.default_rng(1)), minlength=4) / 4000
    assert abs(counts[1] - 0.36 / 0.455) < 0.03 and counts[0] > 0
    other = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_key_value_heads": 2}))
    assert not isinstance(engine(other), LlamaSampler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, texts):
    """A teacher, a student that writes digits one by one, and the teacher's samples."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "teacher": (TEACHER, Size(32, 1, 2, tuned=1, settled=1), 0),
        "digits": (STUDENTS["digits"], Size(32, 1, 1, until=0.4), 2),
    }
    for name, (spelling, size, seed) in made.items():
        spelling = replace(spelling, size=320)
        make_model(folder / name, spelling, size, texts, seed)
        assert is_made(folder / name, spelling, size, texts, seed)
        assert not is_made(folder / name, spelling, size, texts, seed + 1)
    drawn = draw_teacher(folder / "teacher", texts, responses=24, tokens=24)
    return folder, Data(texts.train, texts.test, drawn["train"], drawn["test"])


SMALL = replace(QUICK.test, steps=2, every=1)


def test_the_forward_kl_is_of_the_tokens_that_the_teacher_drew(tiny, tmp_path):
    folder, data = tiny
    texts = [{"prompt": record["prompt"], "completion": "1+1=2", "logprob": -3.5} for record in data.held_out[:3]]
    texts.append({"prompt": "1+1\n", "completion": "a text that no response holds " * 9, "logprob": -1.0})
    config = SimCTConfig(str(tmp_path), use_cpu=True, prompt_format="text", max_new_tokens=16, report_to=[])
    trainer = SimCTTrainer(str(folder / "digits"), str(folder / "teacher"), config, data.train)
    judge = Judge(trainer, data.held_out[:2], texts)
    found = judge(Scope(sums=2, draws=1, texts=4))
    ours = student_sums(trainer, trainer.answers(texts[:3]))
    assert found["forward_kl_per_byte"] == pytest.approx((3 * -3.5 - sum(ours)) / (3 * 6), rel=1e-5)


@pytest.mark.parametrize("arm", ["strict-top16", "kd", "sft"])
def test_a_run_is_repeatable_and_is_not_run_again(tmp_path, tiny, arm):
    folder, data = tiny
    key = Key("digits", arm, 3e-4, 1, "test")
    first, again = (run(key, folder / "digits", folder / "teacher", data, SMALL) for _ in range(2))
    for rows in first, again:
        assert rows[0].pop("seconds") > rows[0].pop("train_seconds") > 0
    assert repr(first) == repr(again) and [r.get("step") for r in first] == [None, 0, 1, 2]
    assert first[1]["logp_solution"] != first[3]["logp_solution"], "it learned something"
    results = Results(tmp_path)
    assert not results.has(key)
    results.add(first)
    assert Results(tmp_path).has(key) and not Results(tmp_path).has(key._replace(seed=2))
    assert len(Results(tmp_path).curves) == 3 and Results(tmp_path).rows[0]["commit"]


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


def check_quick(folder):
    found = Results(folder)
    assert {row["arm"] for row in found.rows} == {"none", "strict", "simct", "sft"}
    assert all(
        float(row["logp_solution"]) < 0 and float(row["reverse_kl_per_byte"]) == float(row["reverse_kl_per_byte"])
        for row in found.rows
        if row["split"] == "test"
    )
    tables = (folder / "tables.md").read_text()
    assert "SimCT (paper) − strict: 1:1 units" in tables and "| SimCT (paper) | 2 | 0.0003 |" in tables
    assert tables.count("| nested-") == 3, "the models, of which only models.csv is kept"
    for name in "rates", "curves":
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_quick_study(tmp_path, texts, monkeypatch):
    """In this process; that of `test_the_command` has others."""
    monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(study_command, "make_texts", lambda **_: texts)
    command = ["--quick", "--output", str(tmp_path), "--workers", "1"]
    study_command.main(command)
    check_quick(tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    look = ["--folder", str(tmp_path), "--pair", "nested", "--rate", "1e-4", "--quick"]
    monkeypatch.setattr(probe, "make_texts", lambda **_: texts)
    monkeypatch.setitem(ARMS, "probe", None)
    probe.main([*look, "--set", "score=sum_logprob", "beta=0.5"])
    probe.main(look)
    with (tmp_path / "probes.csv").open() as file:
        assert [row["options"] for row in csv.DictReader(file)] == ["score=sum_logprob beta=0.5", ""]
    shutil.rmtree(tmp_path / "models")
    (tmp_path / "tables.md").unlink()
    study_command.main([*command, "--show"])
    assert (tmp_path / "tables.md").read_text() == tables


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "bench.quality", "--quick", "--output", str(tmp_path), "--workers", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check_quick(tmp_path)
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0 and ": " not in again.stdout.split("nested: test prompts")[0], "nothing is run again"
