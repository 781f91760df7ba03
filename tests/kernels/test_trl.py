"""One vocabulary: the loss is ordinary distillation, and equals TRL's chunked divergence in values and gradients."""

import dataclasses

import pytest
import torch

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss

from .cases import Problem, relative_error

chunked_divergence = pytest.importorskip("trl.kernels.chunked_divergence")

ROWS, VOCABULARY = 29, 203


def one_vocabulary(*, bias: bool = True, softcap=None, scale: float = 1.0, spread: float = 1.0) -> Problem:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, needs_grad=False):
        return (spread * torch.randn(*shape, generator=draw)).requires_grad_(needs_grad)

    tokens = torch.randint(VOCABULARY, (ROWS,), generator=draw)
    every, ones = torch.arange(ROWS), torch.ones(ROWS, dtype=torch.int64)
    ids = torch.arange(VOCABULARY)
    return Problem(
        normal(ROWS, 24, needs_grad=True),
        LMHead(
            normal(VOCABULARY, 24, needs_grad=True),
            normal(VOCABULARY, needs_grad=True) if bias else None,
            softcap,
            scale,
        ),
        normal(ROWS, 32),
        LMHead(normal(VOCABULARY, 32), normal(VOCABULARY) if bias else None, softcap, 1 / scale),
        AlignedUnits(every, ones, every, ones, tokens, tokens),
        SharedVocabulary(ids, ids),
    )


def trl(problem: Problem, beta: float, temperature: float):
    """TRL's divergence of every row; its gradient goes to the same leaves."""
    student, teacher = problem.student_head, problem.teacher_head
    divergence, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
        *(problem.student_hidden, student.weight, student.bias),
        *(problem.teacher_hidden, teacher.weight, teacher.bias),
        *(beta, temperature, student.scale, student.softcap, teacher.scale, teacher.softcap),
    )
    return divergence


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"softcap": 5.0}, {"scale": 0.25}, {"softcap": 5.0, "scale": 2.0, "temperature": 1.7}],
    ids=str,
)
def test_equals_trl(beta, options):
    temperature = options.get("temperature", 1.0)
    sizes = {name: value for name, value in options.items() if name != "temperature"}
    problem = one_vocabulary(**sizes)
    expected = trl(problem, beta, temperature)
    weights = torch.linspace(0.5, 1.5, ROWS)
    (expected * weights).sum().backward()
    other = problem.to(torch.float32)
    losses = linear_simct_loss(
        *other.arguments(), beta=beta, temperature=temperature, reduction="none", backend="torch"
    )
    (losses * weights).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in problem.gradients().items():
        assert relative_error(other.gradients()[name], gradient) < 1e-4, name

    summed = problem.to(torch.float32)  # whose gradients are made in the forward pass
    total = linear_simct_loss(*summed.arguments(), beta=beta, temperature=temperature, backend="torch")
    total.backward()
    torch.testing.assert_close(total, expected.sum(), rtol=1e-4, atol=1e-4)
    again = problem.to(torch.float32)
    trl(again, beta, temperature).sum().backward()
    for name, gradient in again.gradients().items():
        assert relative_error(summed.gradients()[name], gradient) < 1e-4, name


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_is_no_less_accurate_than_trl_in_16_bits(beta):
    """The float64 oracle on the same rounded inputs judges both. Half a unit in the last place is a tie."""
    rounded = one_vocabulary(spread=0.6).to(torch.bfloat16)
    exact = rounded.to(torch.float64)
    oracle = linear_simct_loss(*exact.arguments(), beta=beta, backend="reference")
    oracle.backward()

    ours = rounded.to(torch.bfloat16)
    loss = linear_simct_loss(*ours.arguments(), beta=beta, backend="torch")
    loss.backward()
    theirs = rounded.to(torch.bfloat16)
    rival = trl(theirs, beta, 1.0).sum()
    rival.backward()
    tie = 2**-9
    assert relative_error(loss.detach(), oracle.detach()) <= relative_error(rival.detach(), oracle.detach()) + 1e-6
    for name, gradient in exact.gradients().items():
        error, other = (relative_error(side.gradients()[name], gradient) for side in (ours, theirs))
        assert error <= max(other, tie / 2), (name, error, other)


def test_selected_rows_only():
    """Rows in no unit give neither loss nor gradient, as TRL's masked rows."""
    problem = one_vocabulary()
    keep = torch.arange(ROWS) % 3 != 0
    units = problem.units.select(keep)
    loss = linear_simct_loss(*dataclasses.replace(problem, units=units).arguments(), backend="torch")
    loss.backward()
    other = problem.to(torch.float32)
    (trl(other, 1.0, 1.0) * keep).sum().backward()
    for name, gradient in other.gradients().items():
        assert relative_error(problem.gradients()[name], gradient) < 1e-4, name
    assert problem.student_hidden.grad[~keep].abs().sum() == 0
