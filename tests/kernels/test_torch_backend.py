"""The PyTorch backend, judged by the oracle in float64."""

import gc

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss, simct_loss
from simct_kernels.torch_backend import plan
from simct_kernels.torch_backend import rows as backend_rows

from .cases import MIXED, Problem, in_pairs, make_problem, relative_error

# Each row changes one thing from the paper's form, and the last ones what could only go wrong together: a choice of
# candidates with left-out ones, on capped logits, at another temperature; the public code's form.
OPTIONS = [
    {},
    {"beta": 0.0},
    {"beta": 0.5},
    {"beta": 0.9},
    {"temperature": 2.5},
    {"score": "sum_logprob"},
    {"score": "mean_logit"},
    {"candidates": "disjoint"},
    {"top_k": 2},  # 2 * 16 <= K: picked head rows
    {"top_k": 7},  # above: a product over all K
    {"top_k": 1000},
    {"teacher_mass_floor": 0.4},
    {"top_k": 2, "candidates": "disjoint", "beta": 0.3, "temperature": 0.7},
    {"top_k": 30, "candidates": "disjoint", "score": "sum_logprob"},  # fewer candidates than k remain
    {"top_k": 2, "teacher_mass_floor": 0.1, "beta": 0.0},
    {"score": "mean_logit", "teacher_mass_floor": 0.5, "candidates": "disjoint", "top_k": 2},
    {"score": "sum_logprob", "teacher_mass_floor": 0.4, "temperature": 1.7, "beta": 0.5},
]
HEADS = [{}, {"softcap": 3.0, "scale": 0.5}, {"bias": False}]
# Tolerances of the loss and of every gradient, on the same (rounded) inputs.
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]


def name(value) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def run_linear(problem: Problem, **options) -> tuple[Tensor, dict[str, Tensor]]:
    problem = problem.to(problem.student_hidden.dtype, problem.teacher_hidden.dtype)
    loss = linear_simct_loss(*problem.arguments(), **options)
    loss.sum().backward()
    return loss.detach(), problem.gradients()


def assert_agrees(problem: Problem, tolerance: float, **options) -> None:
    """In loss and gradients, from hidden states and from logits, per unit and summed, with the oracle in float64."""
    exact = problem.to(torch.float64)
    expected, expected_gradients = run_linear(exact, backend="reference", reduction="none", **options)
    for reduction in ("none", "sum", "mean"):
        loss, gradients = run_linear(problem, reduction=reduction, **options)
        share = 1 / len(problem.units) if reduction == "mean" else 1
        reduced = expected if reduction == "none" else expected.sum() * share
        assert relative_error(loss, reduced) < tolerance, reduction
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[key] * share) < tolerance, (reduction, key)


@pytest.mark.parametrize("options,precision,head", in_pairs(OPTIONS, DTYPES, HEADS), ids=name)
def test_linear_agrees_with_oracle(options, precision, head):
    dtype, tolerance = precision
    assert_agrees(make_problem(dtype=torch.float32, **head).to(dtype), tolerance, **options)


@pytest.mark.parametrize("dtype,tolerance", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_logits_agree_with_oracle(options, dtype, tolerance):
    student, *rest = make_problem().to(dtype).logits()
    teacher, units, shared = rest
    exact = student.detach().double().requires_grad_()
    expected = simct_loss(exact, teacher.double(), units, shared, backend="reference", reduction="none", **options)
    expected.sum().backward()
    for reduction in ("none", "sum"):
        student.grad = None
        loss = simct_loss(student, *rest, reduction=reduction, **options)
        loss.sum().backward()
        assert relative_error(loss.detach(), expected.detach() if reduction == "none" else expected.sum()) < tolerance
        assert student.grad.dtype == dtype
        assert relative_error(student.grad, exact.grad) < tolerance


@pytest.mark.parametrize(
    "lengths,sizes",
    [
        (MIXED, {"shared_size": 1}),
        (MIXED, {"shared_size": 61}),  # K = V_t
        ([(1, 1)], {}),
        ([(2, 3)], {}),
        ([(64, 47)], {}),
        ([(2, 1), (1, 2), (3, 3)], {}),  # only longer units
        ([(1, 1)] * 2, {}),  # only units without a continuation
        ([(1, 1)] * 3 + [(64, 1)] + [(1, 1)] * 3, {}),
    ],
)
@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"score": "mean_logit"}, {"teacher_mass_floor": 0.4}], ids=name)
def test_sizes(lengths, sizes, options):
    assert_agrees(make_problem(lengths, dtype=torch.float32, **sizes), 1e-5, **options)


