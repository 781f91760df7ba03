"""ALM on aligned units, against the probabilities of whole units. Chunks, memory and bad input: test_uld.py, for both."""

import math

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, alm_loss
from simct_kernels.objectives.alm import log1mexp

from .cases import Problem, make_problem, relative_error
from .test_uld import HEADS, arguments


def reference(problem: Problem, tau: float, divergence: str) -> Tensor:
    """[G] in float64, from the units' probabilities."""
    sides = []
    for side in "teacher", "student":
        start, length, tokens = (getattr(problem.units, f"{side}_{part}") for part in ("start", "length", "tokens"))
        logits = getattr(problem, f"{side}_head").logits(getattr(problem, f"{side}_hidden"))
        own = logits.log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
        logp = torch.stack([own[a : a + n].sum() for a, n in zip(start.tolist(), length.tolist(), strict=True)])
        sides.append((logp / tau).exp())
    p, q = sides if divergence == "kl" else sides[::-1]
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
@pytest.mark.parametrize("tau", [1.0, 5.0])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_alm_is_its_definition(divergence, tau, head):
    exact = make_problem(**head)
    expected = reference(exact, tau, divergence)
    weights = torch.linspace(0.5, 2, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    problem = exact.to(torch.float32)
    options = {"temperature": tau, "divergence": divergence}
    losses = alm_loss(*arguments(problem), **options, reduction="none", chunk_rows=5)
    assert losses.dtype == torch.float32 and relative_error(losses.detach(), expected.detach()) < 1e-5
    (weights.float() * losses).sum().backward()
    assert set(problem.gradients()) == set(exact.gradients())
    for name, gradient in problem.gradients().items():
        assert relative_error(gradient, exact.gradients()[name]) < 1e-5, name


def one_token(student_margin: float, teacher_margin: float, dtype=torch.float32) -> tuple:
    """One single unit: the logit of its token above that of the only other one, on either side."""
    units = AlignedUnits(*(torch.tensor([x]) for x in (0, 1, 0, 1)), torch.tensor([0]), torch.tensor([0]))
    weight, hidden = torch.tensor([[1.0], [0.0]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
    student = (student_margin * hidden).requires_grad_()
    return student, LMHead(weight), teacher_margin * hidden, LMHead(weight), units


@pytest.mark.parametrize(
    ("student", "teacher"), [(20.0, 0.0), (40.0, 3.0), (3.0, 40.0), (60.0, 59.0), (-60.0, 1.0), (-30.0, -31.0)]
)
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
def test_probabilities_next_to_0_and_1_keep_their_digits(student, teacher, divergence):
    """1 - p is far below float32's rounding of p, and counts all the same. The KL in closed form, by margins d:
    log p = -log(1 + e^-d), log(1 - p) = -log(1 + e^d)."""
    loss = alm_loss(*(given := one_token(student, teacher)), divergence=divergence)
    loss.backward()
    a, b = (teacher, student) if divergence == "kl" else (student, teacher)

    def logs(margin: float) -> tuple[float, float]:
        def softplus(x: float) -> float:
            return max(x, 0) + math.log1p(math.exp(-abs(x)))

        return -softplus(-margin), -softplus(margin)

    (log_p, log_not_p), (log_q, log_not_q) = logs(a), logs(b)
    expected = math.exp(log_p) * (log_p - log_q) + math.exp(log_not_p) * (log_not_p - log_not_q)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    # d KL / d margin of the student: q - p forward, q (1 - q) (difference of the margins) reverse.
    p, q = (math.exp(logs(margin)[0]) for margin in (teacher, student))
    not_p, not_q = (math.exp(logs(margin)[1]) for margin in (teacher, student))
    difference = q - p if p < 0.5 or q < 0.5 else not_p - not_q
    slope = difference if divergence == "kl" else q * not_q * (student - teacher)
    assert given[0].grad.item() == pytest.approx(slope, rel=1e-4)


def test_what_both_sides_are_certain_of_costs_nothing():
    given = one_token(500.0, 500.0)
    loss = alm_loss(*given)
    loss.backward()
    assert loss.item() == 0 and given[0].grad.item() == 0


def test_what_the_student_excludes_is_infinitely_wrong():
    given = one_token(-1e30, 0.0, torch.float64)
    assert alm_loss(*given).item() > 1e29
    head = LMHead(given[1].weight, torch.tensor([-torch.inf, 0.0], dtype=torch.float64))
    assert alm_loss(given[0], head, *given[2:]).item() == torch.inf
    assert alm_loss(given[0], head, given[2], head, given[4]).item() == 0  # neither says it


def test_large_tau_is_the_difference_of_log_likelihoods():
    """For tau -> infinity, tau * loss -> log(p/q)-type costs: with a = -log p, b = -log q, KL -> (a log(a/b) - a + b) / tau."""
    problem, tau = make_problem(), 1e6
    losses = alm_loss(*arguments(problem), temperature=tau, reduction="none").detach()
    sides = []
    for side in "teacher", "student":
        start, length, tokens = (getattr(problem.units, f"{side}_{part}") for part in ("start", "length", "tokens"))
        logits = getattr(problem, f"{side}_head").logits(getattr(problem, f"{side}_hidden")).detach()
        own = -logits.log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
        sides.append(torch.stack([own[a : a + n].sum() for a, n in zip(start.tolist(), length.tolist(), strict=True)]))
    a, b = sides
    torch.testing.assert_close(losses * tau, a * (a / b).log() - a + b, rtol=1e-4, atol=1e-5)


def test_log1mexp():
    x = torch.tensor([-1e-30, -1e-6, -0.5, -0.6931, -0.6932, -1.0, -20.0, -80.0])
    expected = torch.where(x < -1, torch.log1p(-x.double().exp()), torch.log(-torch.expm1(x.double())))
    torch.testing.assert_close(log1mexp(x).double(), expected, rtol=1e-6, atol=0)
    assert log1mexp(torch.tensor(0.0)) == -torch.inf and log1mexp(torch.tensor(-torch.inf)) == 0


def test_tokens_outside_the_head():
    problem = make_problem(student_vocabulary=83, dtype=torch.float32)
    largest = int(problem.units.student_tokens.max())
    head = LMHead(problem.student_head.weight[:largest], problem.student_head.bias[:largest])
    given = list(arguments(problem))
    given[1] = head
    with pytest.raises(ValueError, match=f"units.student_tokens holds id {largest}, outside the {largest} ids"):
        alm_loss(*given)


def test_divergences():
    with pytest.raises(ValueError, match="divergence must be one of 'kl', 'reverse_kl', got 'tv'"):
        alm_loss(*arguments(make_problem()), divergence="tv")
