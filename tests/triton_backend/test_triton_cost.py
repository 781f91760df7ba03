"""What the losses multiply, held to the floor of each case."""

import dataclasses

import pytest
import torch
from kernels.cases import MIXED, make_problem
from torch.utils.flop_counter import FlopCounterMode
from triton_cases import linear_simct_loss

from bench.floor import linear_floor, total
from simct_kernels import LMHead
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend import plan

TEXTS = {"mixed": MIXED, "single": [(1, 1)] * 9, "longer": [(2, 1), (1, 3), (6, 2), (2, 2)]}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("text", TEXTS)
def test_linear_loss_multiplies_what_it_must(monkeypatch, text, backend):
    """Each kind of unit by itself, as where there are many of each."""
    monkeypatch.setitem(plan.MERGE_ROWS, "cpu", (0, 0))
    monkeypatch.setattr(plan, "MERGE_ROWS_ELSEWHERE", (0, 0))
    problem = make_problem(TEXTS[text], dtype=torch.float32, bias=False, shared_size=1020, student_vocabulary=2040,
                           teacher_vocabulary=1530)  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        linear_simct_loss(*problem.arguments(), backend=backend).backward()
    floor = total(linear_floor(problem.units, problem.shared, (2040, 13), (1530, 11)))
    assert 0.98 * floor.flops <= counter.get_total_flops() <= 1.02 * floor.flops


def test_few_units_of_a_kind_join_those_that_read_whole_rows():
    """Three kinds with a continuation in one chunk: a pass over both heads each would cost more than the products."""
    problem = make_problem([(1, 1)] * 2 + [(1, 3), (2, 1), (2, 2)] * 2, dtype=torch.float32)
    sizes = dict(shared_width=37, student_columns=83, teacher_columns=61, chunk_rows="auto")
    chunks = [
        plan.plan_chunks(problem.units, problem.shared, LossOptions(), **sizes, merges=merges)
        for merges in (True, False)
    ]
    assert [(len(chunk.units), chunk.student.whole, chunk.teacher.whole) for chunk in chunks[0]] == [
        (2, False, False),
        (6, True, True),
    ]
    assert [len(chunk.units) for chunk in chunks[1]] == [2, 2, 2, 2]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_top_k_multiplies_a_quarter(backend):
    """The student's product chooses; the teacher's and both gradients' shrink to k columns. Widths as of a real pair."""
    problem = make_problem([(1, 1)] * 9, dtype=torch.float32, bias=False, shared_size=1020, student_vocabulary=2040,
                           teacher_vocabulary=1530)  # fmt: skip
    units = problem.units.select(~problem.units.has_continuation(problem.shared))
    wider = LMHead(torch.randn(1530, 20))
    problem = dataclasses.replace(
        problem, units=units, teacher_hidden=torch.randn(len(units.teacher_tokens), 20), teacher_head=wider
    )
    counts = []
    for options in ({}, {"top_k": 16}):
        with FlopCounterMode(display=False) as counter:
            linear_simct_loss(*problem.arguments(), backend=backend, **options).backward()
        counts.append(counter.get_total_flops())
    assert counts[1] <= 0.25 * counts[0]
