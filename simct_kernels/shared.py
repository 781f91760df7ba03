"""What two vocabularies have in common: the candidates that do not depend on a unit's text.

Knows no tokenizer. Checked once, at construction: the checks read the data, so on a GPU they wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels.host import moved
from simct_kernels.values import check_device, check_least, check_vector, describe, is_dense, refuse_any


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """The K tokens that both vocabularies spell with the same bytes: pair k is (student_ids[k], teacher_ids[k]).

    Candidates that are a *sum* of ids are its classes (arXiv 2609.20511: all that ends a turn), few and small: rows (class, id)
    list the ids of each class on either side. A class's score is the log-sum-exp of their logits, after soft-cap and scale: with
    log-probabilities, the logarithm of their summed probability. A single unit whose two tokens are of one class is that
    candidate, and has no continuation.

    Raises ValueError for anything but int64 vectors of one length >= 1 on one device, without negative or repeated ids,
    student_ids ascending; for classes on one side only, or that are not int64 rows sorted by class, the same 0 to C - 1 on both
    sides, of ids that are in no pair and no other class.
    """

    student_ids: Tensor  # int64 [K], ascending, no duplicates
    teacher_ids: Tensor  # int64 [K], no duplicates
    student_classes: Tensor | None = None  # int64 [M_s, 2]
    teacher_classes: Tensor | None = None  # int64 [M_t, 2]

    def __post_init__(self) -> None:
        check_vector("student_ids", self.student_ids)
        check_vector("teacher_ids", self.teacher_ids, like=("student_ids", self.student_ids))
        if len(self) == 0:
            raise ValueError("student_ids is empty: the two vocabularies must share at least one token")
        check_least("student_ids", self.student_ids, 0)
        check_least("teacher_ids", self.teacher_ids, 0)
        refuse_any(
            "student_ids", self.student_ids[1:], self.student_ids.diff() <= 0, "must be ascending without duplicates"
        )
        ascending, order = self.teacher_ids.sort()
        refuse_any("teacher_ids", ascending[1:], ascending.diff() == 0, "must not repeat an id")
        # Where a teacher's id stands among the pairs is looked up in these: pair order[i] has id ascending[i].
        object.__setattr__(self, "ascending_teacher_ids", ascending)
        object.__setattr__(self, "teacher_order", order)
        # Kept as Python numbers, so that comparing them with a head's vocabulary never waits for a GPU.
        object.__setattr__(self, "max_student_id", int(self.student_ids[-1]))
        object.__setattr__(self, "max_teacher_id", int(ascending[-1]))
        object.__setattr__(self, "class_count", self._check_classes())

    def _check_classes(self) -> int:
        """Returns the number of classes."""
        count = 0
        object.__setattr__(self, "max_student_class_id", -1)
        object.__setattr__(self, "max_teacher_class_id", -1)
        for side, other in (("student", "teacher"), ("teacher", "student")):
            name, classes = f"{side}_classes", getattr(self, f"{side}_classes")
            if classes is None:
                if getattr(self, f"{other}_classes") is not None:
                    raise ValueError(f"{name} is None, but {other}_classes is given: expected both or neither")
                continue
            if not is_dense(classes) or classes.dtype != torch.int64 or classes.dim() != 2 or classes.shape[1] != 2:
                raise ValueError(f"{name} must be int64 [any, 2], got {describe(classes)}")
            check_device(name, classes, "student_ids", self.student_ids)
            if len(classes) == 0:
                raise ValueError(f"{name} is empty: expected rows (class, id), or None")
            check_least(name, classes, 0)
            numbers, ids = classes.T
            steps = numbers.diff(prepend=numbers.new_full((1,), -1))
            refuse_any(name, numbers, (steps < 0) | (steps > 1), "must be sorted by class, from 0 without a gap")
            ascending = ids.sort().values
            refuse_any(name, ascending[1:], ascending.diff() == 0, "must not repeat an id")
            paired = torch.isin(ids, getattr(self, f"{side}_ids"))
            refuse_any(name, ids, paired, f"must not hold an id of {side}_ids")
            if side == "teacher" and int(numbers[-1]) + 1 != count:
                raise ValueError(
                    f"teacher_classes has {int(numbers[-1]) + 1} classes, but student_classes has {count}: expected as many"
                )
            count = int(numbers[-1]) + 1
            object.__setattr__(self, f"max_{side}_class_id", int(ascending[-1]))
        return count

    def __len__(self) -> int:
        """K: the classes are not counted."""
        return self.student_ids.shape[0]

    def holds(self, student_token: Tensor, teacher_token: Tensor) -> Tensor:  # int64 [any], int64 [any] -> bool [any]
        """Whether two tokens are a shared pair, or of one class."""
        ids = self.student_ids, self.teacher_ids, self.student_classes, self.teacher_classes
        return is_candidate(student_token, teacher_token, *ids)

    def to(self, device: torch.device | str) -> SharedVocabulary:
        return moved(self, device)


def is_candidate(
    student_token: Tensor,  # int64 [any]
    teacher_token: Tensor,  # likewise
    student_ids: Tensor,
    teacher_ids: Tensor,
    student_classes: Tensor | None,
    teacher_classes: Tensor | None,
) -> Tensor:
    """bool: whether the two tokens are a shared pair, or of one class, of a SharedVocabulary with these fields."""
    index = torch.searchsorted(student_ids.contiguous(), student_token).clamp(max=len(student_ids) - 1)
    found = (student_ids[index] == student_token) & (teacher_ids[index] == teacher_token)
    if student_classes is None or teacher_classes is None:
        return found
    ours, theirs = _class_of(student_token, student_classes), _class_of(teacher_token, teacher_classes)
    return found | ((ours >= 0) & (ours == theirs))


def _class_of(token: Tensor, classes: Tensor) -> Tensor:
    """The class of each token, -1 for none."""
    return torch.where(token[:, None] == classes[:, 1], classes[:, 0], -1).amax(dim=1)
