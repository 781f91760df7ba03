"""What the kernels read, write and multiply, counted in the interpreter and held to the floor of each case.

Tensors of rows x columns count with every access. Tables that all rows share (ids, maps) count once: they stay in a GPU's
cache.
"""

import dataclasses

import pytest
import torch
from kernels.cases import MIXED, Problem, make_problem
from torch.utils.flop_counter import FlopCounterMode
from triton_cases import linear_simct_loss, simct_loss

from bench.floor import linear_floor, logits_floor, total
from simct_kernels import LMHead
from simct_kernels.options import LossOptions

if not torch.cuda.is_available():
    from simct_kernels.triton_backend.traffic import Traffic, count_traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in Triton's interpreter")
OPTIONS = [
    {},
    {"beta": 0.0},
    {"temperature": 2.0},
    {"candidates": "disjoint"},
    {"teacher_mass_floor": 1e-9},
    {"score": "sum_logprob", "temperature": 2.0, "teacher_mass_floor": 1e-9, "candidates": "disjoint"},
]
SIZES = {"shared_size": 370, "student_vocabulary": 830, "teacher_vocabulary": 610}
TEXTS = {"mixed": MIXED, "single": [(1, 1)] * 9, "longer": [(2, 1), (1, 3), (6, 2), (2, 2)]}


def count_logits(problem: Problem, **options) -> tuple["Traffic", "Traffic"]:
    student, *rest = problem.logits()
    with count_traffic() as forward:
        loss = simct_loss(student, *rest, **options)
    with count_traffic() as backward:
        loss.backward()
    return forward, backward


def moved(traffic: "Traffic", rows_by_columns: set[str]) -> int:
    """Bytes: every access of the named tensors and of what a launch writes, the distinct ones of the rest."""
    total = traffic.written()
    for launch in traffic.launches:
        for name, access in launch.read.items():
            total += access.bytes if name in rows_by_columns else access.distinct
    return total


@pytest.mark.parametrize(
    "text,dtype,options",
    [(text, torch.bfloat16, {}) for text in TEXTS] + [("mixed", torch.float32, options) for options in OPTIONS],
    ids=str,
)
def test_logits_are_read_once_a_pass(text, dtype, options):
    problem = make_problem(TEXTS[text], dtype=torch.float32, **SIZES).to(dtype)
    forward, backward = count_logits(problem, **options)
    size = dtype.itemsize
    floors = logits_floor(
        problem.units, problem.shared, 830, 610, student_bytes=size, teacher_bytes=size, options=LossOptions(**options)
    )
    for traffic, floor in zip((forward, backward), floors, strict=True):
        read = traffic.read("student", "teacher")
        tables = 2 * len(problem.shared) * 4
        assert floor.read - tables <= read <= 1.01 * (floor.read - tables)
    assert backward.written("out") == floors[1].written


def test_all_that_moves_is_little_more_than_the_floor():
    """Maps of rows and vocabularies included, with enough rows that they do not outweigh the logits."""
    sizes = {"shared_size": 1300, "student_vocabulary": 3000, "teacher_vocabulary": 2200}
    problem = make_problem([*MIXED, *[(1, 1)] * 8] * 6, dtype=torch.float32, **sizes).to(torch.bfloat16)
    forward, backward = count_logits(problem)
    floor = sum(cost.moved for cost in logits_floor(problem.units, problem.shared, 3000, 2200))
    counted = moved(forward, {"student", "teacher"}) + moved(backward, {"student", "teacher"})
    assert floor <= counted <= 1.05 * floor


def test_single_units_read_their_shared_columns_only():
    problem = make_problem(TEXTS["single"], dtype=torch.float32, **SIZES)
    units = problem.units.select(~problem.units.has_continuation(problem.shared))
    forward, backward = count_logits(dataclasses.replace(problem, units=units))
    for traffic in (forward, backward):
        assert traffic.read("student") == traffic.read("teacher") == len(units) * len(problem.shared) * 4


def test_the_generalised_jsd_reads_the_candidates_twice():
    problem = make_problem(TEXTS["mixed"], dtype=torch.float32, **SIZES)
    once, again = count_logits(problem)[0], count_logits(problem, beta=0.5)[0]
    more = len(problem.units) * len(problem.shared) * 4
    for side in ("student", "teacher"):
        assert again.read(side) == once.read(side) + more


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("text", TEXTS)
def test_linear_loss_multiplies_what_it_must(text, backend):
    problem = make_problem(TEXTS[text], dtype=torch.float32, bias=False, shared_size=1020, student_vocabulary=2040,
                           teacher_vocabulary=1530)  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        linear_simct_loss(*problem.arguments(), backend=backend).backward()
    floor = total(linear_floor(problem.units, problem.shared, (2040, 13), (1530, 11)))
    assert 0.98 * floor.flops <= counter.get_total_flops() <= 1.02 * floor.flops


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
