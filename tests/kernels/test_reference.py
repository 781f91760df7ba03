"""The oracle: its derivatives against finite differences, its value against a case worked by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from simct_kernels import AlignedUnits, SharedVocabulary, linear_simct_loss, simct_loss

from .cases import make_problem, slow

SMALL = ((1, 1), (2, 1), (1, 3), (1, 1), (1, 1), (2, 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0},
        {"beta": 0.3, "temperature": 1.7},
        {"score": "sum_logprob", "candidates": "disjoint"},
        {"score": "mean_logit", "teacher_mass_floor": 0.3},
        {"top_k": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("fast", [True, *slow(False)])
def test_gradcheck(options, fast):
    sizes = {"shared_size": 7, "student_vocabulary": 11, "teacher_vocabulary": 9}
    problem = make_problem(SMALL, softcap=2.0, scale=0.7, **sizes)
    head = problem.student_head

    def linear(hidden, weight, bias):
        bound = type(head)(weight, bias, head.softcap, head.scale)
        return linear_simct_loss(
            hidden, bound, *problem.arguments()[2:], reduction="none", backend="reference", **options
        )

    assert gradcheck(linear, (problem.student_hidden, head.weight, head.bias), fast_mode=True)
    student, *rest = problem.logits()

    def logits(student):
        return simct_loss(student, *rest, reduction="none", backend="reference", **options)

    assert gradcheck(logits, (student,), fast_mode=fast)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_worked_by_hand(backend):
    """Two shared tokens and a unit of two student tokens against one teacher token; all logits 0 but one.

    Student, V = 4: every log-probability is -log 4, the mean over the unit's two rows too: q = 1/3 each.
    Teacher, V = 3: its own token has logit log 2, so probabilities 1/4, 1/4 and 1/2 for the continuation.
    """
    shared = SharedVocabulary(torch.tensor([0, 1]), torch.tensor([1, 0]))
    one, zero = torch.tensor([1]), torch.tensor([0])
    units = AlignedUnits(zero, 2 * one, zero, one, torch.tensor([2, 3]), torch.tensor([2]))
    teacher = torch.tensor([[0.0, 0.0, math.log(2.0)]], dtype=torch.float64)
    student = torch.zeros(2, 4, dtype=torch.float64)
    reverse = (math.log(4 / 3) * 2 + math.log(2 / 3)) / 3
    forward = math.log(3 / 4) / 2 + math.log(3 / 2) / 2
    for beta, expected in ((1.0, reverse), (0.0, forward)):
        loss = simct_loss(student, teacher, units, shared, beta=beta, backend=backend)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
    # The product of the unit's two probabilities instead of their mean: scores 1/4, 1/4, 1/16.
    q = torch.tensor([4 / 9, 4 / 9, 1 / 9], dtype=torch.float64)
    p = torch.tensor([1 / 4, 1 / 4, 1 / 2], dtype=torch.float64)
    loss = simct_loss(student, teacher, units, shared, score="sum_logprob", backend=backend)
    assert loss.item() == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-12)


def test_mean_logit_is_mean_logprob_where_normalisers_agree():
    student, teacher, units, shared = make_problem().logits()
    student = student.log_softmax(1)
    teacher = teacher.log_softmax(1)
    losses = [
        simct_loss(student, teacher, units, shared, score=score, reduction="none", backend="reference")
        for score in ("mean_logit", "mean_logprob")
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
