"""A teacher's next-token distribution in the student's tokens, by byte prefixes, and the student's divergence from it.

A row's outcomes are the student tokens that something routes to and one residual class for all others: `Projection`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels.objectives.prefix_tables import PrefixTables
from simct_kernels.objectives.segments import expand, segment_logsumexp
from simct_kernels.torch_backend.rows import LinearRows, add_repeated


@dataclass(frozen=True)
class Projection:
    """What the teacher wants of the student in r rows."""

    mass: Tensor  # [r, V_s], 0 where nothing routes to
    rest: Tensor  # [r], the mass without a home
    routed: Tensor  # bool [r, V_s]

    def divergence(
        self,
        log_q: Tensor,  # [r, V_s], the student's log-softmax
    ) -> Tensor:  # [r]
        """KL(teacher || student) over the routed tokens and the residual class.

        Where the student has no token for the residual class, the class is left out: what remains of the teacher, `kept`, is
        normalised, and the row weighs as much as remains.
        """
        rest, log_rest = self._residual(log_q)
        kept = self.mass.sum(dim=1) + rest
        return _relative(self.mass, log_q).sum(dim=1) + _relative(rest, log_rest) - torch.xlogy(kept, kept)

    def gradient(self, log_q: Tensor) -> Tensor:
        """Of the divergence by the student's logits."""
        rest, log_rest = self._residual(log_q)
        kept = self.mass.sum(dim=1) + rest
        # The residual class's mass is asked of its tokens in the student's own proportions.
        raised = torch.where(rest == 0, -torch.inf, rest.log() - log_rest)
        asked = torch.where(self.routed, self.mass, (log_q + raised[:, None]).exp_())
        return log_q.exp().mul_(kept[:, None]).sub_(asked)

    def _residual(self, log_q: Tensor) -> tuple[Tensor, Tensor]:  # [r], [r]
        log_rest = log_q.masked_fill(self.routed, -torch.inf).logsumexp(dim=1)
        return self.rest.masked_fill(self.routed.all(dim=1), 0), log_rest


def _relative(p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is."""
    return (p.log() - log_q).mul_(p).masked_fill_(p == 0, 0)


class ProjectedTeacher:
    """The teacher's rows, seen through the tables. Nothing here has a gradient."""

    def __init__(self, teacher: LinearRows, tables: PrefixTables, temperature: float) -> None:
        self.teacher, self.tables, self.temperature = teacher, tables, temperature

    def scores(self, rows: Tensor) -> Tensor:
        """[r, V_t] logits, divided by the temperature."""
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            return self.teacher.whole(rows).div_(self.temperature)

    @torch.no_grad()
    def at_boundary(
        self,
        rows: Tensor,  # int64 [r], teacher rows
    ) -> Projection:
        """Nothing emitted yet: every teacher token goes to its home."""
        tables, count = self.tables, len(rows)
        probabilities = self.scores(rows).softmax(dim=1)
        total = probabilities.new_zeros(tables.student_size + 1, count)
        total = add_repeated(total, tables.home, probabilities.T.contiguous()).T.contiguous()
        return Projection(total[:, :-1], total[:, -1], tables.routed.expand(count, -1))

    @torch.no_grad()
    def inside(
        self,
        rows: Tensor,  # int64 [r], teacher rows
        tokens: Tensor,  # int64 [r], what they predict
        depths: Tensor,  # int64 [r], bytes of that token already emitted, at least 1
    ) -> Projection:
        """Given the bytes emitted: the longer tokens that start with them, renormalised, what follows in them routed home."""
        tables, count, columns = self.tables, len(rows), self.tables.student_size + 1
        place = tables.teacher_first[tokens] + depths
        owner, position = expand(tables.continued_begin[place], tables.continued_stop[place])
        continuing = tables.teacher_order[position]
        scores = self.scores(rows)[owner, continuing]
        probabilities = (scores - segment_logsumexp(scores, owner, count)[owner]).exp_()
        home = owner * columns + tables.suffix_home[tables.teacher_first[continuing] + depths[owner]]
        total = add_repeated(probabilities.new_zeros(count * columns), home, probabilities).view(count, columns)
        routed = torch.zeros(count * columns, dtype=torch.bool, device=rows.device)
        routed[home] = True
        return Projection(total[:, :-1], total[:, -1], routed.view(count, columns)[:, :-1])
