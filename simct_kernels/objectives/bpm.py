"""BPM, byte-prefix marginalisation (arXiv 2607.22334), on aligned units: no teacher token's probability is thrown away."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simct_kernels.checks import check_tables, check_tokens, check_unit_loss
from simct_kernels.inputs import AlignedUnits, LMHead
from simct_kernels.objectives.prefix_rows import ProjectedTeacher, Projection
from simct_kernels.objectives.prefix_tables import PrefixTables
from simct_kernels.objectives.row_function import over_rows
from simct_kernels.objectives.segments import SumByUnit, expand, reduce_units
from simct_kernels.torch_backend.job import compute_dtype
from simct_kernels.torch_backend.plan import auto_rows
from simct_kernels.torch_backend.rows import LinearRows


@torch.compiler.disable
def bpm_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    tables: PrefixTables,
    *,
    temperature: float = 1.0,
    reduction: str = "sum",
    chunk_rows: int | str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward KL from the teacher's distribution, in the student's tokens, to the student's, at every student row of each unit.

    A student row at byte b of its unit is compared with the unit's teacher row whose token begins at the latest boundary of
    the teacher's that is not behind b; the bytes between the two are *emitted* already. The teacher's distribution at that row
    becomes one over student tokens:

    1. Nothing emitted (a unit's first row, and any later one where both sides' tokens begin): every teacher token takes part. Its
       probability goes to its home, the longest student token whose bytes are a prefix of the token's. A special token goes where
       the tables' `special_routes` say.
    2. Something emitted: the teacher tokens that start with the emitted bytes and are longer take part, renormalised. Each one's
       probability goes to the home of the bytes that it has after the emitted ones. (The token that the teacher's row realises is
       one of them. A token equal to the emitted bytes is not: its row would end here, and the next one begin.)

    What goes to one student token is summed. What has no home goes to a *residual class*. On the student's side that class is
    its mass on all tokens that nothing routes to in this row, so that both sides are distributions over the same events, and
    equal ones cost nothing. (Our choice: what stands against the class on the student's side is not in our account of the
    method.) Where the student has no such token, the class, of teacher mass R, is left out and the row counts for less:
    loss(row) = (1 - R) KL( teacher / (1 - R) || student ). With two equal vocabularies without double spellings, and units of
    one token each, the loss is ordinary forward KL.

    loss(unit) is the sum over its student rows. Gradients go to student_hidden and the student head's weight and bias.

    Args:
        student_hidden, teacher_hidden: one row for each of `units`' student_tokens and teacher_tokens.
        tables: `PrefixTables.build` of both vocabularies, as many tokens as the heads have rows, on the units' device.
        temperature: divides both sides' logits; the loss is not multiplied by it.
        reduction: "sum", "mean" over units, or "none" for [G].
        chunk_rows: how many rows of logits of either side exist at once. "auto": by memory.
        return_unit_losses: also return the units' losses [G], detached.

    Returns:
        The loss in float32 (float64 if any input is), or (loss, unit_losses). No unit gives a differentiable 0. A NaN that
        a unit reads makes that unit's loss NaN, a token that only the student excludes makes it infinite. Double backward is
        refused.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, tables of other vocabularies, tokens outside a head's vocabulary, a
            unit of several student tokens that spells other bytes than its teacher tokens, an option out of its range.
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    options = (temperature, reduction, chunk_rows, return_unit_losses)
    student_head, teacher_head = check_unit_loss(*sides, units, *options)
    check_tables(tables, student_head, teacher_head, units)
    check_tokens("student_head", student_head, "student", units)
    check_tokens("teacher_head", teacher_head, "teacher", units)
    dtype = compute_dtype(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    if not isinstance(chunk_rows, int):
        chunk_rows = auto_prefix_rows(student_head, teacher_head, student_hidden.device)
    teacher = LinearRows(teacher_hidden, teacher_head, units.student_tokens.new_empty(0), dtype)
    plan = _plan(units, tables)
    function = _PrefixDivergence(ProjectedTeacher(teacher, tables, temperature), plan, units.teacher_tokens)
    sections = (plan.at_boundary, len(plan.unit) - plan.at_boundary)
    rows = plan.student_rows
    losses = over_rows(function, student_hidden, student_head, rows, step=chunk_rows, dtype=dtype, sections=sections)
    return reduce_units(SumByUnit.apply(losses, plan.unit, len(units)), reduction, return_unit_losses)


def auto_prefix_rows(student_head: LMHead, teacher_head: LMHead, device: torch.device) -> int:
    """Rows at a time: in the backward seven matrices of a chunk's size stand side by side."""
    return auto_rows(7 * max(student_head.weight.shape[0], teacher_head.weight.shape[0]), device)


