"""What the PyTorch backend costs, counted: elements of its tensors, and products."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from simct_kernels import LMHead, linear_simct_loss
from simct_kernels.torch_backend import plan

from .cases import Problem, make_problem, make_shared, make_units


class RecordSizes(TorchDispatchMode):
    """The shapes of everything that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes.update(tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def big_problem(student_rows: int, shared_size: int, student_vocabulary: int, teacher_vocabulary: int) -> Problem:
    """75 % of the student's rows in single units."""
    count = student_rows // 16
    lengths = [(1, 1)] * 12 + [(2, 1), (2, 3)]
    shared = make_shared(shared_size, student_vocabulary, teacher_vocabulary)
    units = make_units(lengths * count, shared, student_vocabulary, teacher_vocabulary)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Problem(
        normal(len(units.student_tokens), 24).requires_grad_(),
        LMHead(normal(student_vocabulary, 24).requires_grad_()),
        normal(len(units.teacher_tokens), 20),
        LMHead(normal(teacher_vocabulary, 20)),
        units,
        shared,
    )


@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"top_k": 16}, {"reduction": "none"}], ids=str)
def test_nothing_of_rows_by_vocabulary_exists(monkeypatch, options):
    monkeypatch.setitem(plan._AUTO_ELEMENTS, "cpu", 1 << 21)  # in proportion to the small sizes
    problem = big_problem(2048, 8_000, 20_000, 18_000)
    with RecordSizes() as record:
        linear_simct_loss(*problem.arguments(), **options).sum().backward()
    heads = {(rows, width) for rows in (8_000, 20_000, 18_000) for width in (24, 20)}
    largest = max(
        torch.Size(shape).numel() for shape in record.shapes if shape not in heads and shape[::-1] not in heads
    )
    assert largest < 2048 * 8_000 / 4


def products(problem: Problem, **options) -> tuple[int, int]:
    """Floating point operations of the forward and of the backward."""
    with FlopCounterMode(display=False) as forward:
        loss = linear_simct_loss(*problem.arguments(), **options).sum()
    with FlopCounterMode(display=False) as backward:
        if loss.requires_grad:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def single_problem() -> tuple[Problem, int, int]:
    """Only units without continuation, and the cost of one side's product over the K shared columns."""
    problem = make_problem([(1, 1)] * 20)
    units = problem.units.select(~problem.units.has_continuation(problem.shared))
    rows = 2 * len(units) * len(problem.shared)
    return dataclasses.replace(problem, units=units), rows * 13, rows * 11


def test_single_units_cost_four_products_over_shared_columns():
    problem, student, teacher = single_problem()
    assert products(problem) == (3 * student + teacher, 0)
    assert products(problem, reduction="none") == (student + teacher, 3 * student + teacher)


def test_nothing_is_multiplied_for_what_needs_no_gradient():
    problem, student, teacher = single_problem()
    head = problem.student_head
    frozen = LMHead(head.weight.detach(), head.bias.detach())
    assert products(dataclasses.replace(problem, student_head=frozen))[0] == 2 * student + teacher
    only_head = dataclasses.replace(problem, student_hidden=problem.student_hidden.detach())
    assert products(only_head)[0] == 2 * student + teacher
    neither = dataclasses.replace(only_head, student_head=frozen)
    assert products(neither) == (student + teacher, 0)
    with torch.no_grad():
        assert products(problem) == (student + teacher, 0)


def test_top_k_scores_the_teacher_on_k_rows_only():
    problem, student, teacher = single_problem()
    assert 16 * 2 <= len(problem.shared)
    k_share = 2 / len(problem.shared)
    # The head's gradient is a sum of rows, not a product.
    assert products(problem, top_k=2)[0] == pytest.approx(student + k_share * (student + teacher))


def test_only_longer_sides_read_whole_rows():
    """The student's one token against two of the teacher's: the student's log-sum-exp cancels."""
    problem = make_problem([(1, 2)] * 5)
    units, shared, vocabulary = len(problem.units), len(problem.shared), 61
    student = 2 * units * (shared + 1) * 13
    teacher = 2 * (2 * units) * vocabulary * 11
    forward, _ = products(problem)
    # The continuation's weight gradient is a sum of rows, not a product.
    assert forward == 3 * student - 2 * units * 13 + teacher


def test_a_frozen_heads_shared_rows_are_copied_once():
    problem = make_problem(dtype=torch.float32)
    head, ids = problem.teacher_head, problem.shared.teacher_ids
    rows = head.rows(ids, torch.float32)
    linear_simct_loss(*problem.arguments())
    assert head.rows(ids, torch.float32) is rows
    with torch.no_grad():
        head.weight.mul_(2)
    assert head.rows(ids, torch.float32).equal(head.weight[ids])
    other = ids.flip(0)
    assert head.rows(other, torch.float32).equal(head.weight[other])
    assert head.rows(other, torch.float64).dtype == torch.float64
    trained = problem.student_head
    assert trained.rows(ids, torch.float32) is not trained.rows(ids, torch.float32)


def test_units_of_any_number_cost_no_loop_over_units():
    """The number of operations grows with the chunks, not with the units."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for repeats in (1, 8):
        problem = make_problem([(1, 1), (2, 1), (1, 2), (2, 2)] * repeats)
        Count.calls = 0
        with Count():
            linear_simct_loss(*problem.arguments())
        counts.append(Count.calls)
    assert counts[1] < 1.5 * counts[0]
