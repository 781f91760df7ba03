"""The Triton backend, judged by the oracle in float64. Tiny tiles, so that tiny problems take several of them."""

import dataclasses
import gc
import weakref

import pytest
import torch
from kernels.cases import FEW, MIXED, Problem, make_problem, relative_error, slow
from torch import Tensor
from triton_cases import DEVICE, linear_simct_loss, moved, simct_loss

import simct_kernels
from simct_kernels import AlignedUnits, SharedVocabulary, triton_backend
from simct_kernels.triton_backend.columns import columns_of

pytestmark = pytest.mark.usefixtures("small_tiles")

# Each row changes one thing from the paper's form, and the last ones what could only go wrong together.
OPTIONS = [
    {},
    {"beta": 0.0},
    {"beta": 0.3},
    {"temperature": 2.5},
    {"score": "sum_logprob"},
    {"score": "mean_logit"},
    {"candidates": "disjoint"},
    {"teacher_mass_floor": 0.4},
    {"top_k": 1000},
    {"score": "sum_logprob", "teacher_mass_floor": 0.4, "temperature": 1.7, "beta": 0.5, "candidates": "disjoint"},
    {"score": "mean_logit", "teacher_mass_floor": 0.5, "candidates": "disjoint", "beta": 0.0},
]
CAPPED = {"softcap": 3.0, "scale": 0.5}


def name(value) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def run_linear(problem: Problem, **options) -> tuple[Tensor, dict[str, Tensor]]:
    problem = problem.to(problem.student_hidden.dtype, problem.teacher_hidden.dtype)
    loss = linear_simct_loss(*problem.arguments(), **options)
    loss.sum().backward()
    return loss.detach(), problem.gradients()


def run_logits(problem: Problem, **options) -> tuple[Tensor, Tensor]:
    student, *rest = problem.logits()
    loss = simct_loss(student, *rest, **options)
    loss.sum().backward()
    return loss.detach(), student.grad


def assert_linear_agrees(problem: Problem, tolerance: float, reductions=("none", "sum"), **options) -> None:
    exact = problem.to(torch.float64)
    expected, expected_gradients = run_linear(exact, backend="reference", reduction="none", **options)
    for reduction in reductions:
        loss, gradients = run_linear(problem, reduction=reduction, **options)
        assert relative_error(loss, expected if reduction == "none" else expected.sum()) < tolerance, reduction
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[key]) < tolerance, (reduction, key)


def assert_logits_agree(problem: Problem, tolerance: float, **options) -> None:
    student, teacher, units, shared = problem.logits()
    exact = student.detach().double().requires_grad_()
    expected = simct_loss(exact, teacher.double(), units, shared, backend="reference", reduction="none", **options)
    weights = torch.linspace(0, 2, len(units))
    (expected * weights).sum().backward()
    loss, unit_losses = simct_loss(
        student, teacher, units, shared, reduction="none", return_unit_losses=True, **options
    )
    (loss * weights).sum().backward()
    assert loss.dtype == torch.float32 and unit_losses.equal(loss)
    assert relative_error(loss.detach(), expected.detach()) < tolerance
    assert student.grad.dtype == student.dtype
    assert relative_error(student.grad, exact.grad) < tolerance


@pytest.mark.parametrize("options", [*OPTIONS[::2], *slow(*OPTIONS[1::2])], ids=name)
def test_logits_agree_with_oracle(options):
    assert_logits_agree(make_problem(FEW, dtype=torch.float32), 1e-5, **options)


@pytest.mark.parametrize(
    "dtype,options",
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, OPTIONS[-2]),
        (torch.float16, OPTIONS[-1]),
        *slow((torch.bfloat16, OPTIONS[-1]), (torch.float16, {}), (torch.float16, OPTIONS[-2])),
    ],
    ids=name,
)
def test_logits_of_16_bits(options, dtype):
    assert_logits_agree(make_problem(FEW).to(dtype), 1e-2, **options)


@pytest.mark.parametrize("options", [OPTIONS[1], *OPTIONS[-3:], *slow(OPTIONS[0], *OPTIONS[2:-3])], ids=name)
def test_linear_agrees_with_oracle(options):
    assert_linear_agrees(make_problem(FEW, dtype=torch.float32, **CAPPED), 1e-5, ("none",), **options)


