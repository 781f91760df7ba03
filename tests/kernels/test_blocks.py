"""The CPU's blocks, made so small that each case has many, change nothing."""

import pytest
import torch

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss
from simct_kernels.torch_backend import blocks, plan
from simct_kernels.torch_backend.job import LossJob
from simct_kernels.torch_backend.rows import LinearRows

from .cases import MIXED, Problem, make_problem, relative_error

OPTIONS = [
    {},
    {"beta": 0.0},
    {"beta": 0.3, "temperature": 0.7},
    {"score": "mean_logit", "candidates": "disjoint"},
    {"top_k": 2},
    {"top_k": 7, "teacher_mass_floor": 0.4},
]


def run(problem: Problem, **options) -> list[torch.Tensor]:
    problem = problem.to(problem.student_hidden.dtype)
    losses = linear_simct_loss(*problem.arguments(), **options)
    losses.sum().backward()
    return [losses.detach(), *problem.gradients().values()]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_blocks_change_nothing(monkeypatch, options, reduction):
    problem = make_problem(MIXED * 3, softcap=3.0)
    expected = run(problem, backend="reference", reduction=reduction, **options)
    monkeypatch.setattr(blocks, "BLOCK", 7)
    monkeypatch.setitem(plan._BLOCK_ELEMENTS, "cpu", 200)
    for actual, exact in zip(run(problem, reduction=reduction, **options), expected, strict=True):
        assert relative_error(actual, exact) < 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_whole_heads_of_other_devices(monkeypatch, options):
    """Where there is no block, one product takes a copied head."""
    problem = make_problem(MIXED)
    expected = run(problem, backend="reference", **options)
    monkeypatch.setattr(LossJob, "linear_rows", LinearRows)
    monkeypatch.delitem(plan._BLOCK_ELEMENTS, "cpu")
    for actual, exact in zip(run(problem, **options), expected, strict=True):
        assert relative_error(actual, exact) < 1e-12


@pytest.mark.parametrize("first", [0, 3])
def test_consecutive_ids_are_read_in_place(monkeypatch, first):
    """No row of either head is gathered, and the gradient goes straight to its place."""
    size, width, count = 20, 6, 9
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight, teacher_weight = (
        torch.randn(rows, width, generator=generator, dtype=torch.float64) for rows in (count, count, 30, 30)
    )
    rows, ids = torch.arange(count), torch.arange(first, first + size)
    shared = SharedVocabulary(ids, ids)
    units = AlignedUnits(rows, torch.ones_like(rows), rows, torch.ones_like(rows), rows + first, rows + first)
    monkeypatch.setattr(blocks, "BLOCK", 8)
    seen = []
    weight_of = blocks.BlockedRows._weight
    monkeypatch.setattr(blocks.BlockedRows, "_weight", lambda self, block: seen.append(block) or weight_of(self, block))
    gradients = []
    for backend in ("torch", "reference"):
        leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_simct_loss(
            leaves[0], LMHead(leaves[1]), teacher, LMHead(teacher_weight), units, shared, backend=backend
        )
        gradients.append(torch.autograd.grad(loss, leaves))
    assert seen == [slice(first, first + size)] * 3  # both sides' logits and the gradient of the hidden states
    for actual, exact in zip(*gradients, strict=True):
        assert relative_error(actual, exact) < 1e-12
