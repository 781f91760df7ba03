"""The structure of the authors' public code: whole logits on both sides and a Python loop over units.

The loop builds the candidates' matrix row by row, one extra column for every continuation of the sample: [units, K +
continuations]. Own writing, with the paper's scores, so that its loss is comparable; the rows are taken apart once, since
indexing the whole logits in the loop would make autograd add up a whole gradient for each unit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Problem
from . import Method, only
from .materialised import NEVER, both_logits, log_softmax, reverse_kl


def candidates(
    logits: Tensor,  # [N, V]
    units: list[tuple[int, int, int]],  # start, length, number of its continuation, -1 for none
    continuations: int,
    tokens: list[int],  # [N]
    ids: Tensor,  # int64 [K]
) -> Tensor:
    rows = log_softmax(logits).unbind(0)
    columns = torch.arange(continuations, device=logits.device)
    matrix = []
    for start, length, number in units:
        terms = [rows[row][tokens[row]] for row in range(start, start + length)]
        score = torch.stack(terms).mean()
        matrix.append(torch.cat([rows[start].index_select(0, ids), torch.where(columns == number, score, NEVER)]))
    return torch.stack(matrix).log_softmax(1)


def prepare(problem: Problem) -> Callable[[], Tensor]:
    units, shared = problem.units, problem.shared
    continued = units.has_continuation(shared)
    number = torch.where(continued, continued.cumsum(0) - 1, -1).tolist()
    count = int(continued.sum())
    lists = {
        side: list(
            zip(
                getattr(units, f"{side}_start").tolist(), getattr(units, f"{side}_length").tolist(), number, strict=True
            )
        )
        for side in ("student", "teacher")
    }

    tokens = {side: getattr(units, f"{side}_tokens").tolist() for side in lists}

    def call() -> Tensor:
        student, teacher = both_logits(problem)
        with torch.no_grad():
            p = candidates(teacher, lists["teacher"], count, tokens["teacher"], shared.teacher_ids)
        return reverse_kl(candidates(student, lists["student"], count, tokens["student"], shared.student_ids), p)

    return call


METHODS = [Method("loop over units", prepare, only("linear", "logits", "text"))]
