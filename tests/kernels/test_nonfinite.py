"""-inf, +inf and NaN: never a wrong finite loss, and no further than the unit that reads them."""

import dataclasses
import itertools

import pytest
import torch

from simct_kernels import linear_simct_loss, simct_loss

from .cases import FEW, make_problem, relative_error, slow

BETAS = [0.0, 0.5, 1.0]
# Quick: the formula of each beta once, and both kinds of unit.
BETA_OF_UNIT = [
    (0.0, "longer"),
    (0.5, "single"),
    (1.0, "longer"),
    *slow((0.0, "single"), (0.5, "longer"), (1.0, "single")),
]
inf, nan = float("inf"), float("nan")


def single_and_longer():
    """Both sides' logits, units, shared vocabulary, a unit without continuation and one longer on both sides."""
    student, teacher, units, shared = make_problem(FEW, dtype=torch.float32).logits()
    has = units.has_continuation(shared)
    longer = ((units.student_length > 1) & (units.teacher_length > 1)).nonzero()[0].item()
    return student.detach(), teacher, units, shared, (~has).nonzero()[0].item(), longer


def losses(student, teacher, units, shared, **options):
    """The units' losses of the torch backend, held to the oracle's first; and the student's gradient."""
    student = student.clone().requires_grad_()
    result = simct_loss(student, teacher, units, shared, reduction="none", **options)
    (gradient,) = torch.autograd.grad(result.sum(), student)
    exact = simct_loss(
        student.detach().double(), teacher.double(), units, shared, reduction="none", backend="reference", **options
    )
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)
    return result.detach(), gradient


@pytest.mark.parametrize("beta,which", BETA_OF_UNIT)
def test_excluded_by_both_sides(beta, which):
    """A token that neither side can say adds nothing and has no gradient."""
    student, teacher, units, shared, single, longer = single_and_longer()
    unit = single if which == "single" else longer
    student[units.student_start[unit], shared.student_ids[3]] = -inf
    teacher[units.teacher_start[unit], shared.teacher_ids[3]] = -inf
    loss, gradient = losses(student, teacher, units, shared, beta=beta)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert gradient[units.student_start[unit], shared.student_ids[3]] == 0


@pytest.mark.parametrize("beta,which", BETA_OF_UNIT)
def test_excluded_by_the_student(beta, which):
    student, teacher, units, shared, single, longer = single_and_longer()
    unit = single if which == "single" else longer
    student[units.student_start[unit], shared.student_ids[3]] = -inf
    loss, gradient = losses(student, teacher, units, shared, beta=beta)
    others = torch.arange(len(units)) != unit
    assert loss[others].isfinite().all()
    assert loss[unit] == inf if beta == 0 else loss[unit].isfinite()
    assert gradient[units.student_start[unit], shared.student_ids[3]] == 0
    if beta > 0:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("beta,which", BETA_OF_UNIT)
def test_excluded_by_the_teacher(beta, which):
    student, teacher, units, shared, single, longer = single_and_longer()
    unit = single if which == "single" else longer
    teacher[units.teacher_start[unit], shared.teacher_ids[3]] = -inf
    loss, _ = losses(student, teacher, units, shared, beta=beta)
    assert loss[torch.arange(len(units)) != unit].isfinite().all()
    assert loss[unit] == inf if beta == 1 else loss[unit].isfinite()


def test_excluded_by_the_teacher_where_the_students_mass_underflows():
    student, teacher, units, shared, single, _ = single_and_longer()
    student[units.student_start[single], shared.student_ids[3]] = -1e3
    teacher[units.teacher_start[single], shared.teacher_ids[3]] = -inf
    loss = simct_loss(student, teacher, units, shared, reduction="none")
    assert loss[single] == inf


def test_impossible_continuation():
    """The student cannot say the unit's own text: reverse KL is finite, and its gradient there 0."""
    student, teacher, units, shared, _, longer = single_and_longer()
    row = units.student_start[longer] + 1
    student[row, units.student_tokens[row]] = -inf
    loss, gradient = losses(student, teacher, units, shared)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert gradient[row, units.student_tokens[row]] == 0