@pytest.mark.parametrize("head", [{"bias": False, "softcap": 2.0}, *slow({}, {"bias": False})], ids=name)
def test_heads(head):
    assert_linear_agrees(make_problem(dtype=torch.float32, **head), 1e-5, ("sum",))


@pytest.mark.parametrize(
    "head,dtype",
    [
        (CAPPED, torch.bfloat16),
        ({"bias": False}, torch.float16),
        *slow((CAPPED, torch.float16), ({"bias": False}, torch.bfloat16)),
    ],
    ids=name,
)
def test_hidden_states_of_16_bits(head, dtype):
    """Without a bias the gradient's tile has the operands' 16 bits on a GPU."""
    assert_linear_agrees(make_problem(FEW, dtype=torch.float32, **head).to(dtype), 1e-2, ("sum",))


SIZES = [
    (MIXED, {"shared_size": 1}),
    (MIXED, {"shared_size": 61}),  # K = V_t
    ([(1, 1)], {}),
    ([(2, 3)], {}),
    ([(13, 10)], {}),
    ([(2, 1), (1, 2), (3, 3)], {}),  # only longer units
    ([(1, 1)] * 2, {}),  # only units without a continuation
    ([(1, 1), (18, 1), (1, 1)], {}),
]
QUICK = (0, 3, 5, 6, 7)  # one shared token, one unit, longer units only, no continuation, a unit longer than a segment
LONG = [([(40, 33)], {}), ([(1, 1), (64, 1), (1, 1)], {})]
SIZED = {}, {"beta": 0.5, "teacher_mass_floor": 0.4}


@pytest.mark.parametrize(
    "lengths,sizes,options",
    [
        *((*case, SIZED[number % 2]) for number, case in enumerate(SIZES) if number in QUICK),
        *slow(*((*case, SIZED[number % 2]) for number, case in enumerate(SIZES) if number not in QUICK)),
        *slow(*((*case, SIZED[(number + 1) % 2]) for number, case in enumerate(SIZES))),
        *slow(*((*case, options) for case in LONG for options in SIZED)),
    ],
    ids=name,
)
def test_sizes(lengths, sizes, options):
    problem = make_problem(lengths, dtype=torch.float32, **sizes)
    assert_logits_agree(problem, 1e-5, **options)
    assert_linear_agrees(problem, 1e-5, ("sum",), **options)


