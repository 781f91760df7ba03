"""Candidates that are sums of ids: the oracle by hand, the PyTorch backend by the oracle, what is refused."""

import dataclasses
import math
import pickle
import re

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from simct_kernels import (
    AlignedUnits,
    SharedVocabulary,
    candidate_mass,
    linear_simct_loss,
    simct_loss,
    topk_candidate_counts,
    topk_simct_loss,
)

from .cases import FEW, Problem, make_problem, relative_error, slow, with_classes
from .test_inputs import ids
from .test_ops import captured
from .test_topk import serve
from .test_torch_backend import HEADS, assert_agrees, name, run_linear

inf, nan = math.inf, math.nan
SIZES = [((2, 3),), ((1, 4),), ((3, 1), (1, 2))]
OPTIONS = [
    {},
    {"beta": 0.0},
    {"beta": 0.5, "temperature": 2.0},
    {"score": "sum_logprob", "candidates": "disjoint"},
    {"score": "mean_logit"},
    {"top_k": 2},  # picked
    {"top_k": 7, "candidates": "disjoint", "beta": 0.3},
    {"top_k": 38, "score": "sum_logprob"},  # more than K of 37, fewer than all candidates
    {"teacher_mass_floor": 0.5, "temperature": 2.0},
    {"score": "mean_logit", "teacher_mass_floor": 0.5, "top_k": 2},
]


def rows(*classes: tuple[int, ...]) -> Tensor:
    """int64 [M, 2]: the given ids of class 0, of class 1 and so on."""
    return torch.tensor([(number, i) for number, members in enumerate(classes) for i in members])


SHARED = SharedVocabulary(ids(4, 5), ids(1, 2), rows((7, 3), (9,)), rows((0,), (6, 5, 8)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_worked_by_hand(backend):
    """One shared token and a class of two student ids against one teacher id, in a single unit of the class.

    Student: logits 0, so the shared token has 1 and the class 1 + 1: q = 1/3, 2/3. Teacher: e^0 and e^log 3: p = 1/4, 3/4. Of
    the reverse KL the derivative by a score is q (log(q / p) - KL), and the class's is divided evenly.
    """
    shared = SharedVocabulary(ids(0), ids(1), rows((2, 1)), rows((0,)))
    units = AlignedUnits(ids(0), ids(1), ids(0), ids(1), ids(1), ids(0))
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3), 0, 5]], dtype=torch.float64)
    loss = simct_loss(student, teacher, units, shared, backend=backend)
    kl = math.log(4 / 3) / 3 + math.log(8 / 9) * 2 / 3
    assert loss.item() == pytest.approx(kl, rel=1e-12)
    loss.backward()
    by_class = 2 / 3 * (math.log(8 / 9) - kl)
    assert student.grad[0].tolist() == pytest.approx([-by_class, by_class / 2, by_class / 2, 0], rel=1e-12)


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[3], *slow(OPTIONS[5])], ids=name)
def test_gradcheck(options):
    sizes = {"shared_size": 5, "student_vocabulary": 11, "teacher_vocabulary": 9}
    problem = with_classes(make_problem(FEW, softcap=2.0, scale=0.7, **sizes), (2, 3), (1, 1))
    student, *rest = problem.logits()

    def logits(student):
        return simct_loss(student, *rest, reduction="none", backend="reference", **options)

    assert gradcheck(logits, (student,), fast_mode=True)