@pytest.mark.parametrize("student,teacher", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_sides_of_different_dtype(student, teacher):
    assert_agrees(make_problem().to(student, teacher), 1e-2)


@pytest.mark.parametrize("options", [{}, {"candidates": "disjoint", "top_k": 2}, {"teacher_mass_floor": 0.4}], ids=name)
@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 1000])
def test_chunks_change_nothing(chunk_rows, options):
    problem = make_problem(MIXED * 3)
    expected, expected_gradients = run_linear(problem, reduction="none", **options)
    for reduction in ("none", "sum"):
        loss, gradients = run_linear(problem, reduction=reduction, chunk_rows=chunk_rows, **options)
        assert relative_error(loss, expected if reduction == "none" else expected.sum()) < 1e-13
        assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-13 for key in expected_gradients)


def test_same_bits_on_every_run():
    problem = make_problem(MIXED * 5, dtype=torch.float32)
    for options in ({}, {"score": "mean_logit"}, {"top_k": 2}):
        first, first_gradients = run_linear(problem, **options)
        again, again_gradients = run_linear(problem, **options)
        assert first.equal(again) and all(first_gradients[k].equal(again_gradients[k]) for k in first_gradients)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_unit_gives_a_differentiable_zero(reduction, backend):
    problem = make_problem([])
    assert len(problem.units) == 0
    loss = linear_simct_loss(*problem.arguments(), reduction=reduction, backend=backend)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
    loss.sum().backward()
    assert all(not gradient.any() for gradient in problem.gradients().values()) and len(problem.gradients()) == 3
    student, *rest = problem.logits()
    simct_loss(student, *rest, backend=backend).backward()
    assert not student.grad.any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_unit_losses_come_beside_the_loss(reduction):
    problem = make_problem(dtype=torch.float32)
    expected = linear_simct_loss(*problem.arguments(), reduction="none").detach()
    for call, arguments in ((linear_simct_loss, problem.arguments()), (simct_loss, problem.logits())):
        loss, unit_losses = call(*arguments, reduction=reduction, return_unit_losses=True)
        assert loss.requires_grad and not unit_losses.requires_grad
        assert unit_losses.dtype == torch.float32
        assert relative_error(unit_losses, expected) < 1e-5


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weighted_and_repeated_backward(reduction):
    """Per-unit weights, a scaled loss, and a second backward, which must make the gradients again."""
    problem, exact = make_problem(dtype=torch.float32), make_problem()
    weights = torch.linspace(0, 2, len(problem.units)) if reduction == "none" else torch.tensor(3.0)
    (linear_simct_loss(*exact.arguments(), reduction=reduction, backend="reference") * weights).sum().backward()
    loss = (linear_simct_loss(*problem.arguments(), reduction=reduction) * weights).sum()
    for repeat in (1, 2):
        loss.backward(retain_graph=True)
        for key, gradient in problem.gradients().items():
            assert relative_error(gradient, repeat * exact.gradients()[key]) < 1e-5


def test_double_backward_is_refused():
    problem = make_problem()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(linear_simct_loss(*problem.arguments()), problem.student_hidden, create_graph=True)


