"""`top_k` and the served teacher's loss in Triton, judged by the oracle in float64."""

import dataclasses
import math

import kernels.test_topk
import pytest
import torch
import triton_cases
from kernels.cases import FEW, make_problem, relative_error, slow
from kernels.test_cost import RecordSizes
from kernels.test_topk import (  # noqa: F401
    serve,
    test_autocast_does_not_round,
    test_dropping_a_nan_unit_keeps_its_gradient_out,
)
from test_triton_losses import (
    CAPPED,
    assert_linear_agrees,
    assert_logits_agree,
    name,
    run_linear,
    run_logits,
)
from torch.utils.flop_counter import FlopCounterMode

import simct_kernels
from simct_kernels import LMHead, ops, triton_backend
from simct_kernels.triton_backend.sparse import ServedJob, TopKJob

inf = math.inf
SIZES = {"shared_size": 150, "student_vocabulary": 203, "teacher_vocabulary": 171}
# 2 * 16 <= K = 37: the teacher's columns are picked; 7 takes them out of a product over all K.
CHOICES = [
    {"top_k": 1, "beta": 0.0},
    {"top_k": 2},
    {"top_k": 7, "beta": 0.3, "temperature": 2.5},
    {"top_k": 2, "score": "sum_logprob", "teacher_mass_floor": 0.4},
    {"top_k": 2, "score": "mean_logit", "teacher_mass_floor": 0.3},
    {"top_k": 30, "candidates": "disjoint", "score": "sum_logprob"},  # fewer candidates than k remain
    {"top_k": 2, "candidates": "disjoint", "beta": 0.5, "temperature": 0.7, "teacher_mass_floor": 0.2},
]
SERVED = [
    (2, {}),
    (1, {"beta": 0.0}),
    (9, {"beta": 0.3, "temperature": 2.5}),
    (61, {"score": "sum_logprob", "teacher_mass_floor": 0.4}),
    (9, {"candidates": "disjoint", "beta": 0.9}),
    (61, {"top_k": 2}),
    (9, {"top_k": 1, "candidates": "disjoint", "score": "sum_logprob", "teacher_mass_floor": 0.2}),
]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch, small_tiles):
    monkeypatch.setattr(kernels.test_topk, "topk_simct_loss", triton_cases.topk_simct_loss)


def small_problem(lengths=FEW, **sizes):
    return make_problem(lengths, dtype=torch.float32, **sizes)


def assert_served_agrees(served, tolerance: float, reductions=("none", "sum"), **options) -> None:
    expected, expected_gradients = served.to(torch.float64).run(backend="reference", reduction="none", **options)
    for reduction in reductions:
        loss, gradients = served.run(reduction=reduction, **options)
        assert relative_error(loss, expected if reduction == "none" else expected.sum()) < tolerance, reduction
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[key]) < tolerance, (reduction, key)


@pytest.mark.parametrize("options", CHOICES, ids=name)
def test_top_k_agrees_with_oracle(options):
    assert_linear_agrees(small_problem(**CAPPED), 1e-5, ("sum",), **options)


@pytest.mark.parametrize("options", [*CHOICES[1::3], *slow(*CHOICES[::3], *CHOICES[2::3])], ids=name)
def test_top_k_of_logits_agrees_with_oracle(options):
    assert_logits_agree(small_problem(), 1e-5, **options)


@pytest.mark.parametrize("k,options", [*SERVED[1::2], SERVED[4], *slow(SERVED[0], SERVED[2], SERVED[6])], ids=name)
def test_served_agrees_with_oracle(k, options):
    assert_served_agrees(serve(small_problem(**CAPPED), k), 1e-5, ("sum",), **options)


def test_losses_by_unit():
    assert_linear_agrees(small_problem(), 1e-5, ("none",), top_k=2)
    assert_served_agrees(serve(small_problem(), 4), 1e-5, ("none",))


@pytest.mark.parametrize(
    "dtype,tolerance,head",
    [
        (torch.float32, 1e-5, {"bias": False, "scale": 0.5}),
        (torch.bfloat16, 1e-2, {"bias": False, "softcap": 2.0}),
        *slow((torch.float16, 1e-2, {})),
    ],
    ids=str,
)
def test_heads_and_dtypes(dtype, tolerance, head):
    problem = small_problem(**head).to(dtype)
    assert_linear_agrees(problem, tolerance, ("sum",), top_k=2)
    assert_logits_agree(problem, tolerance, top_k=2)
    assert_served_agrees(serve(problem, 4), tolerance, ("sum",))


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 3)], *slow([(5, 4)])], ids=str)
def test_sizes(lengths):
    """150 shared tokens: 9 are picked."""
    problem = small_problem(lengths, **SIZES)
    assert_logits_agree(problem, 1e-5, top_k=9)
    assert_linear_agrees(problem, 1e-5, ("sum",), top_k=9)
    assert_served_agrees(serve(problem, 11), 1e-5, ("sum",))


