"""ULD on aligned units, against whole sorted softmaxes. What it shares with ALM (chunks, memory, bad input) is tested for both."""

import dataclasses

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, alm_loss, uld_loss

from .cases import MIXED, Problem, make_problem, relative_error, slow
from .test_cost import RecordSizes, big_problem

LOSSES = [uld_loss, alm_loss]
HEADS = [{}, {"bias": False}, {"softcap": 3.0, "scale": 0.5}]


def arguments(problem: Problem) -> tuple:
    return problem.arguments()[:-1]  # these losses know no shared vocabulary


def reference(problem: Problem, temperature: float) -> Tensor:
    """[G] in float64, with one vocabulary padded by hand."""
    p = (problem.student_head.logits(problem.student_hidden) / temperature).softmax(1)
    t = (problem.teacher_head.logits(problem.teacher_hidden) / temperature).softmax(1)
    losses = []
    for row, teacher_row in zip(problem.units.student_start, problem.units.teacher_start, strict=True):
        ours, theirs = (x.sort(descending=True).values for x in (p[row], t[teacher_row]))
        both = min(len(ours), len(theirs))
        losses.append((ours[:both] - theirs[:both]).abs().sum() + ours[both:].sum() + theirs[both:].sum())
    return torch.stack(losses)


@pytest.mark.parametrize("vocabularies", [(83, 61), (61, 83)], ids=str)  # either one shorter
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_uld_is_its_definition(vocabularies, temperature, head):
    sizes = dict(zip(("student_vocabulary", "teacher_vocabulary"), vocabularies, strict=True))
    exact = make_problem(**sizes, **head)
    expected = reference(exact, temperature)
    weights = torch.linspace(0.5, 2, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    problem = exact.to(torch.float32)
    losses = uld_loss(*arguments(problem), temperature=temperature, reduction="none", chunk_rows=5)
    assert losses.dtype == torch.float32 and relative_error(losses.detach(), expected.detach()) < 1e-5
    (weights.float() * losses).sum().backward()
    assert set(problem.gradients()) == set(exact.gradients())
    for name, gradient in problem.gradients().items():
        assert relative_error(gradient, exact.gradients()[name]) < 1e-5, name


def test_uld_of_hand_counted_distributions():
    """(0.7, 0.2, 0.1) in any order against (0.9, 0.1): 0.2 + 0.1 + 0.1."""
    units = AlignedUnits(*(torch.tensor([x]) for x in (0, 1, 0, 1)), torch.tensor([2]), torch.tensor([0]))
    student = LMHead(torch.zeros(3, 1), torch.tensor([0.2, 0.7, 0.1]).log())
    teacher = LMHead(torch.zeros(2, 1), torch.tensor([0.1, 0.9]).log())
    hidden = torch.zeros(1, 1)
    assert uld_loss(hidden, student, hidden, teacher, units).item() == pytest.approx(0.4, rel=1e-6)


def students(problem: Problem) -> list[Tensor]:
    tensors = (problem.student_hidden, problem.student_head.weight, problem.student_head.bias)
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("fast", [True, *slow(False)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck(loss, head, fast):
    problem = make_problem(MIXED[1:5], student_vocabulary=7, teacher_vocabulary=6, shared_size=4, **head)
    tensors = students(problem)

    def run(hidden, weight, bias=None):
        made = dataclasses.replace(problem.student_head, weight=weight, bias=bias)
        return loss(hidden, made, *arguments(problem)[2:], reduction="none", chunk_rows=3)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=fast)


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_chunks_and_unit_losses(loss):
    problem = make_problem()
    losses = loss(*arguments(problem), reduction="none")
    total, units = loss(*arguments(problem), return_unit_losses=True)
    assert not units.requires_grad and units.equal(losses.detach())
    torch.testing.assert_close(total, losses.sum())
    torch.testing.assert_close(loss(*arguments(problem), reduction="mean"), losses.mean())
    for chunk_rows in (1, 5, 1000):
        torch.testing.assert_close(loss(*arguments(problem), chunk_rows=chunk_rows), total)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_only_what_is_trained_gets_a_gradient(loss, frozen):
    problem, whole = make_problem(), make_problem()
    (loss(*arguments(whole))).backward()
    for tensor in students(problem)[1:] if frozen == "head" else students(problem)[:1]:
        tensor.requires_grad_(False)
    loss(*arguments(problem)).backward()
    assert set(problem.gradients()) == ({"hidden"} if frozen == "head" else {"weight", "bias"})
    for name, gradient in problem.gradients().items():
        assert gradient.equal(whole.gradients()[name])


@pytest.mark.parametrize("loss", LOSSES)
def test_low_precision_inputs(loss):
    problem = make_problem(dtype=torch.float32).to(torch.bfloat16)
    wide = problem.to(torch.float64)
    loss(*arguments(wide)).backward()
    result = loss(*arguments(problem))
    result.backward()
    assert result.dtype == torch.float32
    for name, gradient in problem.gradients().items():
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, wide.gradients()[name]) < 1e-2, name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_unit_gives_a_differentiable_zero(loss, reduction):
    problem = make_problem(())
    result = loss(*arguments(problem), reduction=reduction)
    assert result.sum().item() == 0
    result.sum().backward()
    assert set(problem.gradients()) == {"hidden", "weight", "bias"}
    assert not any(gradient.any() for gradient in problem.gradients().values())


@pytest.mark.parametrize("loss", LOSSES)
def test_twice_differentiated_is_refused(loss):
    problem = make_problem()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss(*arguments(problem)), problem.student_hidden, create_graph=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_stays_in_its_unit_and_can_be_dropped(loss, side, value):
    problem = make_problem(dtype=torch.float32)
    bad = 5
    row = int(getattr(problem.units, f"{side}_start")[bad])
    with torch.no_grad():
        getattr(problem, f"{side}_hidden")[row] = value
    losses = loss(*arguments(problem), reduction="none")
    assert losses.isfinite().logical_not().nonzero().flatten().tolist() == [bad]
    assert not loss(*arguments(problem)).isfinite()
    losses[losses.isfinite()].sum().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in problem.gradients().values())


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_of_rows_by_vocabulary_exists(loss):
    problem = big_problem(256, 4_000, 10_000, 9_000)
    with RecordSizes() as record:
        loss(*arguments(problem), chunk_rows=16).backward()
    heads = {(rows, width) for rows in (10_000, 9_000) for width in (24, 20)}
    sizes = [torch.Size(s).numel() for s in record.shapes if s not in heads and s[::-1] not in heads]
    assert max(sizes) == 16 * 10_000


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_of_that_size_is_kept_for_the_backward(loss):
    problem = big_problem(256, 4_000, 10_000, 9_000)
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(*arguments(problem), chunk_rows=64)
    inputs = {tensor.data_ptr() for tensor in students(problem)}
    assert max(tensor.numel() for tensor in saved if tensor.data_ptr() not in inputs) <= 256


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a positive number, got nan"),
        ({"reduction": "average"}, "reduction must be one of .*'average'"),
        ({"chunk_rows": 0}, "chunk_rows must be .*got 0"),
    ],
    ids=str,
)
def test_options_out_of_range(loss, change, message):
    with pytest.raises(ValueError, match=message):
        loss(*arguments(make_problem()), **change)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 13), "student_hidden has 3 rows"),
        (0, torch.zeros(23, 12, dtype=torch.int64), "student_hidden must be a floating point"),
        (2, torch.zeros(29, 5), "teacher_hidden has 5 columns"),
        (1, torch.zeros(3, 13), "student_head must be an LMHead, got Tensor"),
        (4, "units", "units must be AlignedUnits, got str"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_inputs_that_do_not_fit(loss, place, value, message):
    given = list(arguments(make_problem(dtype=torch.float32)))
    given[place] = value
    with pytest.raises(ValueError, match=message):
        loss(*given)
