"""What is measured: the sizes of a loss call, and its inputs at those sizes with random weights. Knows no method."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary

from . import floor


@dataclass(frozen=True)
class Model:
    name: str
    vocabulary: int
    width: int
    softcap: float | None = None


GEMMA = Model("Gemma-2-2B", 256_000, 2304, softcap=30.0)
QWEN = Model("Qwen2.5-7B", 152_064, 3584)
PHI = Model("Phi-4-mini", 200_064, 3072)

# (student tokens, teacher tokens) of the longer units, in turn: on real text they average 2.2 and 1.9 tokens.
LONGER = ((2, 1), (2, 2), (1, 2), (3, 2), (2, 1), (2, 2), (2, 1), (3, 2), (1, 2), (2, 2), (2, 1), (3, 4), (2, 1), (2, 2),
          (3, 2), (2, 1), (1, 2), (2, 2), (2, 1), (4, 4))  # fmt: skip
SERVED_K = 64  # log-probabilities a row of a served teacher


@dataclass(frozen=True)
class Case:
    """The sizes of one loss call. `form` says what the loss is given: "linear" hidden states and heads, "logits", "served"
    the k best log-probabilities of the teacher, "text" as linear for real text in two real tokenizers (see `texts`)."""

    name: str
    student: Model
    teacher: Model
    shared: int
    rows: int  # the student's
    single: float = 0.75  # the share of them in single units
    dtype: str = "bfloat16"
    form: str = "linear"
    axis: str = ""  # what a sweep varies: "rows" or "shared"

    @property
    def one_vocabulary(self) -> bool:
        return self.shared == self.student.vocabulary == self.teacher.vocabulary

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    def tiny(self) -> Case:
        """The same case, small enough to warm a process up."""
        if self.form == "text":
            return self.replace(rows=8)
        size = 96
        return self.replace(
            student=dataclasses.replace(self.student, vocabulary=size, width=16),
            teacher=dataclasses.replace(self.teacher, vocabulary=size if self.one_vocabulary else 80, width=24),
            shared=size if self.one_vocabulary else 64,
            rows=32,
        )


class Problem:
    """Inputs of one loss call, the same for every method."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dtype = getattr(torch, case.dtype)
        if case.form == "text":
            from . import texts  # with two tokenizers, and all that reads them

            self.text = texts.aligned_text(case.rows)
            self.units, self.shared = self.text.units, self.text.shared
        else:
            self.shared = make_shared(case)
            self.units = make_units(case, self.shared)
        self.units, self.shared = self.units.to(device), self.shared.to(device)
        self._draw = torch.Generator(device).manual_seed(0)
        student_rows, teacher_rows = len(self.units.student_tokens), len(self.units.teacher_tokens)
        self.leaves: dict[str, Tensor] = {}  # the student's, by name
        if case.form == "logits":
            logits = self._uniform(student_rows, case.student.vocabulary, std=2.0).requires_grad_()
            self.student_logits = self.leaves["logits"] = logits
            self.teacher_logits = self._uniform(teacher_rows, case.teacher.vocabulary, std=2.0)
            return
        self.student_hidden = self._uniform(student_rows, case.student.width).requires_grad_()
        self.student_head = self._head(case.student, trained=True)
        self.leaves = {"hidden": self.student_hidden, "head": self.student_head.weight}
        if case.form == "served":
            self._serve(teacher_rows)
            return
        self.teacher_hidden = self._uniform(teacher_rows, case.teacher.width)
        self.teacher_head = self._head(case.teacher, trained=False)

    def _head(self, model: Model, trained: bool) -> LMHead:
        # Logits of standard deviation 2, for hidden states of standard deviation 1.
        weight = self._uniform(model.vocabulary, model.width, std=2 / math.sqrt(model.width))
        return LMHead(weight.requires_grad_(trained), softcap=model.softcap)

    def _uniform(self, *shape: int, std: float = 1.0) -> Tensor:
        """In place, so that nothing else was ever allocated; on a CPU three times as fast as normal numbers."""
        reach = std * math.sqrt(3)
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.uniform_(-reach, reach, generator=self._draw)

    def _serve(self, rows: int) -> None:
        # Different ones in each row: which of two entries of one id counts is nobody's business.
        count, size = min(SERVED_K, len(self.shared)), len(self.shared)
        start = torch.randint(size, (rows, 1), generator=self._draw, device=self.device)
        stride = torch.randint(1, size // count + 1, (rows, 1), generator=self._draw, device=self.device)
        pick = (start + stride * torch.arange(count, device=self.device)) % size
        self.teacher_topk_ids = self.shared.teacher_ids[pick]
        self.teacher_topk_logprobs = self._uniform(rows, count).float().log_softmax(1) - 0.05
        self.teacher_token_logprobs = self._uniform(rows).float() - 2

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}

    def floor(self, options) -> tuple[floor.Cost, floor.Cost]:
        """Of the forward and of the backward pass; products are all done in the forward of a linear loss."""
        case, size = self.case, self.dtype.itemsize
        student = case.student.vocabulary, case.student.width
        if case.form == "logits":
            sizes = {"student_bytes": size, "teacher_bytes": size}
            return floor.logits_floor(
                self.units, self.shared, student[0], case.teacher.vocabulary, **sizes, options=options
            )
        if case.form == "served":
            costs = floor.served_floor(self.units, self.shared, student, SERVED_K, student_bytes=size)
        else:
            teacher = case.teacher.vocabulary, case.teacher.width
            sizes = {"student_bytes": size, "teacher_bytes": size}
            costs = floor.linear_floor(self.units, self.shared, student, teacher, **sizes, options=options)
        return floor.total(costs), floor.Cost()


def make_shared(case: Case) -> SharedVocabulary:
    if case.one_vocabulary:
        return SharedVocabulary(torch.arange(case.shared), torch.arange(case.shared))
    draw = torch.Generator().manual_seed(1)
    return SharedVocabulary(
        torch.randperm(case.student.vocabulary, generator=draw)[: case.shared].sort().values,
        torch.randperm(case.teacher.vocabulary, generator=draw)[: case.shared],
    )


def make_units(case: Case, shared: SharedVocabulary) -> AlignedUnits:
    """Single units of shared pairs, and longer units in random order among them; every row is in a unit."""
    draw = torch.Generator().manual_seed(2)
    in_longer = 0 if case.one_vocabulary else round(case.rows * (1 - case.single))
    lengths, place = [], 0
    while in_longer:
        student, teacher = LONGER[place % len(LONGER)]
        student = min(student, in_longer)
        lengths.append((student, teacher if student > 1 else max(2, teacher)))
        in_longer, place = in_longer - student, place + 1
    singles = case.rows - sum(student for student, _ in lengths)
    lengths = torch.tensor(lengths + [(1, 1)] * singles)
    student_length, teacher_length = lengths[torch.randperm(len(lengths), generator=draw)].T.contiguous()
    student_start = student_length.cumsum(0) - student_length
    teacher_start = teacher_length.cumsum(0) - teacher_length
    single = (student_length == 1) & (teacher_length == 1)
    student_tokens = torch.randint(case.student.vocabulary, (int(student_length.sum()),), generator=draw)
    teacher_tokens = torch.randint(case.teacher.vocabulary, (int(teacher_length.sum()),), generator=draw)
    pairs = torch.randint(len(shared), (int(single.sum()),), generator=draw)
    student_tokens[student_start[single]] = shared.student_ids[pairs]
    teacher_tokens[teacher_start[single]] = shared.teacher_ids[pairs]
    return AlignedUnits(student_start, student_length, teacher_start, teacher_length, student_tokens, teacher_tokens)
