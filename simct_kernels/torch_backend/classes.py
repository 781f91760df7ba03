"""Candidates that are sums of ids, the classes of a SharedVocabulary: one side's few logits of them, a column for each id.

A candidate's index is its shared token's, or, from K on, K plus its class. An id of a class is in no shared column, and so a row's
log-sum-exp counts it once, with what is no candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels.host import on_host
from simct_kernels.shared import SharedVocabulary


@dataclass(frozen=True)
class Classes:
    """The C classes of one side."""

    ids: Tensor  # int64 [M], without repeats
    number: Tensor  # int64 [M], the class of each
    count: int  # C
    host_ids: list[int]  # the ids

    @classmethod
    def of(cls, shared: SharedVocabulary, side: str) -> Classes | None:
        rows = getattr(shared, f"{side}_classes")
        if rows is None:
            return None
        number, ids = (column.contiguous() for column in rows.T)
        return cls(ids, number, shared.class_count, on_host(rows)[:, 1].tolist())

    def logits(
        self,
        members: Tensor,  # [g, M], the ids' logits, or log-probabilities
    ) -> Tensor:
        """[g, C], of the classes: log-sum-exps, -inf of nothing but -inf."""
        if self.count == 1:
            return members.logsumexp(1, keepdim=True)
        belongs = self.number == torch.arange(self.count, device=members.device)[:, None]  # [C, M]
        return members[:, None].masked_fill(~belongs, -math.inf).logsumexp(2)

    def scores(self, members: Tensor, logsumexp: Tensor | None) -> ClassScores:
        """`members` [g, M]: their logits in the units' first rows, whose log-sum-exps [g] are taken off if given."""
        logits = self.logits(members)
        return ClassScores(self, members, logits, logits if logsumexp is None else logits - logsumexp[:, None])


@dataclass(frozen=True)
class ClassScores:
    """One side's scores of the classes, for g units."""

    classes: Classes
    members: Tensor  # [g, M], the ids' logits
    logits: Tensor  # [g, C]
    scores: Tensor  # [g, C], on the scale of the shared candidates' scores

    def by_members(
        self,
        by_class: Tensor,  # [g, C]
    ) -> Tensor:
        """The gradient by `members`, from that by the scores. 0 stays 0, even of NaN."""
        number = self.classes.number
        top = self.logits.masked_fill(self.logits == -math.inf, 0)[:, number]
        weight = by_class[:, number]
        return (self.members - top).exp_().mul_(weight).masked_fill_(weight == 0, 0)


def gather(
    shared: Tensor,  # [g, K], or [g, k] where `picked`
    classes: ClassScores | None,
    columns: Tensor,  # int64 [g, k], candidates
    size: int,  # K
    *,
    picked: bool = False,  # whether `shared` has these columns already, and anything where one is a class
) -> Tensor:
    """[g, k], the scores of these candidates."""
    if classes is None:
        return shared if picked else shared.gather(1, columns)
    if not picked:
        shared = shared.gather(1, columns.clamp(max=size - 1))
    return torch.where(columns < size, shared, classes.scores.gather(1, (columns - size).clamp_(min=0)))


def take_classes(
    by_column: Tensor,  # [g, k]; what is taken out of it becomes 0
    columns: Tensor,  # int64 [g, k], candidates
    size: int,  # K
    count: int,  # C
) -> tuple[Tensor, Tensor]:
    """The gradient by the classes [g, C], out of that by some candidates; and the columns, K - 1 for a class: one may come twice
    then, once with a gradient of 0."""
    is_class = columns >= size
    by_class = by_column.new_zeros(len(columns), count)
    by_class.scatter_add_(1, (columns - size).clamp_(min=0), by_column.masked_fill(~is_class, 0))
    by_column.masked_fill_(is_class, 0)
    return by_class, columns.clamp(max=size - 1)
