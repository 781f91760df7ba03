"""ESCD, event-set completion (arXiv 2609.34738), on aligned units: BPM at the first row, a completion at the next."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from simct_kernels.checks import check_tables, check_tokens, check_unit_loss
from simct_kernels.inputs import AlignedUnits, LMHead
from simct_kernels.objectives.bpm import auto_prefix_rows
from simct_kernels.objectives.prefix_rows import ProjectedTeacher
from simct_kernels.objectives.prefix_tables import PrefixTables
from simct_kernels.objectives.row_function import over_rows
from simct_kernels.objectives.segments import SumByUnit, expand, reduce_units, segment_logsumexp, segment_sum
from simct_kernels.torch_backend.job import compute_dtype
from simct_kernels.torch_backend.rows import LinearRows
from simct_kernels.values import describe, is_dense


@torch.compiler.disable
def escd_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    tables: PrefixTables,
    response_lengths: Sequence[int],
    *,
    temperature: float = 1.0,
    reduction: str = "sum",
    chunk_rows: int | str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward KL of the teacher's distribution in the student's tokens at each unit's first row, and a completion at the next.

    At a unit's first row the loss is `bpm_loss`'s: each teacher token's probability goes to the longest student token that is a
    byte prefix of it, what has no home against the student's mass on all tokens that nothing routes to, nothing renormalised.

    Where the student's token `a` of that row is a strict byte prefix of teacher tokens that no one student token stands for,
    the teacher's mass on them is followed up. Those of which one is a prefix of the others are one group: M_g is their
    probability at the unit's first teacher row, y_g the shortest, r_g what y_g has after `a`. The student's next row, where `a`
    is read already, pays

        - sum over g of M_g log( sum of p_S(u) over the student tokens u that start with r_g ),

    p_S being its softmax over the whole vocabulary. Groups that no student token completes are left out: the sum over no token
    would make the loss infinite for every student.

    The next row is the next one of the response, be it in the same unit, in the next one or in none: what the teacher expected
    after `a` is known whatever the text does next. A response's last row has none. loss(unit) is the sum of both terms.
    Gradients go to student_hidden and the student head's weight and bias.

    Args:
        student_hidden, teacher_hidden: one row for each of `units`' student_tokens and teacher_tokens.
        tables: `PrefixTables.build` of both vocabularies, as many tokens as the heads have rows, on the units' device.
        response_lengths: student rows of each response, in the order in which they are packed; for one response [N_s].
        temperature: divides both sides' logits; the loss is not multiplied by it.
        reduction: "sum", "mean" over units, or "none" for [G].
        chunk_rows: how many rows of logits of either side exist at once. "auto": by memory.
        return_unit_losses: also return the units' losses [G], detached.

    Returns:
        The loss in float32 (float64 if any input is), or (loss, unit_losses). No unit gives a differentiable 0. A NaN that
        a unit reads, in its completion's row too, makes that unit's loss NaN. Double backward is refused.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, tables of other vocabularies, tokens outside a head's vocabulary,
            lengths that do not add up to the student's rows, an option out of its range.
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    options = (temperature, reduction, chunk_rows, return_unit_losses)
    student_head, teacher_head = check_unit_loss(*sides, units, *options)
    check_tables(tables, student_head, teacher_head, units)
    check_tokens("student_head", student_head, "student", units)
    last_rows = _last_rows(response_lengths, units)
    dtype = compute_dtype(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    if not isinstance(chunk_rows, int):
        chunk_rows = auto_prefix_rows(student_head, teacher_head, student_hidden.device)
    teacher = LinearRows(teacher_hidden, teacher_head, units.student_tokens.new_empty(0), dtype)

    tokens = units.student_tokens[units.student_start]
    completed = (tables.group_begin < tables.group_stop)[tokens] & ~torch.isin(units.student_start, last_rows)
    completed = completed.nonzero().squeeze(1)
    rows = torch.cat([units.student_start, units.student_start[completed] + 1])
    unit = torch.cat([torch.arange(len(units), device=rows.device), completed])
    function = _EventSets(
        ProjectedTeacher(teacher, tables, temperature), units.teacher_start[unit], tokens[unit], len(units)
    )
    sections = (len(units), len(completed))
    losses = over_rows(function, student_hidden, student_head, rows, step=chunk_rows, dtype=dtype, sections=sections)
    return reduce_units(SumByUnit.apply(losses, unit, len(units)), reduction, return_unit_losses)


def _last_rows(response_lengths: Sequence[int], units: AlignedUnits) -> Tensor:
    """int64 [responses]. A list is summed without the device; a tensor on it is read once."""
    given: object = response_lengths
    if isinstance(given, Tensor) and is_dense(given) and given.dim() == 1:
        given = given.tolist()
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ValueError(f"response_lengths must be the lengths of all responses, got {describe(given)}")
    lengths = list(given)
    if any(isinstance(length, bool) or not isinstance(length, Integral) or length < 0 for length in lengths):
        raise ValueError(f"response_lengths must be whole numbers of at least 0, got {lengths}")
    rows = len(units.student_tokens)
    if sum(lengths) != rows:
        raise ValueError(
            f"response_lengths add up to {sum(lengths)}, but units.student_tokens has {rows}: "
            "expected the student rows of each response"
        )
    return torch.tensor(lengths, dtype=torch.int64, device=units.student_start.device).cumsum(0) - 1


class _EventSets:
    """Of rows in two sections: the units' first ones, and the rows behind those that have a completion."""

    def __init__(
        self,
        teacher: ProjectedTeacher,
        teacher_rows: Tensor,  # int64 [R], the first row of each one's unit
        sampled: Tensor,  # int64 [R], the student's token there
        first_rows: int,
    ) -> None:
        self.teacher, self.rows, self.sampled, self.first_rows = teacher, teacher_rows, sampled, first_rows

    def value(self, logits: Tensor, part: slice) -> Tensor:
        scores = logits.div_(self.teacher.temperature)
        if part.start < self.first_rows:
            return self.teacher.at_boundary(self.rows[part]).divergence(scores.log_softmax(dim=1))
        sets = self._completions(scores, part)
        missed = scores.logsumexp(dim=1)[sets.row] - sets.log_sum
        return segment_sum((sets.mass * missed).masked_fill_(sets.mass == 0, 0), sets.row, len(scores))

    def gradient(self, logits: Tensor, part: slice) -> Tensor:
        scores = logits.div_(self.teacher.temperature)
        if part.start < self.first_rows:
            gradient = self.teacher.at_boundary(self.rows[part]).gradient(scores.log_softmax(dim=1))
            return gradient.div_(self.teacher.temperature)
        sets = self._completions(scores, part)
        asked = sets.mass[sets.group] * (sets.scores - sets.log_sum[sets.group]).exp_()
        gradient = scores.softmax(dim=1).mul_(segment_sum(sets.mass, sets.row, len(scores))[:, None])
        # No token completes two groups of a row: their remaining bytes are no prefixes of one another.
        gradient[sets.row[sets.group], sets.token] -= asked.masked_fill_(sets.mass[sets.group] == 0, 0)
        return gradient.div_(self.teacher.temperature)

    def _completions(self, scores: Tensor, part: slice) -> _Sets:
        tables, sampled = self.teacher.tables, self.sampled[part]
        row, group = expand(tables.group_begin[sampled], tables.group_stop[sampled])
        member_of, member = expand(tables.member_first[group], tables.member_first[group + 1])
        teacher = self.teacher.scores(self.rows[part])
        log_sum = teacher.logsumexp(dim=1)
        member_row = row[member_of]
        probabilities = (teacher[member_row, tables.members[member]] - log_sum[member_row]).exp_()
        mass = segment_sum(probabilities, member_of, len(group))
        token_of, place = expand(tables.completion_begin[group], tables.completion_stop[group])
        token = tables.student_order[place]
        completing = scores[row[token_of], token]
        return _Sets(row, mass, segment_logsumexp(completing, token_of, len(group)), token_of, token, completing)


class _Sets(NamedTuple):
    """The groups of a chunk's rows, and the student tokens that complete them."""

    row: Tensor  # int64 [groups], counted in the chunk
    mass: Tensor  # [groups], M_g
    log_sum: Tensor  # [groups], the log-sum-exp of the completing tokens' scores
    group: Tensor  # int64 [N], which group each completing token is of
    token: Tensor  # int64 [N]
    scores: Tensor  # [N]
