"""The head's gradient from kept tiles: in groups and ranges, of consecutive ids, and with operands of 16 bits.

The CPU has no product of 16-bit operands into 32 bits: one of widened operands stands in for it.
"""

import dataclasses

import pytest
import torch
from kernels.cases import FEW, MIXED, Problem, make_problem, relative_error, slow, with_classes
from triton_cases import linear_simct_loss

from simct_kernels import LMHead, SharedVocabulary
from simct_kernels.torch_backend import plan, rows
from simct_kernels.triton_backend import kept, linear

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="products of the CPU are put in place of a GPU's"),
]


def run(problem: Problem, scale: float = 1.0, **options) -> list[torch.Tensor]:
    problem = problem.to(problem.student_hidden.dtype)
    loss = linear_simct_loss(*problem.arguments(), **options)
    (loss * scale).backward()
    return [loss.detach(), *problem.gradients().values()]


def assert_agrees(problem: Problem, tolerance: float, **options) -> None:
    expected = run(problem.to(torch.float64), 0.3, backend="reference")
    for actual, exact in zip(run(problem, 0.3, **options), expected, strict=True):
        assert actual.isfinite().all() and relative_error(actual, exact) < tolerance


@pytest.fixture
def narrow_ranges(monkeypatch):
    monkeypatch.setattr(
        kept, "ranges", lambda count, _: [(begin, min(begin + 24, count)) for begin in range(0, count, 24)]
    )


@pytest.mark.parametrize(
    "merge_rows,lengths,classes", [(0, MIXED, ()), (64, MIXED, ((5, 3),)), (0, [(1, 1)] * 2, ((5, 3),))]
)
def test_ranges_and_entries(monkeypatch, narrow_ranges, merge_rows, lengths, classes):
    """Unmerged, units of one student token have their own token's gradient apart from the tiles, as classes always have."""
    monkeypatch.setitem(plan.MERGE_ROWS, "cpu", (merge_rows, merge_rows))
    problem = make_problem(lengths, dtype=torch.float32, bias=False, softcap=3.0)
    assert_agrees(with_classes(problem, *classes) if classes else problem, 1e-5)


def test_groups_of_chunks(monkeypatch, narrow_ranges):
    """Tiles that would take more than the sum of their products: 12 columns' worth of float32 against more rows."""
    monkeypatch.setattr(kept, "KEPT_BYTES", 1)
    problem = make_problem(MIXED * 3, dtype=torch.float32, bias=False)
    totals = []
    multiply = kept.KeptTiles._multiply

    def counted(self, *arguments):
        multiply(self, *arguments)
        totals.append(self._total)

    monkeypatch.setattr(kept.KeptTiles, "_multiply", counted)
    assert_agrees(problem, 1e-5, chunk_rows=5)
    assert len(totals) > 4 and all(total is not None for total in totals)


@pytest.mark.parametrize("lengths", [FEW, [(1, 1)] * 5], ids=["mixed", "single"])
@pytest.mark.parametrize("first,size", [(0, 61), (3, 40), (0, 40)])
def test_consecutive_ids_read_the_head_where_it_lies(monkeypatch, narrow_ranges, first, size, lengths):
    ids = torch.arange(first, first + size)
    problem = make_problem(lengths, dtype=torch.float32, bias=False)
    tokens = torch.full_like(problem.units.student_tokens, first + 1)
    units = dataclasses.replace(problem.units, left_out=None)
    if lengths != FEW:
        units = dataclasses.replace(
            units, student_tokens=tokens, teacher_tokens=torch.full_like(units.teacher_tokens, first + 1)
        )
    monkeypatch.setattr(LMHead, "rows", None)  # what copies rows
    assert_agrees(dataclasses.replace(problem, units=units, shared=SharedVocabulary(ids, ids.clone())), 1e-5)


@pytest.mark.parametrize(
    "dtype,head",
    [
        (torch.bfloat16, {"softcap": 3.0}),
        *slow((torch.float16, {"bias": False}), (torch.bfloat16, {"bias": False}), (torch.float16, {"softcap": 3.0})),
    ],
    ids=str,
)
def test_operands_of_16_bits(monkeypatch, narrow_ranges, dtype, head):
    def product(left, right, out=None):
        assert left.dtype == right.dtype == dtype
        return torch.mm(left.float(), right.float(), out=out)

    monkeypatch.setattr(rows, "sums_in_float32", lambda device: True)
    for module in (rows, kept, linear):
        monkeypatch.setattr(module, "product", product)
    assert_agrees(make_problem(dtype=torch.float32, **head).to(dtype), 1e-2)
    assert_agrees(make_problem(MIXED * 2, dtype=torch.float32, **head).to(dtype), 1e-2, chunk_rows=4)