@pytest.mark.parametrize("student,teacher", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_sides_of_different_dtype(student, teacher):
    problem = make_problem(FEW).to(student, teacher)
    assert_logits_agree(problem, 1e-2)
    assert_linear_agrees(problem, 1e-2, ("sum",))


@pytest.mark.parametrize("options", [{"candidates": "disjoint"}, *slow({}, {"teacher_mass_floor": 0.4})], ids=name)
@pytest.mark.parametrize("chunk_rows", [3])
def test_chunks_change_nothing(chunk_rows, options):
    problem = make_problem(FEW, dtype=torch.float32)
    expected, expected_gradients = run_linear(problem, **options)
    loss, gradients = run_linear(problem, chunk_rows=chunk_rows, **options)
    assert relative_error(loss, expected) < 1e-6
    assert all(relative_error(gradients[key], expected_gradients[key]) < 1e-6 for key in expected_gradients)


@pytest.mark.parametrize("options", [{"beta": 0.5, "candidates": "disjoint"}, *slow({})], ids=name)
def test_same_bits_on_every_run(options):
    problem = make_problem(FEW, dtype=torch.float32)
    first, again = run_logits(problem, **options), run_logits(problem, **options)
    assert first[0].equal(again[0]) and first[1].equal(again[1])
    first, again = run_linear(problem, **options), run_linear(problem, **options)
    assert first[0].equal(again[0]) and all(first[1][key].equal(again[1][key]) for key in first[1])


@pytest.mark.parametrize("programs", [0, 1, 1000])
def test_rows_split_between_programs_or_not(monkeypatch, programs):
    monkeypatch.setattr(triton_backend.tiles, "_multiprocessors", lambda device: programs)
    assert_logits_agree(make_problem(FEW, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_unit_gives_a_differentiable_zero(reduction):
    problem = make_problem([], dtype=torch.float32)
    loss, gradients = run_linear(problem, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
    assert len(gradients) == 3 and not any(gradient.any() for gradient in gradients.values())
    loss, gradient = run_logits(problem, reduction=reduction)
    assert loss.sum() == 0 and not gradient.any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_defaults_and_modes_do_not_reach_a_plan(backend):
    """It is made on the CPU, of integers; one made in inference mode serves a training step."""
    options = {"candidates": "disjoint", "backend": backend}
    expected = run_linear(make_problem(FEW, dtype=torch.float32), **options)
    defaults, inference = make_problem(FEW, dtype=torch.float32), make_problem(FEW, dtype=torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = [run_linear(defaults, **options)]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        linear_simct_loss(*inference.arguments(), **options)
    found.append(run_linear(inference, **options))
    for loss, gradients in found:
        assert loss.equal(expected[0])
        assert all(gradient.equal(expected[1][key]) for key, gradient in gradients.items())


@pytest.mark.parametrize("size", [64, 70])
def test_what_is_kept_of_ids_goes_with_them(size):
    ids = 2 * torch.arange(size)
    columns_of(ids)
    gone = weakref.ref(ids)
    del ids
    gc.collect()
    assert gone() is None


def test_repeated_backward():
    problem = make_problem(FEW, dtype=torch.float32)
    student, *rest = problem.logits()
    expected = run_logits(problem)[1]
    loss = 3 * simct_loss(student, *rest)
    for repeat in (3, 6):
        loss.backward(retain_graph=True)
        assert relative_error(student.grad, repeat * expected) < 1e-6
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(simct_loss(student, *rest), student, create_graph=True)
    with torch.no_grad():
        assert relative_error(3 * simct_loss(student, *rest), loss.detach()) < 1e-6


def test_logits_changed_before_the_backward_are_noticed():
    student, *rest = make_problem(FEW, dtype=torch.float32).logits()
    student = moved(student.detach()).requires_grad_()
    copy = student * 1
    loss = simct_kernels.simct_loss(copy, *map(moved, rest), backend="triton")
    with torch.no_grad():
        copy.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strided_logits():
    student, teacher, units, shared = make_problem(FEW, dtype=torch.float32).logits()
    expected, expected_gradient = run_logits(make_problem(FEW, dtype=torch.float32))
    wide = moved(torch.empty(*teacher.shape, 2))
    wide[..., 0] = moved(teacher)
    transposed = moved(student.detach()).T.contiguous().T.requires_grad_()
    assert not transposed.is_contiguous() and not wide[..., 0].is_contiguous()
    arguments = transposed, wide[..., 0], moved(units), moved(shared)
    loss = simct_kernels.simct_loss(*arguments, backend="triton")
    loss.backward()
    assert relative_error(loss.detach().cpu(), expected) < 1e-6
    assert transposed.grad.cpu().equal(expected_gradient)


# K = V, and more columns than shared tokens.
@pytest.mark.parametrize("beta,width", [(0.0, 71), (0.25, 80), (1.0, 71), *slow((0.0, 80), (0.25, 71), (1.0, 80))])
def test_one_vocabulary_is_ordinary_distillation(beta, width):
    """Single units, ids in order: the divergence of plain softmaxes, written independently in probabilities."""
    size = 71
    shared = SharedVocabulary(torch.arange(size), torch.arange(size))
    rows = torch.arange(9)
    units = AlignedUnits(rows, torch.ones_like(rows), rows, torch.ones_like(rows), rows, rows)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(9, width, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, width, generator=generator, dtype=torch.float64)
    q, p = (student[:, :size] / 1.3).softmax(1), (teacher[:, :size] / 1.3).softmax(1)
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return (a * (a / b).log()).sum()

    expected = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    loss = simct_loss(student.float(), teacher.float(), units, shared, beta=beta, temperature=1.3)
    (gradient,) = torch.autograd.grad(loss, student)
    assert relative_error(loss.detach(), expected.detach()) < 1e-6
    assert relative_error(gradient, expected_gradient) < 1e-6


def test_equal_logits_give_no_loss():
    """Also where the models differ by a constant that would drown the loss if it were not taken off first."""
    problem = make_problem(FEW, dtype=torch.float32)
    student, teacher, units, shared = problem.logits()
    flat = torch.full_like(student, 1000.0).requires_grad_()
    units = units.select(~units.has_continuation(shared))
    for beta in (0.0, 0.5, 1.0):
        loss = simct_loss(flat, torch.full_like(teacher, -1000.0), units, shared, beta=beta)
        assert abs(loss.item()) < 1e-5
        (gradient,) = torch.autograd.grad(loss, flat)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"score": "sum_logprob"}, *slow({}, {"beta": 0.0})], ids=name)
def test_huge_logits(options):
    student, teacher, units, shared = make_problem(FEW, dtype=torch.float32).logits()
    student = (1e4 * student.detach().sign() + student.detach()).requires_grad_()
    teacher = 1e4 * teacher.sign() + teacher
    exact = student.detach().double().requires_grad_()
    expected = simct_loss(exact, teacher.double(), units, shared, backend="reference", **options)
    loss = simct_loss(student, teacher, units, shared, **options)
    expected.backward(), loss.backward()
    assert loss.isfinite() and relative_error(loss.detach(), expected.detach()) < 1e-5
    assert relative_error(student.grad, exact.grad) < 1e-5


def test_what_the_kernels_leave_to_the_pytorch_backend():
    """float64, whose losses keep it, and calls without a unit."""
    problem = make_problem()
    assert not triton_backend._covers(torch.float64, problem.units)
    assert not triton_backend._covers(torch.float32, make_problem([]).units)
    assert run_logits(problem)[0].dtype == torch.float64
    assert run_linear(problem, top_k=2)[0].dtype == torch.float64


def test_single_units_never_read_the_rest_of_the_vocabulary():
    problem = make_problem([(1, 1)] * 7, dtype=torch.float32)
    units = problem.units.select(~problem.units.has_continuation(problem.shared))
    problem = dataclasses.replace(problem, units=units)
    student, teacher, units, shared = problem.logits()
    expected, expected_gradient = run_logits(problem)
    poisoned = []
    for logits, ids in ((student, shared.student_ids), (teacher, shared.teacher_ids)):
        copy = torch.full_like(logits, float("nan"))
        copy[:, ids] = logits.detach()[:, ids]
        poisoned.append(copy)
    poisoned[0].requires_grad_()
    loss = simct_loss(*poisoned, units, shared)
    loss.backward()
    assert loss.equal(expected) and poisoned[0].grad.equal(expected_gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_offsets_past_2_to_the_31(beta):
    """The last unit lies past 2^31 elements on both sides, and reads a whole row there."""
    width, count = 262_144, 8_300
    shared = SharedVocabulary(torch.arange(0, width, 3), torch.arange(0, width, 3).flip(0))
    rows = torch.tensor([0, count - 2])
    units = AlignedUnits(
        rows, torch.tensor([1, 2]), rows, torch.tensor([1, 2]), torch.zeros(count).long(), torch.zeros(count).long()
    )
    student = torch.zeros(count, width, dtype=torch.bfloat16, device=DEVICE)
    teacher = torch.zeros(count, width, dtype=torch.bfloat16, device=DEVICE)
    small = torch.randn(2, 3, width).bfloat16()
    read = torch.tensor([0, count - 2, count - 1])
    student[read], teacher[read] = small.to(DEVICE)
    student.requires_grad_()
    loss = simct_kernels.simct_loss(student, teacher, moved(units), moved(shared), beta=beta, backend="triton")
    loss.backward()
    rows = torch.tensor([0, 1])
    tokens = torch.zeros(3).long()
    units = AlignedUnits(rows, torch.tensor([1, 2]), rows, torch.tensor([1, 2]), tokens, tokens)
    exact = small[0].double().requires_grad_()
    expected = simct_loss(exact, small[1].double(), units, shared, beta=beta, backend="reference")
    expected.backward()
    assert relative_error(loss.detach().cpu(), expected.detach()) < 1e-3
    assert relative_error(student.grad[read.to(DEVICE)].cpu(), exact.grad) < 1e-2
    student.grad[read.to(DEVICE)] = 0
    assert not student.grad.any()
