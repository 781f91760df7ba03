"""The loss of a served teacher: against the oracle, against the loss that sees the whole teacher, and by hand."""

import dataclasses
import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from simct_kernels import (
    AlignedUnits,
    LMHead,
    SharedVocabulary,
    linear_simct_loss,
    topk_candidate_counts,
    topk_simct_loss,
)

from .cases import MIXED, Problem, in_pairs, make_problem, relative_error
from .test_torch_backend import DTYPES, HEADS, OPTIONS, name

GRID = [options for options in OPTIONS if options.get("score") != "mean_logit"]
BACKENDS = ["torch", "reference"]


@dataclass(frozen=True)
class Served:
    """A problem whose teacher is served."""

    problem: Problem
    ids: Tensor  # [N_t, k]
    logprobs: Tensor  # [N_t, k]
    token_logprobs: Tensor  # [N_t]

    def loss(self, **options):
        hidden, head, _, _, units, shared = self.problem.arguments()
        return topk_simct_loss(hidden, head, self.ids, self.logprobs, self.token_logprobs, units, shared, **options)

    def to(self, dtype: torch.dtype) -> "Served":
        return dataclasses.replace(self, problem=self.problem.to(dtype, torch.float64))

    def run(self, **options) -> tuple[Tensor, dict[str, Tensor]]:
        problem = self.problem.to(self.problem.student_hidden.dtype, torch.float64)
        loss = dataclasses.replace(self, problem=problem).loss(**options)
        loss.sum().backward()
        return loss.detach(), problem.gradients()

    def counts(self, **options) -> Tensor:
        return topk_candidate_counts(self.ids, self.logprobs, self.problem.units, self.problem.shared, **options)


def serve(problem: Problem, k: int, seed: int = 0) -> Served:
    """The teacher's k best, in any order, a third of the rows with padding."""
    logprobs = problem.teacher_head.logits(problem.teacher_hidden).detach().double().log_softmax(1)
    token_logprobs = logprobs.gather(1, problem.units.teacher_tokens[:, None]).squeeze(1)
    best, ids = logprobs.topk(k)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    best, ids = best.gather(1, order), ids.gather(1, order)
    if k < logprobs.shape[1]:
        ids[::3, -1], best[::3, -1] = -1, -math.inf
    return Served(problem, ids, best, token_logprobs)


@pytest.mark.parametrize("options,precision,head", in_pairs(GRID, DTYPES, HEADS), ids=name)
def test_agrees_with_oracle(options, precision, head):
    """k = 2 picks head rows one by one, k = 9 multiplies by all K of them."""
    dtype, tolerance = precision
    for k in (2, 9):
        served = serve(make_problem(dtype=torch.float32, **head), k).to(dtype)
        expected, expected_gradients = served.to(torch.float64).run(backend="reference", reduction="none", **options)
        for reduction in ("none", "sum", "mean"):
            loss, gradients = served.run(reduction=reduction, **options)
            share = 1 / len(expected) if reduction == "mean" else 1
            assert relative_error(loss, expected if reduction == "none" else expected.sum() * share) < tolerance
            assert gradients.keys() == expected_gradients.keys()
            for key, gradient in gradients.items():
                assert relative_error(gradient, expected_gradients[key] * share) < tolerance, (reduction, key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", GRID, ids=name)
def test_a_whole_vocabulary_served_is_the_linear_loss(options, backend):
    problem = make_problem(softcap=3.0)
    served = serve(problem, problem.teacher_head.weight.shape[0])
    for reduction in ("none", "sum"):
        loss, gradients = served.run(backend=backend, reduction=reduction, **options)
        same = problem.to(torch.float64)
        expected = linear_simct_loss(*same.arguments(), reduction=reduction, **options)
        expected.sum().backward()
        assert relative_error(loss, expected.detach()) < 1e-12
        for key, gradient in same.gradients().items():
            assert relative_error(gradients[key], gradient) < 1e-12


@pytest.mark.parametrize("lengths", [[], [(1, 1)], [(2, 3)], [(1, 4)], [(64, 47)], [(2, 1), (1, 2), (3, 3)]], ids=str)
@pytest.mark.parametrize("k", [1, 2, 61])
def test_sizes(lengths, k):
    served = serve(make_problem(lengths), k)
    expected, expected_gradients = served.run(backend="reference", reduction="none")
    for chunk_rows in (1, 2, "auto"):
        for reduction in ("none", "sum"):
            loss, gradients = served.run(reduction=reduction, chunk_rows=chunk_rows)
            assert relative_error(loss, expected if reduction == "none" else expected.sum()) < 1e-12
            assert gradients.keys() == expected_gradients.keys() and len(gradients) == 3
            assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-12 for key in gradients)


