"""Random problems for the kernels' tests: small, and no size a multiple of anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary

# (student tokens, teacher tokens) of each unit: single, either side longer, both longer.
MIXED = ((1, 1), (2, 1), (1, 1), (1, 3), (1, 1), (3, 2), (1, 1), (1, 1), (2, 2), (1, 1), (4, 1), (1, 1))
# One of every kind, and a third single one, which has a continuation: for what takes long, as in Triton's interpreter.
FEW = ((1, 1), (2, 1), (1, 3), (1, 1), (1, 1), (2, 2))
GRADIENTS = ("hidden", "weight", "bias")


def make_units(
    lengths, shared: SharedVocabulary, student_vocabulary: int, teacher_vocabulary: int, seed: int = 0
) -> AlignedUnits:
    """Units with one unsupervised row before each and, every third single unit aside, shared pairs in single units."""
    generator = torch.Generator().manual_seed(seed)
    student_length, teacher_length = torch.tensor(lengths, dtype=torch.int64).reshape(-1, 2).T
    student_start = (student_length + 1).cumsum(0) - student_length
    teacher_start = (teacher_length + 1).cumsum(0) - teacher_length
    student_tokens = torch.randint(student_vocabulary, (int((student_length + 1).sum()),), generator=generator)
    teacher_tokens = torch.randint(teacher_vocabulary, (int((teacher_length + 1).sum()),), generator=generator)
    pairs = torch.randint(len(shared), (len(student_start),), generator=generator)
    shared_single = ((student_length == 1) & (teacher_length == 1)).nonzero().squeeze(1)
    shared_single = shared_single[torch.arange(len(shared_single)) % 3 != 2]
    student_tokens[student_start[shared_single]] = shared.student_ids[pairs[shared_single]]
    teacher_tokens[teacher_start[shared_single]] = shared.teacher_ids[pairs[shared_single]]
    # Half of the shared candidates of every other unit. Units without a continuation must ignore theirs.
    unit, index = torch.meshgrid(torch.arange(0, len(student_start), 2), torch.arange(0, len(shared), 2), indexing="ij")
    return AlignedUnits(
        student_start,
        student_length,
        teacher_start,
        teacher_length,
        student_tokens,
        teacher_tokens,
        left_out=torch.stack([unit.flatten(), index.flatten()], dim=1),
    )


def make_shared(size: int, student_vocabulary: int, teacher_vocabulary: int, seed: int = 0) -> SharedVocabulary:
    generator = torch.Generator().manual_seed(seed)
    return SharedVocabulary(
        torch.randperm(student_vocabulary, generator=generator)[:size].sort().values,
        torch.randperm(teacher_vocabulary, generator=generator)[:size],
    )


@dataclass(frozen=True)
class Problem:
    """Everything that linear_simct_loss reads."""

    student_hidden: Tensor
    student_head: LMHead
    teacher_hidden: Tensor
    teacher_head: LMHead
    units: AlignedUnits
    shared: SharedVocabulary

    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def logits(self) -> tuple:
        """What simct_loss reads, the student's logits a leaf that needs a gradient."""
        student = self.student_head.logits(self.student_hidden).detach().requires_grad_()
        return student, self.teacher_head.logits(self.teacher_hidden).detach(), self.units, self.shared

    def to(self, student_dtype: torch.dtype, teacher_dtype: torch.dtype | None = None) -> Problem:
        """The same values in other dtypes, as new leaves."""
        teacher_dtype = teacher_dtype or student_dtype

        def head(head: LMHead, dtype: torch.dtype) -> LMHead:
            return dataclasses.replace(head, weight=leaf(head.weight, dtype), bias=leaf(head.bias, dtype))

        def leaf(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_(tensor.requires_grad)

        return dataclasses.replace(
            self,
            student_hidden=leaf(self.student_hidden, student_dtype),
            student_head=head(self.student_head, student_dtype),
            teacher_hidden=leaf(self.teacher_hidden, teacher_dtype),
            teacher_head=head(self.teacher_head, teacher_dtype),
        )

    def gradients(self) -> dict[str, Tensor]:
        tensors = (self.student_hidden, self.student_head.weight, self.student_head.bias)
        return {k: t.grad for k, t in zip(GRADIENTS, tensors, strict=True) if t is not None and t.grad is not None}


def make_problem(
    lengths=MIXED,
    *,
    shared_size: int = 37,
    student_vocabulary: int = 83,
    teacher_vocabulary: int = 61,
    softcap: float | None = None,
    scale: float = 1.0,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, needs_grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(needs_grad)

    shared = make_shared(shared_size, student_vocabulary, teacher_vocabulary, seed)
    units = make_units(lengths, shared, student_vocabulary, teacher_vocabulary, seed)
    student_width, teacher_width = 13, 11
    return Problem(
        normal(len(units.student_tokens), student_width, needs_grad=True),
        LMHead(
            normal(student_vocabulary, student_width, needs_grad=True),
            normal(student_vocabulary, needs_grad=True) if bias else None,
            softcap,
            scale,
        ),
        normal(len(units.teacher_tokens), teacher_width),
        LMHead(
            normal(teacher_vocabulary, teacher_width),
            normal(teacher_vocabulary) if bias else None,
            softcap,
            1 / scale,
        ),
        units,
        shared,
    )


def slow(*cases) -> list:
    """The rest of a grid: of its pairs of values, the quick cases have all that matter."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def in_pairs(first: Sequence, second: Sequence, third: Sequence) -> list:
    """All of first x second x third; the quick ones hold every pair of values, as long as the third is the shortest."""
    return [
        pytest.param(a, b, c, marks=() if (i + j) % len(third) == k else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        for k, c in enumerate(third)
    ]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm-wise, in float64; absolute where the expected value is 0."""
    error = (value.double() - expected.double()).norm().item()
    return error / (expected.double().norm().item() or 1.0)


def with_classes(problem: Problem, *sizes: tuple[int, int]) -> Problem:
    """Classes of so many (student, teacher) ids, none of them shared; the first and the last shared single unit are of the last."""
    shared, units, classes = problem.shared, problem.units, {}
    for place, side in enumerate(("student", "teacher")):
        free = torch.ones(getattr(problem, f"{side}_head").weight.shape[0], dtype=torch.bool)
        free[getattr(shared, f"{side}_ids")] = False
        ids = free.nonzero().squeeze(1).flip(0)
        number = torch.arange(len(sizes)).repeat_interleave(torch.tensor([size[place] for size in sizes]))
        classes[f"{side}_classes"] = torch.stack([number, ids[: len(number)]], dim=1)
    singles = (~units.has_continuation(shared)).nonzero().squeeze(1)[[0, -1]]
    tokens = {}
    for side in ("student", "teacher"):
        tokens[f"{side}_tokens"] = getattr(units, f"{side}_tokens").clone()
        tokens[f"{side}_tokens"][getattr(units, f"{side}_start")[singles]] = classes[f"{side}_classes"][-1, 1]
    shared = dataclasses.replace(shared, **classes)
    return dataclasses.replace(problem, units=dataclasses.replace(units, **tokens), shared=shared)
