"""What BPM and ESCD have in common: reductions and chunks, numbers that are none, memory, bad input."""

import dataclasses
import functools
import random

import pytest
import torch
from torch import Tensor

from simct_kernels import LMHead, PrefixTables

from .cases import make_shared, relative_error
from .prefix_cases import BOTH, LETTERS, LOSSES, PrefixProblem, cut, prefix_problem, run, units_of, without_units
from .test_cost import RecordSizes


@BOTH
def test_reductions_chunks_and_unit_losses(name):
    problem = prefix_problem(3, responses=5)
    losses = run(name, problem, reduction="none")
    total, units = run(name, problem, return_unit_losses=True)
    assert not units.requires_grad and units.equal(losses.detach())
    torch.testing.assert_close(total, losses.sum())
    torch.testing.assert_close(run(name, problem, reduction="mean"), losses.mean())
    total.backward()
    for chunk_rows in (1, 7, 1000):
        other = prefix_problem(3, responses=5)
        loss = run(name, other, chunk_rows=chunk_rows)
        torch.testing.assert_close(loss, total)
        loss.backward()
        for part, gradient in other.gradients().items():
            torch.testing.assert_close(gradient, problem.gradients()[part])


@BOTH
def test_the_order_of_units_changes_nothing(name):
    problem = prefix_problem(5, responses=4)
    losses = run(name, problem, reduction="none")
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(problem, units=problem.units.select(order))
    torch.testing.assert_close(run(name, shuffled, reduction="none"), losses[order])


@BOTH
@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_only_what_is_trained_gets_a_gradient(name, frozen):
    problem, whole = prefix_problem(), prefix_problem()
    run(name, whole).backward()
    head = (problem.student_head.weight, problem.student_head.bias)
    for tensor in head if frozen == "head" else (problem.student_hidden,):
        tensor.requires_grad_(False)
    run(name, problem).backward()
    assert set(problem.gradients()) == ({"hidden"} if frozen == "head" else {"weight", "bias"})
    for part, gradient in problem.gradients().items():
        assert gradient.equal(whole.gradients()[part])


@BOTH
def test_low_precision_inputs(name):
    problem = prefix_problem().to(torch.bfloat16)
    wide = problem.to(torch.float64)
    run(name, wide).backward()
    result = run(name, problem)
    result.backward()
    assert result.dtype == torch.float32
    for part, gradient in problem.gradients().items():
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, wide.gradients()[part]) < 1e-2, part


@BOTH
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_unit_gives_a_differentiable_zero(name, reduction):
    problem = without_units(prefix_problem())
    result = run(name, problem, reduction=reduction)
    assert result.sum().item() == 0
    result.sum().backward()
    assert set(problem.gradients()) == {"hidden", "weight", "bias"}
    assert not any(gradient.any() for gradient in problem.gradients().values())


@BOTH
def test_twice_differentiated_is_refused(name):
    problem = prefix_problem()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(run(name, problem), problem.student_hidden, create_graph=True)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_student_rows_stay_in_the_units_that_read_them(name, value):
    problem = prefix_problem(5, responses=4)
    losses = run(name, problem, reduction="none")
    row = int(problem.units.student_start[4]) + 1
    reads = [
        g
        for g in range(len(losses))
        if torch.autograd.grad(losses[g], problem.student_hidden, retain_graph=True)[0][row].any()
    ]
    assert 0 < len(reads) < len(losses)
    with torch.no_grad():
        problem.student_hidden[row] = value
    losses = run(name, problem, reduction="none")
    assert losses.isfinite().logical_not().nonzero().flatten().tolist() == reads
    assert not run(name, problem).isfinite()
    losses[losses.isfinite()].sum().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in problem.gradients().values())


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_teacher_rows_stay_in_their_unit(name, value):
    problem = prefix_problem(5, responses=4)
    bad = 6
    problem.teacher_hidden[problem.units.teacher_start[bad]] = value
    losses = run(name, problem, reduction="none")
    assert losses.isfinite().logical_not().nonzero().flatten().tolist() == [bad]
    losses[losses.isfinite()].sum().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in problem.gradients().values())