@pytest.mark.parametrize("options", [{}, {"beta": 0.4, "candidates": "disjoint", "temperature": 0.7}], ids=name)
def test_gradcheck(options):
    sizes = {"shared_size": 7, "student_vocabulary": 11, "teacher_vocabulary": 9}
    served = serve(make_problem(((1, 1), (2, 1), (1, 3), (1, 1), (1, 1), (2, 2)), softcap=2.0, scale=0.7, **sizes), 4)
    problem = served.problem
    head = problem.student_head

    def loss(hidden, weight, bias):
        bound = dataclasses.replace(
            problem, student_hidden=hidden, student_head=dataclasses.replace(head, weight=weight, bias=bias)
        )
        return dataclasses.replace(served, problem=bound).loss(reduction="none", backend="reference", **options)

    assert gradcheck(loss, (problem.student_hidden, head.weight, head.bias), fast_mode=True)


def by_hand(own: int) -> Served:
    """One single shared unit whose own token is `own`; shared pairs 0-0, 1-1, 2-2; the student's logits are 0."""
    zero, one = torch.tensor([0]), torch.tensor([1])
    problem = Problem(
        torch.zeros(1, 2, dtype=torch.float64, requires_grad=True),
        LMHead(torch.ones(4, 2, dtype=torch.float64, requires_grad=True)),
        None,
        None,
        AlignedUnits(zero, one, zero, one, torch.tensor([own]), torch.tensor([own])),
        SharedVocabulary(torch.arange(3), torch.arange(3)),
    )
    best = torch.tensor([[0.5, 0.25, 0.1]], dtype=torch.float64).log()
    return Served(problem, torch.tensor([[0, 1, 3]]), best, torch.tensor([0.05], dtype=torch.float64).log())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [1, 2])
def test_worked_by_hand(own, backend):
    """Candidates are 0 and 1 whether or not the unit's own token is one of them; 3 is not shared."""
    served = by_hand(own)
    q, p = torch.tensor([1 / 2, 1 / 2]), torch.tensor([2 / 3, 1 / 3])
    assert served.loss(backend=backend).item() == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-6)
    assert served.loss(backend=backend, beta=0).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
    assert served.counts().tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_repeated_ids_change_nothing(backend):
    served = serve(make_problem(), 5)
    expected, expected_gradients = served.run(backend=backend, reduction="none")
    rows = len(served.ids)
    token = served.problem.units.teacher_tokens[:, None]
    among = (served.ids == token).any(1, keepdim=True)  # a server may append the own token to its best
    ids = torch.cat([served.ids, torch.where(among, token, -1), torch.full((rows, 2), -1)], 1)
    nothing = torch.full((rows, 2), -math.inf, dtype=torch.float64)
    logprobs = torch.cat([served.logprobs, served.token_logprobs[:, None], nothing], 1)
    ids[:, -1], logprobs[:, -2] = 0, 0.0  # an id without a probability, a probability without an id
    wide = dataclasses.replace(served, ids=ids, logprobs=logprobs)
    loss, gradients = wide.run(backend=backend, reduction="none")
    assert relative_error(loss, expected) < 1e-14
    assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-13 for key in gradients)
    assert wide.counts().equal(served.counts())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]], ids=str)
