"""BPM against its oracle and by hand. What it shares with ESCD (chunks, memory, bad input) is tested for both here."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, PrefixTables, bpm_loss, escd_loss
from simct_kernels.bpm import _plan
from simct_kernels.prefix_reference import bpm_losses
from simct_kernels.segments import expand

from .cases import make_shared, relative_error
from .prefix_cases import LETTERS, PrefixProblem, cut, prefix_problem, units_of, without_units
from .test_cost import RecordSizes

LOSSES = {"bpm": bpm_loss, "escd": escd_loss}
KINDS = [{}, {"merge": 0.4}, {"softcap": 3.0, "scale": 0.5}, {"bias": False, "dropped": 0.0}]
BOTH = pytest.mark.parametrize("name", LOSSES)


def run(name: str, problem: PrefixProblem, **options):
    return LOSSES[name](*getattr(problem, name)(), **options)


@BOTH
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_values_and_gradients_are_the_oracles(name, seed, kind, dtype, tolerance):
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
@pytest.mark.parametrize("seed", [1, 4])
def test_gradcheck(name, seed):
    problem = prefix_problem(seed, student_size=13, teacher_size=15, responses=2, merge=0.3)
    tensors = (problem.student_hidden, problem.student_head.weight, problem.student_head.bias)

    def losses(hidden, weight, bias):
        head = dataclasses.replace(problem.student_head, weight=weight, bias=bias)
        given = (hidden, head, *getattr(problem, name)()[2:])
        return LOSSES[name](*given, reduction="none", chunk_rows=3)

    assert torch.autograd.gradcheck(losses, tensors)


# Digits: the student spells them one by one, the teacher in twos as well. The last id of both ends the turn.
STUDENT_DIGITS = [b"1", b"2", b"3", b"21", None]
TEACHER_DIGITS = [b"1", b"2", b"3", b"12", b"13", b"123", b"4", None]
TEACHER_MASS = [0.05, 0.1, 0.02, 0.3, 0.2, 0.1, 0.03, 0.2]
STUDENT_MASS = [[0.4, 0.2, 0.1, 0.1, 0.2], [0.1, 0.3, 0.2, 0.15, 0.25]]


def digits(student: list[int], teacher: list[int]) -> PrefixProblem:
    """One unit in which the student's rows predict STUDENT_MASS and each teacher row predicts TEACHER_MASS."""
    units = AlignedUnits(
        *(torch.tensor([x]) for x in (0, len(student), 0, len(teacher))), torch.tensor(student), torch.tensor(teacher)
    )
    mass = torch.tensor(STUDENT_MASS, dtype=torch.float64)[: len(student)].log().requires_grad_()
    teacher_mass = torch.tensor([TEACHER_MASS] * len(teacher), dtype=torch.float64).log()
    one = {n: LMHead(torch.eye(n, dtype=torch.float64, requires_grad=n == 5)) for n in (5, 8)}
    tables = PrefixTables.build(STUDENT_DIGITS, TEACHER_DIGITS, special_routes={7: 4})
    return PrefixProblem(mass, one[5], teacher_mass, one[8], units, make_shared(3, 5, 8), tuple(STUDENT_DIGITS),
                         tuple(TEACHER_DIGITS), {7: 4}, (len(student),), tables)  # fmt: skip


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


@BOTH
def test_reductions_chunks_and_unit_losses(name):
    problem = prefix_problem(3, responses=5)
    losses = run(name, problem, reduction="none")
    total, units = run(name, problem, return_unit_losses=True)
    assert not units.requires_grad and units.equal(losses.detach())
    torch.testing.assert_close(total, losses.sum())
    torch.testing.assert_close(run(name, problem, reduction="mean"), losses.mean())
    total.backward()
    for chunk_rows in (1, 7, 1000):
        other = prefix_problem(3, responses=5)
        loss = run(name, other, chunk_rows=chunk_rows)
        torch.testing.assert_close(loss, total)
        loss.backward()
        for part, gradient in other.gradients().items():
            torch.testing.assert_close(gradient, problem.gradients()[part])