@pytest.mark.parametrize("chunk_rows", [1, 3])
def test_chunks_change_nothing(chunk_rows):
    problem = small_problem()
    assert_linear_agrees(problem, 1e-5, ("sum",), top_k=2, chunk_rows=chunk_rows)
    assert_served_agrees(serve(problem, 4), 1e-5, ("sum",), chunk_rows=chunk_rows)


def test_no_unit_gives_a_differentiable_zero():
    problem = small_problem([])
    for loss, gradients in (run_linear(problem, top_k=2), serve(problem, 3).run()):
        assert loss == 0 and len(gradients) == 3 and not any(gradient.any() for gradient in gradients.values())
    loss, gradient = run_logits(problem, top_k=2)
    assert loss == 0 and not gradient.any()


def test_what_needs_no_gradient():
    problem = small_problem(FEW[2:])
    head = problem.student_head
    frozen = dataclasses.replace(problem, student_head=LMHead(head.weight.detach(), head.bias.detach()))
    only_head = dataclasses.replace(problem, student_hidden=problem.student_hidden.detach())
    expected, expected_gradients = run_linear(problem, top_k=2)
    for part, reduction, keys in ((frozen, "sum", {"hidden"}), (only_head, "none", {"weight", "bias"})):
        loss, gradients = run_linear(part, top_k=2, reduction=reduction)
        # A GPU adds the units up in an order of its own.
        same = (
            loss.sum().equal(expected) if triton_cases.DEVICE == "cpu" else relative_error(loss.sum(), expected) < 1e-6
        )
        assert same and gradients.keys() == keys
        assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-6 for key in keys)
    with torch.no_grad():
        assert triton_cases.linear_simct_loss(*problem.arguments(), top_k=2).equal(expected)


def test_same_bits_on_every_run():
    problem = small_problem()
    for run in (lambda: run_linear(problem, top_k=2), serve(problem, 4).run):
        first, again = run(), run()
        assert first[0].equal(again[0]) and all(first[1][key].equal(again[1][key]) for key in first[1])


@pytest.mark.parametrize("beta", [0.5, *slow(0.0, 1.0)])
def test_excluded_tokens_and_nan_stay_in_their_units(beta):
    """The student's best, excluded by the teacher; and a NaN that a longer unit's log-sum-exp reads."""
    student, teacher, units, shared = small_problem().logits()
    student = student.detach()
    single = (~units.has_continuation(shared)).nonzero()[0].item()
    longer = ((units.student_length > 1) & (units.teacher_length > 1)).nonzero()[0].item()
    row = units.student_start[single]
    student[row, shared.student_ids] = -inf
    student[row, shared.student_ids[3:6]] = torch.tensor([9.0, 1.0, 0.5])
    teacher[units.teacher_start[single], shared.teacher_ids[3]] = -inf
    for side, start in ((student, units.student_start), (teacher, units.teacher_start)):
        nan = side.clone()
        nan[start[longer] + 1, 5] = math.nan
        pair = (nan, teacher) if side is student else (student, nan)
        leaf = pair[0].clone().requires_grad_()
        loss = triton_cases.simct_loss(leaf, pair[1], units, shared, top_k=2, beta=beta, reduction="none")
        loss.nan_to_num(posinf=0).sum().backward()
        others = torch.ones(len(units), dtype=torch.bool)
        others[longer] = False
        assert loss[longer].isnan() and not loss[others].isnan().any()
        assert loss[single] == inf if beta == 1 else loss[single].isfinite()
        exact = triton_cases.simct_loss(
            *(x.double() for x in pair), units, shared, backend="reference", top_k=2, beta=beta, reduction="none"
        )
        torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)
        read = torch.zeros(len(student), dtype=torch.bool)
        for first, length in zip(units.student_start[others], units.student_length[others], strict=True):
            read[first : first + length] = True
        assert leaf.grad[read & (torch.arange(len(read)) != row)].isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_nan_that_a_server_gives(beta):
    served = serve(small_problem(), 5)
    units = served.problem.units
    longer = (units.student_length * units.teacher_length).argmax().item()
    served.token_logprobs[units.teacher_start[longer] + 1] = math.nan
    loss = served.loss(reduction="none", beta=beta)
    bad = torch.arange(len(units)) == longer
    assert loss[bad].isnan().all() and loss[~bad].isfinite().all()


def test_a_continuation_that_the_teacher_excludes():
    served = serve(small_problem([(2, 2)]), 5)
    served.token_logprobs[served.problem.units.teacher_start[0]] = -inf
    assert served.loss() == inf and served.loss(beta=0.0).isfinite()


def test_a_dropped_nan_unit_leaves_no_gradient():
    """Neither in its hidden state's nor in the head's gradient."""
    problem = small_problem()
    single = (~problem.units.has_continuation(problem.shared)).nonzero()[0].item()
    row = int(problem.units.student_start[single])
    with torch.no_grad():
        problem.student_hidden[row] = math.nan
    loss = triton_cases.linear_simct_loss(*problem.arguments(), top_k=2, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [single]
    loss[loss.isfinite()].sum().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in problem.gradients().values())


