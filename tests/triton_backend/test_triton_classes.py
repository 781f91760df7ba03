"""Candidates that are sums of ids in Triton, judged by the oracle in float64."""

import dataclasses

import pytest
import torch
from kernels.cases import FEW, make_problem, make_units, relative_error, slow, with_classes
from kernels.test_classes import both_chosen, paired, rows
from kernels.test_topk import serve
from test_triton_losses import CAPPED, assert_linear_agrees, assert_logits_agree, name, run_linear, run_logits
from test_triton_sparse import assert_served_agrees, on_triton  # noqa: F401
from triton_cases import linear_simct_loss

from simct_kernels import SharedVocabulary

pytestmark = pytest.mark.usefixtures("small_tiles")

ONE, TWO = ((2, 3),), ((3, 1), (1, 2))
CASES = [
    (TWO, {"beta": 0.5, "temperature": 2.0, "teacher_mass_floor": 0.5}),
    (ONE, {"score": "sum_logprob", "candidates": "disjoint"}),
    *slow((ONE, {"beta": 0.0}), (TWO, {}), (ONE, {"score": "mean_logit", "beta": 0.3}), (((1, 4),), {"beta": 0.0})),
]


def problem(sizes, **head):
    return with_classes(make_problem(FEW, dtype=torch.float32, **head), *sizes)


@pytest.mark.parametrize("sizes,options", CASES, ids=name)
def test_linear_agrees_with_oracle(sizes, options):
    """The head's soft-cap and bias too: what is summed are finished logits, which a soft-cap bounds and their sum is above."""
    assert_linear_agrees(problem(sizes, **CAPPED), 1e-5, ("sum",), **options)


@pytest.mark.parametrize("sizes,options", CASES, ids=name)
def test_logits_agree_with_oracle(sizes, options):
    assert_logits_agree(problem(sizes), 1e-5, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    assert_logits_agree(problem(ONE).to(dtype), 1e-2)
    assert_linear_agrees(problem(ONE, bias=False).to(dtype), 1e-2, ("sum",))


@pytest.mark.parametrize(
    "options", [{"top_k": 2, "beta": 0.3}, *slow({"top_k": 7, "candidates": "disjoint"}, {"top_k": 38})], ids=name
)
def test_top_k(options):
    assert_linear_agrees(problem(ONE, **CAPPED), 1e-5, ("sum",), **options)
    assert_logits_agree(problem(TWO), 1e-5, **options)


def test_a_class_and_the_last_shared_token_are_both_chosen():
    assert_logits_agree(both_chosen(), 1e-5, top_k=2)


@pytest.mark.parametrize("k,options", [(9, {}), *slow((61, {"top_k": 2, "beta": 0.0}))], ids=name)
def test_served(k, options):
    assert_served_agrees(serve(problem(TWO, **CAPPED), k), 1e-5, ("sum",), **options)


@pytest.mark.parametrize("run", [run_logits, *slow(run_linear)])
def test_a_class_of_one_pair_is_that_pair(run):
    pair, single = paired(make_problem(FEW, shared_size=38, dtype=torch.float32))
    expected, expected_gradients = run(pair)
    loss, gradients = run(single)
    assert relative_error(loss, expected) < 1e-6
    if run is run_logits:
        gradients, expected_gradients = {"logits": gradients}, {"logits": expected_gradients}
    assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-5 for key in expected_gradients)


def test_with_the_shared_tokens_in_front():
    """Column k is shared token k on both sides: what is left of a row then begins with a class's ids."""
    given, first = make_problem(FEW, student_vocabulary=61, dtype=torch.float32), torch.arange(37)
    shared = SharedVocabulary(first, first.clone())
    given = dataclasses.replace(given, units=make_units(FEW, shared, 61, 61), shared=shared)
    classes = {"student_classes": rows((37, 38)), "teacher_classes": rows((37,))}
    given = dataclasses.replace(given, shared=dataclasses.replace(shared, **classes))
    assert_linear_agrees(given, 1e-5, ("sum",), beta=0.5)


@pytest.mark.slow
def test_a_dropped_unit_keeps_its_nan():
    given = problem(ONE)
    hidden = given.student_hidden.detach().clone()
    hidden[given.units.student_start[0]] = torch.nan
    given = dataclasses.replace(given, student_hidden=hidden.requires_grad_())
    losses = linear_simct_loss(*given.arguments(), reduction="none")
    (losses * (torch.arange(len(losses)) > 0)).sum().backward()
    assert losses[0].isnan() and all(gradient.isfinite().all() for gradient in given.gradients().values())