@BOTH
def test_the_order_of_units_changes_nothing(name):
    problem = prefix_problem(5, responses=4)
    losses = run(name, problem, reduction="none")
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(problem, units=problem.units.select(order))
    torch.testing.assert_close(run(name, shuffled, reduction="none"), losses[order])


@BOTH
@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_only_what_is_trained_gets_a_gradient(name, frozen):
    problem, whole = prefix_problem(), prefix_problem()
    run(name, whole).backward()
    head = (problem.student_head.weight, problem.student_head.bias)
    for tensor in head if frozen == "head" else (problem.student_hidden,):
        tensor.requires_grad_(False)
    run(name, problem).backward()
    assert set(problem.gradients()) == ({"hidden"} if frozen == "head" else {"weight", "bias"})
    for part, gradient in problem.gradients().items():
        assert gradient.equal(whole.gradients()[part])


@BOTH
def test_low_precision_inputs(name):
    problem = prefix_problem().to(torch.bfloat16)
    wide = problem.to(torch.float64)
    run(name, wide).backward()
    result = run(name, problem)
    result.backward()
    assert result.dtype == torch.float32
    for part, gradient in problem.gradients().items():
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, wide.gradients()[part]) < 1e-2, part


@BOTH
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_unit_gives_a_differentiable_zero(name, reduction):
    problem = without_units(prefix_problem())
    result = run(name, problem, reduction=reduction)
    assert result.sum().item() == 0
    result.sum().backward()
    assert set(problem.gradients()) == {"hidden", "weight", "bias"}
    assert not any(gradient.any() for gradient in problem.gradients().values())


@BOTH
def test_twice_differentiated_is_refused(name):
    problem = prefix_problem()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(run(name, problem), problem.student_hidden, create_graph=True)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_student_rows_stay_in_the_units_that_read_them(name, value):
    problem = prefix_problem(5, responses=4)
    losses = run(name, problem, reduction="none")
    row = int(problem.units.student_start[4]) + 1
    reads = [
        g
        for g in range(len(losses))
        if torch.autograd.grad(losses[g], problem.student_hidden, retain_graph=True)[0][row].any()
    ]
    assert 0 < len(reads) < len(losses)
    with torch.no_grad():
        problem.student_hidden[row] = value
    losses = run(name, problem, reduction="none")
    assert losses.isfinite().logical_not().nonzero().flatten().tolist() == reads
    assert not run(name, problem).isfinite()
    losses[losses.isfinite()].sum().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in problem.gradients().values())


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_teacher_rows_stay_in_their_unit(name, value):
    problem = prefix_problem(5, responses=4)
    bad = 6
    problem.teacher_hidden[problem.units.teacher_start[bad]] = value
    losses = run(name, problem, reduction="none")
    assert losses.isfinite().logical_not().nonzero().flatten().tolist() == [bad]
    losses[losses.isfinite()].sum().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in problem.gradients().values())


@BOTH
def test_what_a_model_excludes(name):
    """Logits of -inf: a teacher token of no probability costs nothing, a student token of none is infinitely wrong."""
    problem = prefix_problem(5, dropped=0.0)
    excluded = problem.teacher_bytes.index(b"z")
    bias = problem.teacher_head.bias.clone()
    bias[excluded] = -torch.inf
    given = list(getattr(problem, name)())
    given[3] = dataclasses.replace(problem.teacher_head, bias=bias)
    loss = LOSSES[name](*given)
    loss.backward()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in problem.gradients().values())
    oracle = dataclasses.replace(problem, teacher_head=given[3]).reference(name)
    torch.testing.assert_close(loss, oracle.sum())
    bias = problem.student_head.bias.detach().clone()
    bias[problem.student_bytes.index(b"a")] = -torch.inf
    given[1] = dataclasses.replace(problem.student_head, bias=bias)
    assert LOSSES[name](*given).item() == torch.inf


@BOTH
def test_probabilities_far_below_one_keep_their_gradient(name):
    """A student that has all but excluded what the teacher asks for: the loss and its slope stay exact in float32."""
    exact = prefix_problem(4, dropped=0.0)
    with torch.no_grad():
        exact.student_head.bias[torch.arange(0, 31, 3)] -= 60
        exact.teacher_head.bias[torch.arange(0, 37, 3)] -= 60
    exact.reference(name).sum().backward()
    problem = exact.to(torch.float32)
    run(name, problem).backward()
    for part, gradient in problem.gradients().items():
        assert relative_error(gradient, exact.gradients()[part]) < 1e-5, part