def test_strided_inputs():
    problem = small_problem()
    expected, expected_gradients = run_linear(problem, top_k=2)
    served = serve(problem, 4)
    expected_served, _ = served.run()

    def transposed(tensor):
        return tensor.detach().T.contiguous().T.requires_grad_(tensor.requires_grad)

    head = dataclasses.replace(problem.student_head, weight=transposed(problem.student_head.weight))
    teacher_head = dataclasses.replace(problem.teacher_head, weight=transposed(problem.teacher_head.weight))
    strided = dataclasses.replace(
        problem,
        student_hidden=transposed(problem.student_hidden),
        student_head=head,
        teacher_head=teacher_head,
    )
    loss = triton_cases.linear_simct_loss(*strided.arguments(), top_k=2)
    loss.backward()
    assert relative_error(loss.detach(), expected) < 1e-6
    for key, gradient in strided.gradients().items():
        assert relative_error(gradient, expected_gradients[key]) < 1e-6
    assert relative_error(dataclasses.replace(served, problem=strided).loss().detach(), expected_served) < 1e-6


def singles(**sizes):
    problem = small_problem([(1, 1)] * 12, **sizes)
    return dataclasses.replace(problem, units=problem.units.select(~problem.units.has_continuation(problem.shared)))


def test_nothing_of_rows_by_k_by_width_exists(monkeypatch):
    """Tensors of H columns are heads, their shared rows (150, padded to 192), hidden states, and the few rows of cut runs."""
    from simct_kernels.triton_backend import tiles

    monkeypatch.setattr(tiles, "SEGMENT", 128)
    problem = singles(**SIZES)
    served = serve(problem, 9)
    for run in (lambda: triton_cases.linear_simct_loss(*problem.arguments(), top_k=9), served.loss):
        with RecordSizes() as record:
            run().backward()
        rows, picked = len(problem.units), 9
        widths = {shape for shape in record.shapes if len(shape) > 1 and {13, 11} & set(shape)}
        assert all(len(shape) == 2 for shape in widths)
        lengths = {203, 171, 192, len(problem.student_hidden), rows, 2 * -(-rows * picked // 128), 13, 11}
        assert {max(shape) for shape in widths} <= lengths and rows * picked not in lengths


def test_top_k_16_of_single_units_costs_at_most_what_it_should():
    """The student's product over K is what torch multiplies; the kernels read k rows of each head, and no more."""
    pytest.importorskip("triton.runtime.interpreter")
    if triton_cases.DEVICE != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    from bench.traffic import count_traffic

    k = 16
    problem = singles(shared_size=320, student_vocabulary=403, teacher_vocabulary=371)
    rows, size = len(problem.units), len(problem.shared)
    with count_traffic() as traffic, FlopCounterMode(display=False) as products:
        triton_cases.linear_simct_loss(*problem.arguments(), top_k=k).backward()
    assert products.get_total_flops() == 2 * rows * size * 13
    assert traffic.read("weight") == rows * k * (11 + 13) * 4
    (pick,) = traffic.of("pick_kernel")
    assert pick.read["weight"].bytes == rows * k * 11 * 4
    full = 4 * size
    kernels = 2 * k + k  # the teacher's scores, and the gradients of hidden states and head
    assert (size + kernels) / full < 0.3


@pytest.mark.parametrize("loss", ["simct_loss", "linear_simct_loss", "topk_simct_loss"])
def test_custom_ops(loss):
    """What torch.compile calls in the losses' place."""
    problem = small_problem(FEW[2:])
    if loss == "simct_loss":
        arguments, leaf = problem.logits(), None
    elif loss == "linear_simct_loss":
        arguments, leaf = problem.arguments(), problem.student_head.weight
    else:
        served, (hidden, head, _, _, *rest) = serve(problem, 4), problem.arguments()
        arguments = hidden, head, served.ids, served.logprobs, served.token_logprobs, *rest
        leaf = head.weight
    leaf = arguments[0] if leaf is None else leaf
    arguments = tuple(map(triton_cases.moved, arguments))
    keywords = {} if loss == "simct_loss" else {"chunk_rows": "auto"}
    expected = getattr(simct_kernels, loss)(*arguments, top_k=2, backend="triton")
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    options = triton_backend.LossOptions(top_k=2)
    total, _ = getattr(ops, loss)(*arguments, options, summed=True, backend="triton", **keywords)
    assert total.equal(expected) and torch.autograd.grad(total, leaf)[0].equal(expected_gradient)


def test_jobs():
    problem = small_problem()
    options = triton_backend.LossOptions(top_k=2)
    hidden, head, _, teacher_head, units, shared = problem.arguments()
    job = triton_backend.linear_job(units, shared, options, head, teacher_head, "auto", torch.float32)
    assert type(job) is TopKJob
    served = serve(problem, 3)
    job = triton_backend.topk_job(units, shared, options, head, served.ids, served.logprobs, "auto", torch.float32)
    assert type(job) is ServedJob