@BOTH
def test_what_a_model_excludes(name):
    """Logits of -inf: a teacher token of no probability costs nothing, a student token of none is infinitely wrong."""
    problem = prefix_problem(5, dropped=0.0)
    excluded = problem.teacher_bytes.index(b"z")
    bias = problem.teacher_head.bias.clone()
    bias[excluded] = -torch.inf
    given = list(getattr(problem, name)())
    given[3] = dataclasses.replace(problem.teacher_head, bias=bias)
    loss = LOSSES[name](*given)
    loss.backward()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in problem.gradients().values())
    oracle = dataclasses.replace(problem, teacher_head=given[3]).reference(name)
    torch.testing.assert_close(loss, oracle.sum())
    bias = problem.student_head.bias.detach().clone()
    bias[problem.student_bytes.index(b"a")] = -torch.inf
    given[1] = dataclasses.replace(problem.student_head, bias=bias)
    assert LOSSES[name](*given).item() == torch.inf


@BOTH
def test_probabilities_far_below_one_keep_their_gradient(name):
    """A student that has all but excluded what the teacher asks for: the loss and its slope stay exact in float32."""
    exact = prefix_problem(4, dropped=0.0)
    with torch.no_grad():
        exact.student_head.bias[torch.arange(0, 31, 3)] -= 60
        exact.teacher_head.bias[torch.arange(0, 37, 3)] -= 60
    exact.reference(name).sum().backward()
    problem = exact.to(torch.float32)
    run(name, problem).backward()
    for part, gradient in problem.gradients().items():
        assert relative_error(gradient, exact.gradients()[part]) < 1e-5, part


@functools.cache  # its tables take seconds
def big_problem(student_size: int, teacher_size: int, rows: int) -> PrefixProblem:
    """Long vocabularies, where rows x vocabulary would be seen."""
    rng = random.Random(0)
    alphabet = [bytes([b]) for b in b"abcdefghijklmnop"]

    def pieces(size: int, longest: int) -> list[bytes]:
        found = dict.fromkeys(alphabet)
        while len(found) < size:
            found[b"".join(rng.choices(alphabet, k=rng.randrange(2, longest)))] = None
        return list(found)

    student_bytes, teacher_bytes = pieces(student_size, 5), pieces(teacher_size, 6)
    text = b"".join(rng.choices(alphabet, k=rows))
    ids = [[cut(rng, text, side)] for side in (student_bytes, teacher_bytes)]
    units = units_of(*ids, student_bytes, teacher_bytes)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student, teacher = (len(side[0]) for side in ids)
    return PrefixProblem(normal(student, 24).requires_grad_(), LMHead(normal(student_size, 24).requires_grad_()),
                         normal(teacher, 20), LMHead(normal(teacher_size, 20)), units, make_shared(3, 99, 99),
                         tuple(student_bytes), tuple(teacher_bytes), {}, (student,),
                         PrefixTables.build(student_bytes, teacher_bytes))  # fmt: skip


@BOTH
def test_nothing_of_rows_by_vocabulary_exists_or_is_kept(name):
    problem = big_problem(10_000, 9_000, 1000)
    assert len(problem.units) > 160
    inputs = {problem.student_hidden.data_ptr(), problem.student_head.weight.data_ptr()}
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with RecordSizes() as record:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run(name, problem, chunk_rows=16)
        loss.backward()
    heads = {(rows, width) for rows in (10_000, 9_000) for width in (24, 20)}
    sizes = [torch.Size(s).numel() for s in record.shapes if s not in heads and s[::-1] not in heads]
    assert max(sizes) == 16 * 10_001  # one column for what has no home
    assert max(tensor.numel() for tensor in saved if tensor.data_ptr() not in inputs) < 1000


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"reduction": "average"}, "reduction must be one of .*'average'"),
        ({"chunk_rows": 0}, "chunk_rows must be .*got 0"),
    ],
    ids=str,
)
def test_options_out_of_range(name, change, message):
    with pytest.raises(ValueError, match=message):
        run(name, prefix_problem(), **change)


@BOTH
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 13), "student_hidden has 3 rows"),
        (2, torch.zeros(29, 5), "teacher_hidden has 5 columns"),
        (1, torch.zeros(3, 13), "student_head must be an LMHead, got Tensor"),
        (4, "units", "units must be AlignedUnits, got str"),
        (5, None, "tables must be PrefixTables, got NoneType"),
        (
            5,
            PrefixTables.build(LETTERS, LETTERS),
            "tables was built of 5 student tokens, but student_head.weight has 31",
        ),
        (5, PrefixTables.build([None] * 30 + LETTERS[:1], LETTERS), "built of 5 teacher tokens, .* has 37 rows"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_inputs_that_do_not_fit(name, place, value, message):
    given = list(getattr(prefix_problem(), name)())
    given[place] = value
    with pytest.raises(ValueError, match=message):
        LOSSES[name](*given)