def big_problem(student_size: int, teacher_size: int, rows: int) -> PrefixProblem:
    """Long vocabularies, where rows x vocabulary would be seen."""
    rng = random.Random(0)
    alphabet = [bytes([b]) for b in b"abcdefghijklmnop"]

    def pieces(size: int, longest: int) -> list[bytes]:
        found = dict.fromkeys(alphabet)
        while len(found) < size:
            found[b"".join(rng.choices(alphabet, k=rng.randrange(2, longest)))] = None
        return list(found)

    student_bytes, teacher_bytes = pieces(student_size, 5), pieces(teacher_size, 6)
    text = b"".join(rng.choices(alphabet, k=rows))
    ids = [[cut(rng, text, side)] for side in (student_bytes, teacher_bytes)]
    units = units_of(*ids, student_bytes, teacher_bytes)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student, teacher = (len(side[0]) for side in ids)
    return PrefixProblem(normal(student, 24).requires_grad_(), LMHead(normal(student_size, 24).requires_grad_()),
                         normal(teacher, 20), LMHead(normal(teacher_size, 20)), units, make_shared(3, 99, 99),
                         tuple(student_bytes), tuple(teacher_bytes), {}, (student,),
                         PrefixTables.build(student_bytes, teacher_bytes))  # fmt: skip


@BOTH
def test_nothing_of_rows_by_vocabulary_exists_or_is_kept(name):
    problem = big_problem(10_000, 9_000, 1000)
    assert len(problem.units) > 160
    inputs = {problem.student_hidden.data_ptr(), problem.student_head.weight.data_ptr()}
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with RecordSizes() as record:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run(name, problem, chunk_rows=16)
        loss.backward()
    heads = {(rows, width) for rows in (10_000, 9_000) for width in (24, 20)}
    sizes = [torch.Size(s).numel() for s in record.shapes if s not in heads and s[::-1] not in heads]
    assert max(sizes) == 16 * 10_001  # one column for what has no home
    assert max(tensor.numel() for tensor in saved if tensor.data_ptr() not in inputs) < 1000


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"reduction": "average"}, "reduction must be one of .*'average'"),
        ({"chunk_rows": 0}, "chunk_rows must be .*got 0"),
    ],
    ids=str,
)
def test_options_out_of_range(name, change, message):
    with pytest.raises(ValueError, match=message):
        run(name, prefix_problem(), **change)


@BOTH
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 13), "student_hidden has 3 rows"),
        (2, torch.zeros(29, 5), "teacher_hidden has 5 columns"),
        (1, torch.zeros(3, 13), "student_head must be an LMHead, got Tensor"),
        (4, "units", "units must be AlignedUnits, got str"),
        (5, None, "tables must be PrefixTables, got NoneType"),
        (
            5,
            PrefixTables.build(LETTERS, LETTERS),
            "tables was built of 5 student tokens, but student_head.weight has 31",
        ),
        (5, PrefixTables.build([None] * 30 + LETTERS[:1], LETTERS), "built of 5 teacher tokens, .* has 37 rows"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_inputs_that_do_not_fit(name, place, value, message):
    given = list(getattr(prefix_problem(), name)())
    given[place] = value
    with pytest.raises(ValueError, match=message):
        LOSSES[name](*given)


def test_a_unit_that_spells_two_texts():
    with pytest.raises(ValueError, match="units: unit 0 spells other bytes with its student tokens than"):
        bpm_loss(*digits([0, 1], [4]).bpm())
    assert bpm_loss(*digits([0], [4]).bpm()).isfinite()  # one row, of which nothing is emitted


def test_tokens_outside_the_head():
    problem = digits([0, 1], [3])
    units = dataclasses.replace(problem.units, student_tokens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="units.student_tokens holds id 9, outside the 5 ids of student_head"):
        bpm_loss(*dataclasses.replace(problem, units=units).bpm())
