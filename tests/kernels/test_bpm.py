"""BPM and ESCD against their oracles, BPM by hand. What else they share (chunks, memory, bad input): test_prefix_losses.py."""

import dataclasses

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, PrefixTables, bpm_loss
from simct_kernels.objectives.bpm import _plan
from simct_kernels.objectives.segments import expand
from simct_kernels.reference.prefix import bpm_losses

from .cases import in_pairs, make_shared, relative_error, slow
from .prefix_cases import BOTH, LOSSES, PrefixProblem, prefix_problem, run

KINDS = [{}, {"merge": 0.4}, {"softcap": 3.0, "scale": 0.5}, {"bias": False, "dropped": 0.0}]


@BOTH
@pytest.mark.parametrize(
    ("seed", "kind", "precision"),
    in_pairs(range(6), KINDS, [(torch.float64, 1e-12), (torch.float32, 1e-5)]),
    ids=str,
)
def test_values_and_gradients_are_the_oracles(name, seed, kind, precision):
    dtype, tolerance = precision
    exact = prefix_problem(seed, **kind)
    expected = exact.reference(name, 1.5)
    weights = torch.linspace(0.5, 2, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    problem = exact.to(dtype)
    losses = run(name, problem, temperature=1.5, reduction="none", chunk_rows=5)
    assert losses.dtype == dtype and relative_error(losses.detach(), expected.detach()) < tolerance
    assert (losses > -1e-6).all()  # a divergence, and logarithms of probabilities
    (weights.to(dtype) * losses).sum().backward()
    assert set(problem.gradients()) == set(exact.gradients())
    for part, gradient in problem.gradients().items():
        assert relative_error(gradient, exact.gradients()[part]) < tolerance, part


def test_the_problems_have_every_kind_of_row():
    """Rows inside a token and at a boundary inside a unit, mass without a home in both, tokens with completions."""
    inside = between = homeless = completed = 0
    for problem in [prefix_problem(seed, **kind) for seed in range(6) for kind in KINDS]:
        units, tables = problem.units, problem.tables
        plan = _plan(units, tables)
        between += plan.at_boundary - len(units)
        inside += len(plan.unit) - plan.at_boundary
        inner = plan.teacher_rows[plan.at_boundary :]
        place = tables.teacher_first[units.teacher_tokens[inner]] + plan.depths[plan.at_boundary :]
        owner, position = expand(tables.continued_begin[place], tables.continued_stop[place])
        left = tables.teacher_first[tables.teacher_order[position]] + plan.depths[plan.at_boundary :][owner]
        homeless += int((tables.suffix_home[left] == tables.student_size).sum())
        tokens = units.student_tokens[units.student_start]
        completed += int((tables.group_stop > tables.group_begin)[tokens].sum())
        assert (tables.home == tables.student_size).sum() >= 4 and not tables.routed.all()
    assert min(inside, between, homeless, completed) > 20


@BOTH
@pytest.mark.parametrize(("seed", "fast"), [(1, True), (4, True), *slow((1, False), (4, False))])
def test_gradcheck(name, seed, fast):
    """Fast: along one random direction, which every entry of the gradient has a part in."""
    problem = prefix_problem(seed, student_size=13, teacher_size=15, responses=2, merge=0.3)
    tensors = (problem.student_hidden, problem.student_head.weight, problem.student_head.bias)

    def losses(hidden, weight, bias):
        head = dataclasses.replace(problem.student_head, weight=weight, bias=bias)
        given = (hidden, head, *getattr(problem, name)()[2:])
        return LOSSES[name](*given, reduction="none", chunk_rows=3)

    assert torch.autograd.gradcheck(losses, tensors, fast_mode=fast)


# Digits: the student spells them one by one, the teacher in twos as well. The last id of both ends the turn.
STUDENT_DIGITS = [b"1", b"2", b"3", b"21", None]
TEACHER_DIGITS = [b"1", b"2", b"3", b"12", b"13", b"123", b"4", None]
TEACHER_MASS = [0.05, 0.1, 0.02, 0.3, 0.2, 0.1, 0.03, 0.2]
STUDENT_MASS = [[0.4, 0.2, 0.1, 0.1, 0.2], [0.1, 0.3, 0.2, 0.15, 0.25]]


def digits(
    student: list[int], teacher: list[int], student_mass=STUDENT_MASS, teacher_mass=TEACHER_MASS
) -> PrefixProblem:
    """One unit in which the student's rows predict student_mass and each teacher row predicts teacher_mass."""
    units = AlignedUnits(
        *(torch.tensor([x]) for x in (0, len(student), 0, len(teacher))), torch.tensor(student), torch.tensor(teacher)
    )
    ours, head = rows_of(student_mass[: len(student)])
    theirs, teacher_head = rows_of([teacher_mass] * len(teacher))
    tables = PrefixTables.build(STUDENT_DIGITS, TEACHER_DIGITS, special_routes={7: 4})
    return PrefixProblem(ours.requires_grad_(), head, theirs, teacher_head, units, make_shared(3, 5, 8), tuple(STUDENT_DIGITS),
                         tuple(TEACHER_DIGITS), {7: 4}, (len(student),), tables)  # fmt: skip


def rows_of(mass: list[list[float]]) -> tuple[Tensor, LMHead]:
    """Hidden states and a head that predict it; a token that no row has is excluded by its bias."""
    mass = torch.tensor(mass, dtype=torch.float64)
    never = (mass == 0).all(dim=0)
    bias = torch.zeros(mass.shape[1], dtype=torch.float64).masked_fill_(never, -torch.inf)
    return mass.log().masked_fill_(never, 0), LMHead(torch.eye(mass.shape[1], dtype=torch.float64), bias)


def kl(*outcomes: tuple[float, float]) -> float:
    return sum(p * (torch.tensor(p, dtype=torch.float64) / q).log().item() for p, q in outcomes)


def test_bpm_by_hand():
    """The teacher's 12 as the student's 1, 2."""
    problem = digits([0, 1], [3])
    # 1, 12, 13, 123 go to 1; 4 has no home, and nothing goes to the student's 21.
    first = kl((0.65, 0.4), (0.1, 0.2), (0.02, 0.1), (0.2, 0.2), (0.03, 0.1))
    # After 1 come 12, 13, 123 with 0.6 in all: 2 half and 23 (to 2) a sixth, 3 a third.
    second = kl((2 / 3, 0.3), (1 / 3, 0.2))
    loss = bpm_loss(*problem.bpm())
    loss.backward()
    assert loss.item() == pytest.approx(first + second, rel=1e-12)
    # q - t; the residual class has one token here.
    expected = [[0.4 - 0.65, 0.2 - 0.1, 0.1 - 0.02, 0.1 - 0.03, 0.0], [0.1, 0.3 - 2 / 3, 0.2 - 1 / 3, 0.15, 0.25]]
    torch.testing.assert_close(problem.student_hidden.grad, torch.tensor(expected, dtype=torch.float64))


def test_bpm_inside_a_later_teacher_token():
    """21 as 2 and 1 against 2, 12 as 1, 2: bounds of the teacher's tokens count, not of the unit."""
    student, teacher = [b"21", b"2", b"1"], [b"2", b"12", b"13", b"1"]  # the text 212
    units = AlignedUnits(*(torch.tensor([x]) for x in (0, 2, 0, 2)), torch.tensor([0, 1]), torch.tensor([0, 1]))
    q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    heads = [LMHead(torch.eye(n, dtype=torch.float64)) for n in (3, 4)]
    loss = bpm_loss(q.log(), heads[0], p.log(), heads[1], units, PrefixTables.build(student, teacher))
    # First row: 2 to 2, 12, 13 and 1 to 1. Second: 1 is emitted of the second teacher row's 12; 2 follows, 3 has no home.
    assert loss.item() == pytest.approx(kl((0.4, 0.3), (0.6, 0.2)) - 0.0 + kl((0.4, 0.6), (0.6, 0.4)), rel=1e-12)


def test_a_student_without_tokens_for_the_residual_class():
    """What has no home is left out, and the row weighs what remains."""
    student, teacher = [b"1", b"2"], [b"1", b"12", b"2", b"4"]
    units = AlignedUnits(*(torch.tensor([x]) for x in (0, 1, 0, 1)), torch.tensor([0]), torch.tensor([0]))
    hidden = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log().requires_grad_()
    p = torch.tensor([[0.2, 0.1, 0.3, 0.4]], dtype=torch.float64)
    heads = [LMHead(torch.eye(n, dtype=torch.float64)) for n in (2, 4)]
    loss = bpm_loss(hidden, heads[0], p.log(), heads[1], units, PrefixTables.build(student, teacher))
    loss.backward()
    assert loss.item() == pytest.approx(0.6 * kl((0.5, 0.3), (0.5, 0.7)), rel=1e-12)
    torch.testing.assert_close(hidden.grad, 0.6 * torch.tensor([[0.3 - 0.5, 0.7 - 0.5]], dtype=torch.float64))
    oracle = bpm_losses(hidden, p.log(), units, student, teacher, {})
    assert oracle.item() == pytest.approx(loss.item(), rel=1e-12)


def test_a_residual_class_that_both_exclude():
    """4 has no home and no probability, 21 nothing that routes to it and none either: nothing is asked, and nothing lost."""
    student = [[0.5, 0.2, 0.1, 0.0, 0.2]]
    problem = digits([0], [0], student, [0.08, 0.1, 0.02, 0.3, 0.2, 0.1, 0.0, 0.2])
    loss = bpm_loss(*problem.bpm())
    loss.backward()
    assert loss.item() == pytest.approx(kl((0.68, 0.5), (0.1, 0.2), (0.02, 0.1), (0.2, 0.2)), rel=1e-12)
    expected = torch.tensor([[0.5 - 0.68, 0.2 - 0.1, 0.1 - 0.02, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(problem.student_hidden.grad, expected)
    assert bpm_loss(*digits([0], [0], student).bpm()).item() == torch.inf  # 4 is possible


@BOTH
def test_a_student_of_single_digits_that_writes_as_its_teacher_of_pairs_has_no_gradient(name):
    """The teacher's distribution over pairs, as first digit and second given the first, is where both losses are least."""
    student = [str(d).encode() for d in range(10)] + [None]
    teacher = [f"{n:02}".encode() for n in range(100)] + [None]
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(101, dtype=torch.float64, generator=generator).softmax(0)
    pairs = p[:100].view(10, 10)
    first, second = torch.cat([pairs.sum(1), p[100:]]), torch.cat([pairs[7] / pairs[7].sum(), p.new_zeros(1)])
    hidden = torch.stack([first, second]).log().clamp(min=-90).requires_grad_()
    units = AlignedUnits(*(torch.tensor([x]) for x in (0, 2, 0, 1)), torch.tensor([7, 3]), torch.tensor([73]))
    heads = [LMHead(torch.eye(n, dtype=torch.float64)) for n in (11, 101)]
    tables = PrefixTables.build(student, teacher, special_routes={100: 10})
    more = ([2],) if name == "escd" else ()
    loss = LOSSES[name](hidden, heads[0], p.log()[None], heads[1], units, tables, *more)
    loss.backward()
    assert hidden.grad.abs().max() < 1e-15
    entropy = -(pairs[7] * second[:10].log()).sum().item()  # a completion is a cross-entropy
    assert loss.item() == pytest.approx(entropy if name == "escd" else 0.0, abs=1e-14)


@BOTH
def test_one_vocabulary_is_ordinary_distillation(name):
    problem = prefix_problem(2, dropped=0.0)
    pieces = list(dict.fromkeys(p for p in problem.student_bytes if p)) + [None]
    size, rows = len(pieces), 40
    tokens = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(0))
    ones, place = torch.ones(rows, dtype=torch.int64), torch.arange(rows)
    units = AlignedUnits(place, ones, place, ones, tokens, tokens)
    torch.manual_seed(0)
    student = torch.randn(rows, size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(rows, size, dtype=torch.float64)
    head = LMHead(torch.eye(size, dtype=torch.float64))
    tables = PrefixTables.build(pieces, pieces, special_routes={size - 1: size - 1})
    more = ([rows],) if name == "escd" else ()
    losses = LOSSES[name](student, head, teacher, head, units, tables, *more, temperature=2.0, reduction="none")
    p, log_q = (teacher / 2).softmax(1), (student / 2).log_softmax(1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(1)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    made, wanted = (torch.autograd.grad(x.sum(), student)[0] for x in (losses, expected))
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


def test_a_unit_that_spells_two_texts():
    with pytest.raises(ValueError, match="units: unit 0 spells other bytes with its student tokens than"):
        bpm_loss(*digits([0, 1], [4]).bpm())
    assert bpm_loss(*digits([0], [4]).bpm()).isfinite()  # one row, of which nothing is emitted


def test_tokens_outside_the_head():
    problem = digits([0, 1], [3])
    units = dataclasses.replace(problem.units, student_tokens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="units.student_tokens holds id 9, outside the 5 ids of student_head"):
        bpm_loss(*dataclasses.replace(problem, units=units).bpm())