def test_autocast_does_not_round_the_logits():
    problem = make_problem(dtype=torch.float32)
    expected = linear_simct_loss(*problem.arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_simct_loss(*problem.arguments())
        loss.backward()
    assert loss.equal(expected)


def test_tied_weights():
    """Hidden states made from the head's own weight: both ways to it must add up."""
    gradients = []
    for backend in ("reference", "torch"):
        problem = make_problem()
        weight = problem.student_head.weight
        hidden = torch.tanh(weight[problem.units.student_tokens])
        linear_simct_loss(hidden, *problem.arguments()[1:], backend=backend).backward()
        gradients.append(weight.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-12


def test_strided_inputs():
    problem = make_problem(dtype=torch.float32)
    expected, expected_gradients = run_linear(problem)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor.detach()
        return wide[..., ::2].requires_grad_(tensor.requires_grad)

    def strided_head(head: LMHead) -> LMHead:
        return LMHead(strided(head.weight), strided(head.bias), head.softcap, head.scale)

    hidden, head, teacher_hidden, teacher_head, units, shared = problem.arguments()
    hidden, head = strided(hidden), strided_head(head)
    loss = linear_simct_loss(hidden, head, strided(teacher_hidden), strided_head(teacher_head), units, shared)
    loss.backward()
    assert relative_error(loss.detach(), expected) < 1e-6
    for key, tensor in zip(("hidden", "weight", "bias"), (hidden, head.weight, head.bias), strict=True):
        assert relative_error(tensor.grad, expected_gradients[key]) < 1e-6
    student, teacher, *rest = problem.logits()
    transposed = student.detach().T.contiguous().T.requires_grad_()
    simct_loss(student, teacher, *rest).backward()
    simct_loss(transposed, strided(teacher), *rest).backward()
    assert transposed.grad.equal(student.grad)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_one_vocabulary_is_ordinary_distillation(beta):
    """K = V and single units only: the divergence of full softmaxes, written independently in probabilities."""
    size = 71
    shared = SharedVocabulary(torch.arange(size), torch.arange(size))
    rows = torch.arange(9)
    units = AlignedUnits(rows, torch.ones_like(rows), rows, torch.ones_like(rows), rows, rows)
    student = torch.randn(9, size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, size, dtype=torch.float64)
    q, p = (student / 1.3).softmax(1), (teacher / 1.3).softmax(1)
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return (a * (a / b).log()).sum()

    expected = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    for backend in ("torch", "reference"):
        loss = simct_loss(student, teacher, units, shared, beta=beta, temperature=1.3, backend=backend)
        (gradient,) = torch.autograd.grad(loss, student)
        assert relative_error(loss.detach(), expected.detach()) < 1e-12
        assert relative_error(gradient, expected_gradient) < 1e-12


def test_equal_logits_give_no_loss():
    problem = make_problem(dtype=torch.float32)
    student, teacher, units, shared = problem.logits()
    flat = torch.full_like(student, 3.7).requires_grad_()
    only_single = units.single()
    for beta in (0.0, 0.5, 1.0):
        units_without_continuation = only_single.select(~only_single.has_continuation(shared))
        loss = simct_loss(flat, torch.full_like(teacher, -1.0), units_without_continuation, shared, beta=beta)
        assert abs(loss.item()) < 1e-5
        loss.backward()
        assert flat.grad.abs().max() < 1e-6
        flat.grad = None


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.5}, {"score": "sum_logprob"}], ids=name)
def test_huge_logits(options):
    """Logits of +-1e4, where a softmax without its maximum taken off is inf / inf."""
    student, teacher, units, shared = make_problem(dtype=torch.float32).logits()
    student = (1e4 * student.detach().sign() + student.detach()).requires_grad_()
    teacher = 1e4 * teacher.sign() + teacher
    exact = student.detach().double().requires_grad_()
    expected = simct_loss(exact, teacher.double(), units, shared, backend="reference", **options)
    loss = simct_loss(student, teacher, units, shared, **options)
    expected.backward(), loss.backward()
    assert loss.isfinite() and relative_error(loss.detach(), expected.detach()) < 1e-5
    assert relative_error(student.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e6, 0.0])
def test_products_in_float16_keep_small_gradients(monkeypatch, size):
    """As on a GPU, where 16-bit operands are multiplied into 32 bits. Near its teacher a student's gradients are tiny."""
    monkeypatch.setattr(backend_rows, "product", lambda left, right: left.float() @ right.float())
    problem = make_problem(bias=False).to(torch.float16)
    rows = backend_rows.LinearRows(
        problem.student_hidden,
        problem.student_head,
        problem.shared.student_ids,
        torch.float32,
        needs_grad=(True, True, False),
    )
    rows.operand_dtype = torch.float16
    gradient = size * torch.randn(5, len(problem.shared), generator=torch.Generator().manual_seed(0))
    rows.add_shared(torch.arange(5), gradient.clone())
    hidden, weight, _ = rows.gradients()
    ids = problem.shared.student_ids
    expected = gradient.double() @ problem.student_head.weight[ids].double()
    assert relative_error(hidden[:5], expected.detach()) < 1e-3
    expected = gradient.double().T @ problem.student_hidden[:5].double()
    assert relative_error(weight[ids], expected.detach()) < 1e-3


def test_what_is_kept_of_units_goes_with_them():
    """Also where one tensor is several of their fields, as with one vocabulary."""
    shared = SharedVocabulary(torch.arange(5), torch.arange(5))

    def call() -> None:
        start, one = torch.arange(3), torch.ones(3, dtype=torch.int64)
        units = AlignedUnits(start, one, start, one, start, start)
        simct_loss(torch.zeros(3, 5), torch.zeros(3, 5), units, shared, backend="torch")

    call()
    gc.collect()
    before = len(plan._KEPT)
    call()
    gc.collect()
    assert len(plan._KEPT) == before