def test_the_largest_of_a_repeated_ids_logprobs_counts(order, backend):
    served = by_hand(1)
    ids, logprobs = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0.5, 0.1, 0.25, 0.0]], dtype=torch.float64).log()
    repeated = dataclasses.replace(served, ids=ids[:, order], logprobs=logprobs[:, order])
    assert relative_error(repeated.loss(backend=backend), served.loss(backend=backend)) < 1e-14
    assert repeated.counts().tolist() == [2]
    logprobs[0, 1] = math.nan  # NaN is larger than any number: no finite loss hides it
    assert dataclasses.replace(repeated, logprobs=logprobs[:, order]).loss(backend=backend).isnan()
    ids[0, 1] = 3  # not shared: nothing reads it
    assert (
        dataclasses.replace(served, ids=ids, logprobs=logprobs)
        .loss(backend=backend)
        .equal(served.loss(backend=backend))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.5, "top_k": 1, "teacher_mass_floor": 0.2}], ids=name)
def test_units_without_candidates(options, backend):
    """None of the k is shared: single units then teach nothing, longer ones have their continuation alone."""
    served = serve(make_problem(), 5)
    units, shared = served.problem.units, served.problem.shared
    unshared = torch.ones(61, dtype=torch.bool)
    unshared[shared.teacher_ids] = False
    ids = served.ids.clone()
    ids[units.teacher_start[::2]] = unshared.nonzero().squeeze(1)[:5]
    served = dataclasses.replace(served, ids=ids)
    counts, has_continuation = served.counts(), units.has_continuation(shared)
    assert counts[::2].equal(has_continuation[::2].long()) and (counts == 0).any() and (counts == 1).any()
    loss, gradients = served.run(backend=backend, reduction="none", **options)
    assert not loss[counts < 2].any() and all(gradient.isfinite().all() for gradient in gradients.values())
    if not options:
        assert loss[counts > 1].all()
        assert not gradients["hidden"][units.student_start[counts == 0]].any()
    total, summed = served.run(backend=backend, **options)
    assert relative_error(total, loss.sum()) < 1e-12
    assert all(relative_error(summed[key], gradients[key]) < 1e-12 for key in gradients)


def test_counts_of_disjoint_candidates():
    served = serve(make_problem(), 61)
    units, shared = served.problem.units, served.problem.shared
    continued = units.has_continuation(shared)
    expected = len(shared) + continued.long()
    assert served.counts().equal(expected)
    expected[::2] -= continued[::2] * len(range(0, len(shared), 2))
    assert served.counts(candidates="disjoint").equal(expected)


def test_same_bits_on_every_run():
    served = serve(make_problem(MIXED * 5), 2).to(torch.float32)
    first, first_gradients = served.run()
    again, again_gradients = served.run()
    assert first.equal(again) and all(first_gradients[key].equal(again_gradients[key]) for key in again_gradients)


def test_weighted_and_repeated_backward():
    served = serve(make_problem(), 4)
    weights = torch.linspace(0, 2, len(served.problem.units), dtype=torch.float64)
    (served.loss(reduction="none", backend="reference") * weights).sum().backward()
    expected = {key: gradient.clone() for key, gradient in served.problem.gradients().items()}
    again = served.to(torch.float64)
    loss = (again.loss(reduction="none") * weights).sum()
    for repeat in (1, 2):
        loss.backward(retain_graph=True)
        for key, gradient in again.problem.gradients().items():
            assert relative_error(gradient, repeat * expected[key]) < 1e-12
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(again.loss(), again.problem.student_hidden, create_graph=True)


