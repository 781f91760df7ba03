"""`backend="triton_fused"`, judged by the oracle in float64, and the bound of what its backward skips."""

import pytest
import torch
from kernels.cases import Problem, make_problem, relative_error
from torch import Tensor
from triton_cases import linear_simct_loss, moved

from simct_kernels import AlignedUnits, SharedVocabulary, triton_backend
from simct_kernels.options import LossOptions
from simct_kernels.triton_backend import fused_backend
from simct_kernels.triton_backend.fused_backend import FusedJob
from simct_kernels.triton_backend.fused_gradient import default_threshold
from simct_kernels.triton_backend.traffic import Traffic, count_traffic

pytestmark = pytest.mark.usefixtures("small_tiles")
in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")

# One unit of each kind, the third single one with a continuation: the interpreter is slow.
FEW = ((1, 1), (2, 1), (1, 1), (1, 2), (1, 1), (2, 2))
CAPPED = {"softcap": 3.0, "scale": 0.5}
EVERYTHING = {"score": "sum_logprob", "teacher_mass_floor": 0.4, "temperature": 1.7, "candidates": "disjoint"}
OPTIONS = [
    {},
    {"beta": 0.0},
    {"beta": 0.3},
    {"score": "mean_logit", "teacher_mass_floor": 0.5, "candidates": "disjoint", "beta": 0.0},
    {"beta": 0.5, **EVERYTHING},
    EVERYTHING,
]


def run(problem: Problem, **options) -> tuple[Tensor, dict[str, Tensor]]:
    problem = problem.to(problem.student_hidden.dtype, problem.teacher_hidden.dtype)
    loss = linear_simct_loss(*problem.arguments(), **({"backend": "triton_fused"} | options))
    loss.sum().backward()
    return loss.detach(), problem.gradients()


def assert_agrees(problem: Problem, tolerance: float, reduction: str = "none", **options) -> None:
    exact = problem.to(torch.float64)
    expected, expected_gradients = run(exact, backend="reference", reduction="none", **options)
    loss, gradients = run(problem, reduction=reduction, **options)
    assert relative_error(loss, expected if reduction == "none" else expected.sum()) < tolerance
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[key]) < tolerance, key


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_oracle(options):
    assert_agrees(make_problem(FEW, dtype=torch.float32, **CAPPED), 1e-5, **options)