class _Plan(NamedTuple):
    """The R student rows of all units, those with nothing emitted first: `at_boundary` of them."""

    student_rows: Tensor  # int64 [R]
    teacher_rows: Tensor  # int64 [R]
    depths: Tensor  # int64 [R], bytes emitted of the teacher row's token
    unit: Tensor  # int64 [R]
    at_boundary: int


def _plan(units: AlignedUnits, tables: PrefixTables) -> _Plan:
    longer = (units.student_length > 1).nonzero().squeeze(1)
    owner, student_rows = _rows_of(units, "student", longer)
    teacher_owner, teacher_rows = _rows_of(units, "teacher", longer)
    student_tokens, teacher_tokens = units.student_tokens[student_rows], units.teacher_tokens[teacher_rows]
    _check_texts(student_tokens, teacher_tokens, owner, teacher_owner, longer, tables)
    begin = _begins(tables.student_first, student_tokens)
    teacher_begin = _begins(tables.teacher_first, teacher_tokens)
    at = torch.searchsorted(teacher_begin, begin, right=True) - 1
    depths = begin - teacher_begin[at]

    later = student_rows != units.student_start[longer][owner]
    inner = depths > 0
    between = later & ~inner  # inside a unit that is not minimal
    zeros = depths.new_zeros(len(units) + int(between.sum()))
    return _Plan(
        torch.cat([units.student_start, student_rows[between], student_rows[inner]]),
        torch.cat([units.teacher_start, teacher_rows[at[between]], teacher_rows[at[inner]]]),
        torch.cat([zeros, depths[inner]]),
        torch.cat([torch.arange(len(units), device=owner.device), longer[owner[between]], longer[owner[inner]]]),
        len(zeros),
    )


def _rows_of(units: AlignedUnits, side: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of some units, one unit after the other, and before them which of the chosen units each is of."""
    start, length = (getattr(units, f"{side}_{part}")[chosen] for part in ("start", "length"))
    return expand(start, start + length)


def _begins(first: Tensor, tokens: Tensor) -> Tensor:
    """Where each token's bytes begin in the tokens' text."""
    length = first[tokens + 1] - first[tokens]
    return length.cumsum(0) - length


def _check_texts(student_tokens, teacher_tokens, owner, teacher_owner, longer: Tensor, tables: PrefixTables) -> None:
    """Which bytes are emitted is read from the teacher's token, so that the student's must be the same."""
    sides = []
    for side, tokens, unit in (("student", student_tokens, owner), ("teacher", teacher_tokens, teacher_owner)):
        first = getattr(tables, f"{side}_first")
        token, place = expand(first[tokens], first[tokens + 1])
        sides.append((unit[token], getattr(tables, f"{side}_text")[place]))
    (unit, text), (teacher_unit, teacher_text) = sides
    if unit.equal(teacher_unit) and text.equal(teacher_text):
        return
    differs = [u for u in range(len(longer)) if not text[unit == u].equal(teacher_text[teacher_unit == u])]
    unit_number = int(longer[differs[0]])
    raise ValueError(
        f"units: unit {unit_number} spells other bytes with its student tokens than with its teacher tokens"
    )


class _PrefixDivergence:
    """Of the student's rows from the projected teacher rows beside them in the plan."""

    def __init__(self, teacher: ProjectedTeacher, plan: _Plan, teacher_tokens: Tensor) -> None:
        self.teacher, self.plan, self.tokens = teacher, plan, teacher_tokens

    def value(self, logits: Tensor, part: slice) -> Tensor:
        return self._projection(part).divergence(self._log_q(logits))

    def gradient(self, logits: Tensor, part: slice) -> Tensor:
        return self._projection(part).gradient(self._log_q(logits)).div_(self.teacher.temperature)

    def _log_q(self, logits: Tensor) -> Tensor:
        return logits.div_(self.teacher.temperature).log_softmax(dim=1)

    def _projection(self, part: slice) -> Projection:
        rows = self.plan.teacher_rows[part]
        if part.start < self.plan.at_boundary:
            return self.teacher.at_boundary(rows)
        return self.teacher.inside(rows, self.tokens[rows], self.plan.depths[part])
