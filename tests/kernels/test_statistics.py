"""The no-grad helpers, against whole softmaxes."""

import pytest
import torch

from simct_kernels import candidate_mass, linear_simct_loss, token_statistics

from .cases import make_problem, relative_error


@pytest.mark.parametrize("chunk_rows", ["auto", 1, 7])
def test_token_statistics(chunk_rows):
    problem = make_problem(softcap=3.0, scale=0.5, dtype=torch.float32)
    head, tokens = problem.student_head, problem.units.student_tokens
    result = token_statistics(problem.student_hidden, head, tokens, chunk_rows=chunk_rows)
    logits = head.logits(problem.student_hidden).double()
    log_p = logits.log_softmax(1)
    assert relative_error(result.logprob, log_p.gather(1, tokens[:, None]).squeeze(1)) < 1e-6
    assert relative_error(result.entropy, -(log_p.exp() * log_p).sum(1)) < 1e-6
    assert relative_error(result.logsumexp, logits.logsumexp(1)) < 1e-6
    assert all(not part.requires_grad and part.dtype == torch.float32 for part in result)


def test_token_statistics_of_a_certain_token():
    problem = make_problem()
    problem.student_head.bias.data[:] = -torch.inf
    problem.student_head.bias.data[5] = 0
    tokens = torch.full_like(problem.units.student_tokens, 5)
    result = token_statistics(problem.student_hidden, problem.student_head, tokens)
    assert not result.logprob.any() and not result.entropy.any()


def test_token_statistics_of_nothing_and_of_misfits():
    problem = make_problem()
    head, tokens = problem.student_head, problem.units.student_tokens
    empty = token_statistics(problem.student_hidden[:0], head, tokens[:0])
    assert all(part.shape == (0,) for part in empty)
    with pytest.raises(ValueError, match="tokens must be int64"):
        token_statistics(problem.student_hidden, head, tokens[1:])


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("score", ["mean_logprob", "sum_logprob", "mean_logit"])
@pytest.mark.parametrize("candidates", ["paper", "disjoint"])
def test_candidate_mass(side, score, candidates):
    problem = make_problem()
    units, shared = problem.units, problem.shared
    hidden, head = getattr(problem, f"{side}_hidden").detach(), getattr(problem, f"{side}_head")
    start, length, tokens = (getattr(units, f"{side}_{part}").tolist() for part in ("start", "length", "tokens"))
    ids = getattr(shared, f"{side}_ids")
    logits = head.logits(hidden).detach()
    log_p = logits.log_softmax(1)
    expected = []
    for g, has in enumerate(units.has_continuation(shared).tolist()):
        kept = torch.ones(len(shared), dtype=torch.bool)
        if has and candidates == "disjoint":
            kept[units.left_out[units.left_out[:, 0] == g, 1]] = False
        mass = log_p[start[g], ids[kept]].exp().sum()
        if has:
            rows = range(start[g], start[g] + length[g])
            terms = torch.stack([(logits if score == "mean_logit" else log_p)[row, tokens[row]] for row in rows])
            total = terms.sum() if score == "sum_logprob" else terms.mean()
            mass += (total - (logits[start[g]].logsumexp(0) if score == "mean_logit" else 0)).exp()
        expected.append(mass)
    expected = torch.stack(expected)
    for chunk_rows in ("auto", 3):
        mass = candidate_mass(
            hidden, head, units, shared, side=side, score=score, candidates=candidates, chunk_rows=chunk_rows
        )
        assert mass.dtype == torch.float32 and relative_error(mass, expected) < 1e-6


def test_candidate_mass_is_what_the_floor_measures():
    problem = make_problem()
    mass = candidate_mass(problem.teacher_hidden, problem.teacher_head, problem.units, problem.shared)
    floor = float(mass.median()) + 1e-6
    losses = linear_simct_loss(*problem.arguments(), teacher_mass_floor=floor, reduction="none")
    assert (losses == 0).equal(mass < floor) and (losses != 0).any()