def paired(problem: Problem) -> tuple[Problem, Problem]:
    """A problem, and the same with its last shared pair, which nothing leaves out, as a class of one id on each side."""
    shared, last = problem.shared, len(problem.shared) - 1
    assert not (problem.units.left_out[:, 1] == last).any()
    pair = {f"{side}_classes": rows((getattr(shared, f"{side}_ids")[-1].item(),)) for side in ("student", "teacher")}
    cut = SharedVocabulary(shared.student_ids[:-1], shared.teacher_ids[:-1], **pair)
    tokens = {}
    for side in ("student", "teacher"):  # the first unit is of that pair
        tokens[f"{side}_tokens"] = getattr(problem.units, f"{side}_tokens").clone()
        tokens[f"{side}_tokens"][getattr(problem.units, f"{side}_start")[0]] = getattr(shared, f"{side}_ids")[-1]
    problem = dataclasses.replace(problem, units=dataclasses.replace(problem.units, **tokens))
    return problem, dataclasses.replace(problem, shared=cut)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_a_class_of_one_pair_is_that_pair(options, backend):
    pair, single = paired(make_problem(shared_size=38, softcap=3.0, scale=0.5))
    assert pair.units.has_continuation(pair.shared).equal(single.units.has_continuation(single.shared))
    for reduction in ("none", "sum"):
        expected, expected_gradients = run_linear(pair, backend=backend, reduction=reduction, **options)
        loss, gradients = run_linear(single, backend=backend, reduction=reduction, **options)
        assert relative_error(loss, expected) < 1e-12
        assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-12 for key in expected_gradients)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_linear_agrees_with_oracle(options, sizes):
    head = HEADS[(OPTIONS.index(options) + SIZES.index(sizes)) % len(HEADS)]
    assert_agrees(with_classes(make_problem(dtype=torch.float32, **head), *sizes), 1e-5, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    problem = with_classes(make_problem(dtype=torch.float32, softcap=3.0), (2, 3)).to(dtype)
    assert_agrees(problem, tolerance, chunk_rows=2)
    assert_agrees(problem, tolerance, top_k=2)


@pytest.mark.parametrize(
    "options,dtype,tolerance",
    [*((options, torch.float32, 1e-5) for options in OPTIONS), (OPTIONS[0], torch.bfloat16, 1e-2)],
    ids=name,
)
def test_logits_agree_with_oracle(options, dtype, tolerance):
    student, teacher, *rest = with_classes(make_problem(), (2, 3), (1, 2)).to(dtype).logits()
    exact = student.detach().double().requires_grad_()
    expected = simct_loss(exact, teacher.double(), *rest, backend="reference", reduction="none", **options)
    expected.sum().backward()
    for reduction in ("none", "sum"):
        student.grad = None
        loss = simct_loss(student, teacher, *rest, reduction=reduction, **options)
        loss.sum().backward()
        assert relative_error(loss.detach(), expected.detach() if reduction == "none" else expected.sum()) < tolerance
        assert relative_error(student.grad, exact.grad) < tolerance


def both_chosen() -> Problem:
    """A class and the last shared token, which stands for it in picked columns, are the student's two best everywhere."""
    problem = with_classes(make_problem(FEW, dtype=torch.float32), (2, 3))
    bias = problem.student_head.bias.detach().clone()
    bias[problem.shared.student_classes[:, 1]] += 20
    bias[problem.shared.student_ids[-1]] += 20
    return dataclasses.replace(
        problem, student_head=dataclasses.replace(problem.student_head, bias=bias.requires_grad_())
    )


def test_a_class_and_the_last_shared_token_are_both_chosen():
    student, teacher, *rest = both_chosen().logits()
    exact = student.detach().double().requires_grad_()
    simct_loss(exact, teacher.double(), *rest, backend="reference", top_k=2).backward()
    units, shared = rest
    assert exact.grad[units.student_start, shared.student_ids[-1]].all()
    simct_loss(student, teacher, *rest, backend="torch", top_k=2).backward()
    assert relative_error(student.grad, exact.grad) < 1e-5
    assert_agrees(both_chosen(), 1e-5, top_k=2)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("score", ["mean_logprob", "mean_logit"])
def test_the_mass_counts_every_id_of_a_class(side, score):
    """With all ids of a side among candidates, a unit without a continuation has mass 1."""
    problem = make_problem(shared_size=40, student_vocabulary=43, teacher_vocabulary=44)
    problem = with_classes(problem, (3, 4))
    hidden, head = getattr(problem, f"{side}_hidden").detach(), getattr(problem, f"{side}_head")
    mass = candidate_mass(hidden, head, problem.units, problem.shared, side=side, score=score)
    continued = problem.units.has_continuation(problem.shared)
    assert not continued.all() and (mass[continued] > 1).all()
    torch.testing.assert_close(mass[~continued], torch.ones(int((~continued).sum())))


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("score") != "mean_logit"], ids=name)
def test_served(options):
    problem = with_classes(make_problem(softcap=3.0), (2, 3), (2, 1))
    for k in (2, 9):
        served = serve(problem, k)
        expected, expected_gradients = served.run(backend="reference", reduction="none", **options)
        for reduction in ("none", "sum"):
            loss, gradients = served.run(reduction=reduction, **options)
            assert relative_error(loss, expected if reduction == "none" else expected.sum()) < 1e-12
            assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-12 for key in expected_gradients)
    # All of the teacher's vocabulary served is the loss that sees the teacher.
    everything = serve(problem, problem.teacher_head.weight.shape[0])
    loss, gradients = everything.run(**options)
    expected, expected_gradients = run_linear(problem, **options)
    assert relative_error(loss, expected) < 1e-12
    assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-12 for key in expected_gradients)