CASES = [(*case, value) for case in itertools.product(["student", "teacher"], BETAS) for value in (nan, inf)]
QUICK = [CASES[i] for i in (0, 3, 4, 7, 8, 11)]  # every pair of side, beta and value


@pytest.mark.parametrize("side,beta,value", [*QUICK, *slow(*(case for case in CASES if case not in QUICK))])
def test_nan_stays_in_its_unit(side, beta, value):
    student, teacher, units, shared, single, longer = single_and_longer()
    logits = {"student": student, "teacher": teacher}[side]
    start, ids = getattr(units, f"{side}_start"), getattr(shared, f"{side}_ids")
    logits[start[single], ids[2]] = value
    logits[start[longer] + 1, 5] = value  # the second row of a longer unit: only its log-sum-exp reads it
    loss = simct_loss(student, teacher, units, shared, reduction="none", beta=beta)
    bad = torch.zeros(len(units), dtype=torch.bool)
    bad[[single, longer]] = True
    assert loss[bad].isnan().all() and loss[~bad].isfinite().all()
    assert simct_loss(student, teacher, units, shared, beta=beta).isnan()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_an_unread_row(side):
    student, teacher, units, shared, *_ = single_and_longer()
    expected = simct_loss(student, teacher, units, shared)
    logits = {"student": student, "teacher": teacher}[side]
    start, length = getattr(units, f"{side}_start"), getattr(units, f"{side}_length")
    read = torch.cat([torch.arange(a, a + n) for a, n in zip(start.tolist(), length.tolist(), strict=True)])
    unread = torch.ones(len(logits), dtype=torch.bool)
    unread[read] = False
    assert unread.any()
    logits[unread] = float("nan")
    assert simct_loss(student, teacher, units, shared).equal(expected)


@pytest.mark.parametrize(
    ("bad", "options", "value"), [(0, {}, float("nan")), (1, {}, inf), (1, {"top_k": 2}, float("nan"))], ids=str
)
def test_dropping_a_nan_unit_keeps_its_gradient_out(bad, options, value):
    """A caller may leave non-finite units out of a loss by unit: the rest trains on, the head's gradient included."""
    problem = make_problem(((1, 1), (2, 2), (1, 1)), dtype=torch.float32, softcap=5.0)
    units = problem.units
    keep = torch.arange(len(units)) != bad
    without = dataclasses.replace(problem.to(torch.float32), units=units.select(keep))
    linear_simct_loss(*without.arguments(), **options).backward()
    row = int(units.student_start[bad] + units.student_length[bad] - 1)
    with torch.no_grad():
        problem.student_hidden[row] = value
    loss = linear_simct_loss(*problem.arguments(), reduction="none", **options)
    assert loss.isnan().nonzero().flatten().tolist() == [bad]
    loss[loss.isfinite()].sum().backward()
    for key, gradient in problem.gradients().items():
        assert relative_error(gradient, without.gradients()[key]) < 1e-6, key


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_single_units_never_read_the_rest_of_the_head(side):
    problem = make_problem([(1, 1)] * 7, dtype=torch.float32)
    units = problem.units.select(~problem.units.has_continuation(problem.shared))
    problem = dataclasses.replace(problem, units=units)
    expected = linear_simct_loss(*problem.arguments())
    expected.backward()
    expected_gradients = problem.gradients()
    head, ids = getattr(problem, f"{side}_head"), getattr(problem.shared, f"{side}_ids")
    unshared = torch.ones(head.weight.shape[0], dtype=torch.bool)
    unshared[ids] = False
    poisoned = problem.to(torch.float32)
    with torch.no_grad():
        getattr(poisoned, f"{side}_head").weight[unshared] = float("nan")
        getattr(poisoned, f"{side}_head").bias[unshared] = float("nan")
    loss = linear_simct_loss(*poisoned.arguments())
    loss.backward()
    assert loss.equal(expected)
    for key, gradient in poisoned.gradients().items():
        assert relative_error(gradient, expected_gradients[key]) == 0
    assert not poisoned.student_head.weight.grad[~torch.isin(torch.arange(83), problem.shared.student_ids)].any()
