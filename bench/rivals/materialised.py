"""The algorithm as it is written down (Eq. 7 to 9): both sides' whole logits, vectorised over units, autograd's backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels import LMHead

from ..cases import Problem
from . import Method, only

NEVER = -1e30  # the score of a continuation that a unit does not have: finite, so that no difference is NaN


@dataclass(frozen=True)
class Side:
    """Where one side's units are found in its rows, which they fill in order."""

    start: Tensor  # int64 [G]
    length: Tensor  # int64 [G]
    tokens: Tensor  # int64 [N]
    unit: Tensor  # int64 [N], the unit of each row
    ids: Tensor  # int64 [K]


def side_of(problem: Problem, name: str) -> Side:
    start, length, tokens = (getattr(problem.units, f"{name}_{part}") for part in ("start", "length", "tokens"))
    unit = torch.repeat_interleave(torch.arange(len(start), device=start.device), length)
    return Side(start, length, tokens, unit, getattr(problem.shared, f"{name}_ids"))


def candidates(logits: Tensor, side: Side, continued: Tensor) -> Tensor:
    """Eq. 7 and 8: the log-probabilities [G, K + 1] of one side's candidates."""
    logprobs = log_softmax(logits)
    realised = logprobs.gather(1, side.tokens[:, None]).squeeze(1)
    continuation = realised.new_zeros(len(side.start)).index_add(0, side.unit, realised) / side.length
    continuation = torch.where(continued, continuation, NEVER)
    first = logprobs[side.start]
    # The faster way on each device: its backward is an index_add there, and an index_put here.
    shared = first.index_select(1, side.ids) if first.is_cuda else first[:, side.ids]
    return torch.cat([shared, continuation[:, None]], dim=1).log_softmax(1)


def whole_logits(head: LMHead, hidden: Tensor) -> Tensor:  # [N, V] from [N, H]
    """As a model writes them; a scale of 1 costs nothing."""
    logits = hidden @ head.weight.T
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def both_logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's: given, or from hidden states and heads."""
    if problem.case.form == "logits":
        return problem.student_logits, problem.teacher_logits
    with torch.no_grad():
        teacher = whole_logits(problem.teacher_head, problem.teacher_hidden)
    return whole_logits(problem.student_head, problem.student_hidden), teacher


def log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(1, dtype=torch.float32)  # casts within its pass


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum()


def loss(
    student_logits: Tensor, teacher_logits: Tensor, student: Side, teacher: Side, continued: Tensor | None
) -> Tensor:
    if continued is None:  # one vocabulary: ordinary distillation
        return reverse_kl(log_softmax(student_logits), log_softmax(teacher_logits))
    with torch.no_grad():
        by_teacher = candidates(teacher_logits, teacher, continued)
    return reverse_kl(candidates(student_logits, student, continued), by_teacher)


def prepare(problem: Problem, function: Callable[..., Tensor] = loss) -> Callable[[], Tensor]:
    sides = side_of(problem, "student"), side_of(problem, "teacher")
    continued = None if problem.case.one_vocabulary else problem.units.has_continuation(problem.shared)
    return lambda: function(*both_logits(problem), *sides, continued)


METHODS = [Method("materialised", prepare, only("linear", "logits", "text"))]