def test_what_is_served_of_a_class():
    """Of ids 0 and 2 in a class, 2 served twice: their sum, the larger of the two counted once."""
    shared = SharedVocabulary(ids(0), ids(1), rows((1, 2)), rows((0, 2)))
    units = AlignedUnits(ids(0, 1), ids(1, 1), ids(0, 1), ids(1, 1), ids(0, 2), ids(1, 2))
    served, logprobs = torch.tensor([[2, 0, 2, 1], [1, 5, 7, -1]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2).log()
    assert topk_candidate_counts(served, logprobs, units, shared).tolist() == [2, 1]
    problem = dataclasses.replace(make_problem([(1, 1)] * 2), units=units, shared=shared)
    hidden, head = problem.student_hidden[:2], problem.student_head
    arguments = hidden, head, served, logprobs.double(), logprobs[:, 0].double(), units, shared
    loss = topk_simct_loss(*arguments, beta=0.0, reduction="none")
    p = torch.tensor([0.4, 0.5]).double() / 0.9
    z = head.logits(hidden[:1])[0]
    q = torch.stack([z[0], z[1:3].logsumexp(0)]).log_softmax(0)
    torch.testing.assert_close(loss, torch.stack([(p * (p.log() - q)).sum(), torch.tensor(0.0).double()]))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_excluded_ids(beta):
    """Of a class, an id that is impossible adds nothing; a class whose ids all are, on one side, is excluded there."""
    problem = with_classes(make_problem(FEW, dtype=torch.float32), (2, 3))
    student, teacher, units, shared = problem.logits()
    student = student.detach()
    first, last = units.student_start[0], units.student_start[-1]
    student[first, shared.student_classes[0, 1]] = -inf
    student[last, shared.student_classes[:, 1]] = -inf
    student.requires_grad_()
    losses = simct_loss(student, teacher, units, shared, beta=beta, reduction="none")
    exact = simct_loss(
        student.double(), teacher.double(), units, shared, beta=beta, reduction="none", backend="reference"
    )
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    assert losses[:-1].isfinite().all() and losses[-1].isfinite() == (beta > 0)
    (gradient,) = torch.autograd.grad(losses[losses.isfinite()].sum(), student)
    assert gradient.isfinite().all() and not gradient[last, shared.student_classes[:, 1]].any()


def test_a_nan_stays_in_its_unit():
    problem = with_classes(make_problem(FEW), (2, 3))
    student, teacher, units, shared = problem.logits()
    teacher[units.teacher_start[3], shared.teacher_classes[1, 1]] = nan
    losses = simct_loss(student, teacher, units, shared, reduction="none")
    assert losses.isnan().tolist() == [unit == 3 for unit in range(len(units))]
    (gradient,) = torch.autograd.grad((losses * (torch.arange(len(units)) != 3)).sum(), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", ["linear", "topk"])
def test_the_custom_ops_take_them(loss, monkeypatch):
    problem = with_classes(make_problem(dtype=torch.float32), (2, 3))
    if loss == "linear":
        function, arguments = linear_simct_loss, problem.arguments()
        expected = linear_simct_loss(*arguments)
    else:
        served = serve(problem, 4)
        rest = served.ids, served.logprobs, served.token_logprobs, problem.units, problem.shared
        function, arguments = topk_simct_loss, (problem.student_hidden, problem.student_head, *rest)
        expected = topk_simct_loss(*arguments)
    result, *_ = captured(monkeypatch, function, arguments)
    torch.testing.assert_close(result, expected)
    weight = problem.student_head.weight
    for got, wanted in zip(
        torch.autograd.grad(result, (problem.student_hidden, weight)),
        torch.autograd.grad(expected, (problem.student_hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_a_single_unit_of_one_class_has_no_continuation():
    tokens = ids(4, 7, 3, 9, 7, 4, 7), ids(1, 0, 0, 8, 8, 2, 1)
    start, one = torch.arange(7), torch.ones(7, dtype=torch.int64)
    units = AlignedUnits(start, one, start, one, *tokens)
    assert units.has_continuation(SHARED).tolist() == [False, False, False, False, True, True, True]


def test_classes_move_along():
    assert len(SHARED) == 2 and SHARED.class_count == 2
    for copied in (SHARED.to("cpu"), pickle.loads(pickle.dumps(SHARED))):
        assert copied.student_classes.equal(SHARED.student_classes) and copied.class_count == 2
        assert copied.teacher_classes.equal(SHARED.teacher_classes)
    moved = SHARED.to("meta")
    assert moved.student_classes.is_meta and moved.teacher_classes.is_meta and moved.class_count == 2


GOOD = {"student_classes": rows((7, 3)), "teacher_classes": rows((0, 5))}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"student_classes": None}, "student_classes is None, but teacher_classes is given: expected both or neither"),
        ({"teacher_classes": None}, "teacher_classes is None, but student_classes is given: expected both or neither"),
        ({"student_classes": [[0, 7]]}, "student_classes must be int64 [any, 2], got list"),
        ({"teacher_classes": rows((0,)).int()}, "teacher_classes must be int64 [any, 2], got torch.int32 [1, 2]"),
        ({"student_classes": ids(7, 3)}, "student_classes must be int64 [any, 2], got torch.int64 [2]"),
        ({"student_classes": rows((7,))[:0]}, "student_classes is empty: expected rows (class, id), or None"),
        ({"student_classes": rows((7, -3))}, "student_classes must be at least 0, got -3"),
        ({"student_classes": rows((7, 7))}, "student_classes must not repeat an id, got 7"),
        ({"teacher_classes": rows((0,), (0,))}, "teacher_classes must not repeat an id, got 0"),
        ({"student_classes": rows((7, 5))}, "student_classes must not hold an id of student_ids, got 5"),
        ({"teacher_classes": rows((2, 0))}, "teacher_classes must not hold an id of teacher_ids, got 2"),
        ({"student_classes": rows((), (7,))}, "student_classes must be sorted by class, from 0 without a gap, got 1"),
        ({"student_classes": rows((7,), (3,)).flip(0)}, "student_classes must be sorted by class"),
        ({"student_classes": rows((7,), (), (3,))}, "student_classes must be sorted by class"),
        ({"teacher_classes": rows((0,), (5,))}, "teacher_classes has 2 classes, but student_classes has 1"),
        ({"student_classes": rows((7,)).to("meta")}, "student_classes is on meta, but student_ids is on cpu"),
    ],
)
def test_what_is_no_class_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SharedVocabulary(ids(4, 5), ids(1, 2), **{**GOOD, **changes})


def test_ids_beyond_the_head_are_refused():
    problem = make_problem()
    shared = dataclasses.replace(
        problem.shared, student_classes=rows((83,)), teacher_classes=rows((problem.units.max_teacher_token + 200,))
    )
    with pytest.raises(ValueError, match=r"shared\.student_classes holds id 83, outside the 83 ids of student_head"):
        linear_simct_loss(*dataclasses.replace(problem, shared=shared).arguments())