def test_autocast_does_not_round():
    served = serve(make_problem(), 4).to(torch.float32)
    expected = served.loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert served.loss().equal(expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_nan_stays_in_its_unit(beta):
    served = serve(make_problem(), 61)
    units, shared = served.problem.units, served.problem.shared
    continued = units.has_continuation(shared)
    single, longer = (~continued).nonzero()[0].item(), (units.student_length * units.teacher_length).argmax().item()
    served.logprobs[units.teacher_start[single]] = math.nan
    served.token_logprobs[units.teacher_start[longer] + 1] = math.nan
    bad = torch.zeros(len(units), dtype=torch.bool)
    bad[[single, longer]] = True
    for backend in BACKENDS:
        loss = served.loss(reduction="none", beta=beta, backend=backend)
        assert loss[bad].isnan().all() and loss[~bad].isfinite().all()


@pytest.mark.parametrize("k", [2, 9])
def test_dropping_a_nan_unit_keeps_its_gradient_out(k):
    served = serve(make_problem(((1, 1), (2, 2), (1, 1)), dtype=torch.float32, softcap=5.0), k)
    units, bad = served.problem.units, 1
    keep = torch.arange(len(units)) != bad
    without = dataclasses.replace(
        served.to(torch.float32),
        problem=dataclasses.replace(served.problem.to(torch.float32), units=units.select(keep)),
    )
    _, expected = without.run()
    with torch.no_grad():
        served.problem.student_hidden[int(units.student_start[bad])] = math.nan
    loss = served.loss(reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [bad]
    loss[keep].sum().backward()
    for key, gradient in served.problem.gradients().items():
        assert relative_error(gradient, expected[key]) < 1e-6, key


def test_a_continuation_that_the_teacher_excludes():
    served = serve(make_problem([(2, 2)]), 5)
    served.token_logprobs[served.problem.units.teacher_start[0]] = -math.inf
    for backend in BACKENDS:
        assert served.loss(backend=backend) == math.inf
        assert served.loss(backend=backend, beta=0.0).isfinite()


def test_single_units_cost_k_columns():
    """Two products forward and one for the hidden state; the head's gradient is a sum of rows. No teacher's product."""
    problem = make_problem([(1, 1)] * 20)
    problem = dataclasses.replace(problem, units=problem.units.select(~problem.units.has_continuation(problem.shared)))
    served = serve(problem, 2)
    with FlopCounterMode(display=False) as count:
        served.loss().backward()
    assert count.get_total_flops() == 2 * 2 * len(problem.units) * 2 * 13


def test_the_heads_gradient_is_zero_outside_the_candidates():
    problem = make_problem([(1, 1)] * 20)
    problem = dataclasses.replace(problem, units=problem.units.select(~problem.units.has_continuation(problem.shared)))
    served = serve(problem, 2)
    _, gradients = served.run()
    touched = torch.zeros(83, dtype=torch.bool)
    for g, pair in enumerate(problem.shared.teacher_ids.tolist()):
        if (served.ids[problem.units.teacher_start] == pair).any():
            touched[problem.shared.student_ids[g]] = True
    assert touched.any() and not gradients["weight"][~touched].any()


def refuses(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_refusals():
    served = serve(make_problem(), 3)
    rows = len(served.ids)

    def refused(message: str, served: Served = served, **options) -> None:
        with refuses(message):
            served.loss(**options)

    def changed(**fields) -> Served:
        return dataclasses.replace(served, **fields)

    refused('got "mean_logit": a served teacher gives log-probabilities', score="mean_logit")
    refused("backend 'numpy' is not in this installation, which has 'auto', ", backend="numpy")
    refused("teacher_topk_ids must be int64 [N_t, k] with k >= 1, got torch.int32", changed(ids=served.ids.int()))
    refused("teacher_topk_ids must be int64 [N_t, k] with k >= 1, got list", changed(ids=[1]))
    refused(
        "teacher_topk_ids must be int64 [N_t, k] with k >= 1",
        changed(ids=served.ids[:, :0], logprobs=served.logprobs[:, :0]),
    )
    refused(f"teacher_topk_ids has {rows - 1} rows", changed(ids=served.ids[1:], logprobs=served.logprobs[1:]))
    refused(f"teacher_topk_logprobs must be [{rows}, 3]", changed(logprobs=served.logprobs[:, 1:]))
    refused("teacher_topk_logprobs must be a floating point tensor", changed(logprobs=served.ids))
    refused(f"teacher_token_logprobs must be [N_t] = [{rows}]", changed(token_logprobs=served.logprobs))
    refused("teacher_token_logprobs must be a floating point", changed(token_logprobs=served.ids[:, 0]))
    refused(f"teacher_token_logprobs has {rows - 1} rows", changed(token_logprobs=served.token_logprobs[1:]))
    refused("top_k must be a positive int or None, got 0", top_k=0)
    refused("reduction must be one of", reduction="avg")
    refused("chunk_rows must be", chunk_rows=0)
    with refuses(f"teacher_topk_ids has {rows - 1} rows"):
        topk_candidate_counts(served.ids[1:], served.logprobs[1:], served.problem.units, served.problem.shared)
