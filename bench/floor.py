"""The least that a SimCT loss must move and multiply: each needed element read once a pass, each gradient written once,
each needed product done once.

A unit reads the K shared columns of each side's first row. Whole rows are needed only where a continuation of several
tokens is scored by log-probabilities: a side that spells its unit in one token has one log-sum-exp for all candidates,
which cancels. A side's table of shared ids is read once, where it says anything. Knows no backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from simct_kernels import AlignedUnits, SharedVocabulary
from simct_kernels.options import LossOptions

ID_BYTES = 4  # a vocabulary's ids fit 32 bits
PRODUCT = 2  # floating point operations of a multiply-add


@dataclass(frozen=True)
class Cost:
    """Of one pass, or of several added up."""

    read: int = 0  # bytes
    written: int = 0  # bytes
    flops: int = 0  # of matrix products

    @property
    def moved(self) -> int:
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)


@dataclass(frozen=True)
class Needed:
    """What one side's logits are needed for."""

    first: int  # rows of which the shared columns, and no others, are needed
    whole: int  # rows of which every column is needed
    whole_first: int  # of these, rows that a unit begins with
    single_targets: int  # further elements: the tokens of continuations on rows that are not needed whole

    def elements(self, columns: int, vocabulary: int) -> int:
        """Logits that are read, `columns` of the shared ones a unit."""
        return self.first * columns + self.whole * vocabulary + self.single_targets


def needed(units: AlignedUnits, shared: SharedVocabulary, side: str, options: LossOptions) -> Needed:
    continued, length = units.has_continuation(shared), getattr(units, f"{side}_length")
    whole = continued & (length > 1) & options.normalises
    if side == "teacher" and options.teacher_mass_floor is not None:
        whole = torch.ones_like(whole)
    return Needed(
        first=int((~whole).sum()),
        whole=int(length[whole].sum()),
        whole_first=int(whole.sum()),
        single_targets=int(length[continued & ~whole].sum()),
    )


def logits_floor(
    units: AlignedUnits,
    shared: SharedVocabulary,
    student_vocabulary: int,
    teacher_vocabulary: int,
    *,
    student_bytes: int = 2,  # of one logit
    teacher_bytes: int = 2,
    options: LossOptions | None = None,
) -> tuple[Cost, Cost]:
    """`simct_loss`: forward and backward. The gradient is written whole, also where it is zero."""
    options = options or LossOptions()
    student, teacher = (needed(units, shared, side, options) for side in ("student", "teacher"))
    columns = len(shared) if options.top_k is None else min(options.top_k, len(shared))
    tables = sum(_table(ids) for ids in (shared.student_ids, shared.teacher_ids))
    read = student.elements(len(shared), student_vocabulary) * student_bytes
    forward = Cost(read + teacher.elements(columns, teacher_vocabulary) * teacher_bytes + tables)
    # What the forward found out of a unit is a few numbers; the gradient needs the candidates' scores of both sides again,
    # and the student's whole rows for their softmax.
    again = (student.first * columns + student.whole * student_vocabulary) * student_bytes
    again += (teacher.first + teacher.whole_first) * columns * teacher_bytes
    gradient = len(units.student_tokens) * student_vocabulary * student_bytes
    return forward, Cost(again + tables, gradient)


def _table(ids: torch.Tensor) -> int:
    """Bytes of one side's ids: none where pair k is token k."""
    return 0 if ids.equal(torch.arange(len(ids), device=ids.device)) else len(ids) * ID_BYTES


def linear_floor(
    units: AlignedUnits,
    shared: SharedVocabulary,
    student: tuple[int, int],  # V, H
    teacher: tuple[int, int],
    *,
    student_bytes: int = 2,  # of one hidden state's or weight's element
    teacher_bytes: int = 2,
    options: LossOptions | None = None,
    trained: bool = True,  # whether the student's head needs a gradient
) -> dict[str, Cost]:
    """`linear_simct_loss` by product: "student", "teacher", and with what needs a gradient "hidden" and "head"."""
    options = options or LossOptions()
    (student_v, student_h), (teacher_v, teacher_h) = student, teacher
    of_student, of_teacher = (needed(units, shared, side, options) for side in ("student", "teacher"))
    k = len(shared) if options.top_k is None else min(options.top_k, len(shared))

    def head_rows(side: Needed, vocabulary: int) -> int:
        return vocabulary if side.whole else len(shared)

    student_rows, teacher_rows = len(units.student_tokens), len(units.teacher_tokens)
    student_weights = head_rows(of_student, student_v) * student_h
    teacher_weights = head_rows(of_teacher, teacher_v) * teacher_h
    scored = PRODUCT * of_student.elements(len(shared), student_v) * student_h
    # The gradient reaches all candidates, and through a log-sum-exp the whole vocabulary: as many columns as were scored,
    # but k where only k were chosen.
    kept = PRODUCT * of_student.elements(k, student_v) * student_h
    floor = {
        "student": Cost((student_rows * student_h + student_weights) * student_bytes, 0, scored),
        "teacher": Cost(
            (teacher_rows * teacher_h + teacher_weights) * teacher_bytes,
            0,
            PRODUCT * of_teacher.elements(k, teacher_v) * teacher_h,
        ),
        "hidden": Cost(0, student_rows * student_h * student_bytes, kept),
    }
    if trained:
        floor["head"] = Cost(0, student_v * student_h * student_bytes, kept)
    return floor


def served_floor(
    units: AlignedUnits, shared: SharedVocabulary, student: tuple[int, int], k: int, *, student_bytes: int = 2
) -> dict[str, Cost]:
    """`topk_simct_loss` by product: k columns a unit, whole rows for the log-sum-exps of longer ones."""
    vocabulary, width = student
    side = needed(units, shared, "student", LossOptions())
    flops = PRODUCT * side.elements(k, vocabulary) * width
    rows = len(units.student_tokens) * width * student_bytes
    head = vocabulary * width * student_bytes
    return {
        "student": Cost(rows + head, 0, flops),
        "hidden": Cost(0, rows, flops),
        "head": Cost(0, head, flops),
    }


def materialised_flops(
    student_rows: int, teacher_rows: int, student: tuple[int, int], teacher: tuple[int, int]
) -> dict[str, int]:
    """The products of whole logits on both sides, with both gradients of the student's."""
    one = PRODUCT * student_rows * student[0] * student[1]
    return {
        "student": one,
        "teacher": PRODUCT * teacher_rows * teacher[0] * teacher[1],
        "hidden": one,
        "head": one,
    }


def total(costs: dict[str, Cost]) -> Cost:
    return sum(costs.values(), Cost())