def test_more_units_than_a_tile_has_rows():
    assert_agrees(make_problem(dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", [CAPPED, {"bias": False}], ids=str)
def test_16_bits(head, dtype):
    assert_agrees(make_problem(FEW, dtype=torch.float32, **head).to(dtype), 1e-2, "sum")


def test_sides_of_different_dtype():
    assert_agrees(make_problem(FEW).to(torch.float32, torch.bfloat16), 1e-2)


@pytest.mark.parametrize("lengths", [[(1, 1)], [(9, 7)], [(2, 1), (1, 2), (3, 3)], [(1, 1)] * 2], ids=str)
def test_sizes(lengths):
    assert_agrees(make_problem(lengths, dtype=torch.float32), 1e-5)


def test_one_shared_token():
    assert_agrees(make_problem([(1, 1), (2, 2)], shared_size=1, dtype=torch.float32), 1e-5)


def test_chunks_and_strides_change_nothing():
    problem = make_problem(FEW, dtype=torch.float32)
    expected, expected_gradients = run(problem)
    transposed = problem.student_hidden.detach().T.contiguous().T.requires_grad_()
    loss = linear_simct_loss(transposed, *problem.arguments()[1:], backend="triton_fused", chunk_rows=3)
    loss.backward()
    assert relative_error(loss.detach(), expected) < 1e-6
    assert relative_error(transposed.grad, expected_gradients["hidden"]) < 1e-6
    assert relative_error(problem.student_head.weight.grad, expected_gradients["weight"]) < 1e-6


def test_only_what_needs_a_gradient_gets_one():
    problem = make_problem(FEW, dtype=torch.float32)
    expected = run(problem)[1]["hidden"]
    problem.student_head.weight.requires_grad_(False)
    problem.student_head.bias.requires_grad_(False)
    _, gradients = run(problem)
    assert gradients.keys() == {"hidden"} and relative_error(gradients["hidden"], expected) < 1e-6


def test_a_dropped_nan_unit_reaches_no_gradient():
    problem = make_problem(FEW, dtype=torch.float32)
    bad = int((~problem.units.has_continuation(problem.shared)).nonzero()[1])
    row = int(problem.units.student_start[bad])
    with torch.no_grad():
        problem.student_hidden[row] = float("nan")
    loss = linear_simct_loss(*problem.arguments(), reduction="none", backend="triton_fused")
    assert loss.isnan().nonzero().flatten().tolist() == [bad]
    loss[loss.isfinite()].sum().backward()
    for key, gradient in problem.gradients().items():
        assert gradient.isfinite().all() and gradient.any(), key


@pytest.mark.parametrize("dtype,options", [(torch.float32, {"top_k": 3}), (torch.float64, {}), (torch.float32, {})])
def test_what_it_does_not_cover_is_the_default_jobs(monkeypatch, dtype, options):
    problem = make_problem(dtype=dtype)
    heads = problem.student_head, problem.teacher_head
    arguments = (problem.units, problem.shared, LossOptions(**options), *heads, "auto", dtype)
    default = type(triton_backend.linear_job(*arguments))
    covered = dtype == torch.float32 and not options
    assert type(fused_backend.linear_job(*arguments)) is (FusedJob if covered else default)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert type(fused_backend.linear_job(*arguments)) is default is not FusedJob


def test_losses_are_the_same_on_every_run():
    problem = make_problem(FEW, dtype=torch.float32)
    assert run(problem, reduction="none")[0].equal(run(problem, reduction="none")[0])


# Skipping. In the problems below both sides all but exclude the second half of the shared columns, and all others.


def peaked(lengths=((1, 1),) * 4) -> Problem:
    problem = make_problem(lengths, shared_size=64, student_vocabulary=96, teacher_vocabulary=64, dtype=torch.float32)
    with torch.no_grad():
        for side in ("student", "teacher"):
            bias, ids = getattr(problem, f"{side}_head").bias, getattr(problem.shared, f"{side}_ids")
            kept = bias[ids[:32]].clone()
            bias -= 60
            bias[ids[:32]] = kept
    return problem


def job_gradients(problem: Problem, threshold: float | None, **options) -> tuple[Tensor, Tensor]:
    """By hidden states and weight, float32."""
    heads = moved(problem.student_head), moved(problem.teacher_head)
    units, shared = moved(problem.units), moved(problem.shared)
    job = FusedJob(units, shared, LossOptions(**options), *heads, 1000, torch.float32, threshold)
    inputs = moved(problem.student_hidden), moved(problem.teacher_hidden)
    _, (hidden, weight, _) = job.run(*(tensor.detach() for tensor in inputs), (True, True, False))
    return hidden.cpu(), weight.cpu()


@pytest.mark.parametrize("lengths", [((1, 1),) * 4, ((3, 2), (2, 2))], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_error_of_skipping_is_bounded(lengths, beta):
    problem = peaked(lengths)
    threshold = 1e-3
    exact, approximate = job_gradients(problem, 0, beta=beta), job_gradients(problem, threshold, beta=beta)
    errors = [(a - b).double().norm(dim=1) for a, b in zip(exact, approximate, strict=True)]
    assert max(error.max() for error in errors) > 0  # something was skipped
    # At most all columns of both passes, the candidates' and the log-sum-exps', and all rows that lie in a unit.
    by_column = problem.student_head.weight.detach().norm(dim=1)
    longer = any(lengths[0][side] > 1 for side in (0, 1))
    columns = by_column[problem.shared.student_ids].sum() + (by_column.sum() if longer else 0)
    rows = problem.student_hidden.detach().norm(dim=1).sum() * (2 if longer else 1)
    assert errors[0].max() <= threshold * columns
    assert errors[1].max() <= threshold * rows


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_default_threshold_is_below_the_rounding(beta):
    problem = peaked()
    exact, default = job_gradients(problem, 0, beta=beta), job_gradients(problem, None, beta=beta)
    for a, b in zip(exact, default, strict=True):
        assert relative_error(b, a) < torch.finfo(torch.float32).eps
    assert default_threshold(torch.bfloat16, 256) == 2**-16


def counted(threshold: float | None, **options) -> Traffic:
    with count_traffic() as traffic:
        job_gradients(peaked(), threshold, **options)
    return traffic


@in_interpreter
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_negligible_tiles_are_not_multiplied_again(beta):
    """At threshold 0 the backward does both logits' products again and two more; each skipped tile saves all four."""
    full, skipping = (
        sum(launch.products for launch in counted(threshold, beta=beta).of("fused_gradient_kernel"))
        for threshold in (0, None)
    )
    assert skipping == full / 2


@in_interpreter
def test_products_and_traffic():
    """Both sides' products once in the forward and once in the backward; no tensor of rows and columns but extremes."""
    traffic = counted(0)
    forward = sum(launch.products for launch in traffic.of("fused_statistics_kernel"))
    backward = sum(launch.products for launch in traffic.of("fused_gradient_kernel"))
    rows, student_width, teacher_width = 8, 16, 16  # two kinds of units in tiles of 4; widths in steps of 8
    assert forward == rows * 64 * (student_width + teacher_width)
    assert backward == forward + 2 * rows * 64 * student_width
    assert traffic.written("extremes") == 2 * 4 * (64 // 32) * 4


def test_one_vocabulary():
    """Ids in order, so no table of columns: the divergence of plain softmaxes."""
    size = 21
    shared = SharedVocabulary(torch.arange(size), torch.arange(size))
    rows = torch.arange(5)
    units = AlignedUnits(rows, torch.ones_like(rows), rows, torch.ones_like(rows), rows, rows)
    base = make_problem([], student_vocabulary=size, teacher_vocabulary=size, shared_size=size, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 13, generator=generator).requires_grad_()
    teacher = torch.randn(5, 11, generator=generator)
    assert_agrees(Problem(hidden, base.student_head, teacher, base.teacher_head, units, shared), 1e-5)
