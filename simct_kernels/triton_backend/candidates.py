"""Each unit's two softmaxes over its candidates, and their divergence: Eq. 8 and 9 without a stored probability.

`statistics_kernel` walks the K shared candidates of a few units, possibly split over programs where units are few;
`finish_kernel` merges the splits and the continuation. Forward and reverse KL take one such pair of launches, the
generalised JSD two (see MIXED). The gradient is a launch of its own and not a last pass of this one: the rows that the
programs of a GPU hold at once are larger than its L2 cache, so nothing would be read sooner for it, and a grid over rows
and columns balances better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import LossOptions
from . import tiles
from .scores import (
    FORWARD,
    MIXED,
    REVERSE,
    Side,
    kl_terms,
    load_logits,
    log_mixture,
    merge,
    score_gradient,
    summarise,
)


@triton.jit
def statistics_kernel(
    out,  # float32 [6, splits, G]: what `summarise` gives and the teacher's mass, or at the second pass the two KLs
    student,  # [N_s, W_s], and so on: see Side
    student_row_stride,
    student_column_stride,
    student_bias,
    student_scale,
    student_softcap,
    student_ids,  # int32 [K] or None
    student_rows,  # int64 [G], the row of each unit's candidates
    teacher,  # [N_t, W_t], and so on
    teacher_row_stride,
    teacher_column_stride,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_ids,  # int32 [K] or None
    teacher_rows,  # int64 [G]
    left_out,  # bool [any, K] or None
    left_out_rows,  # int64 [G], each unit's row of left_out, -1 for none
    teacher_logsumexp,  # float32 [N_t]; None: no mass is asked for
    state,  # float32 [8, G], of finish_kernel, for the second pass; else None
    count,  # G
    size,  # K
    tiles_each,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_units = unit < count
    student_row = tl.load(student_rows + unit, mask=inside_units, other=0)[:, None]
    teacher_row = tl.load(teacher_rows + unit, mask=inside_units, other=0)
    if left_out is not None:
        listed = tl.load(left_out_rows + unit, mask=inside_units, other=-1)[:, None]
    if teacher_logsumexp is not None:
        normaliser = tl.load(teacher_logsumexp + teacher_row, mask=inside_units, other=0.0)[:, None]
    teacher_row = teacher_row[:, None]
    if state is not None:
        student_max = tl.load(state + count + unit, mask=inside_units, other=0.0)[:, None]
        student_log = tl.load(state + 2 * count + unit, mask=inside_units, other=0.0)[:, None]
        teacher_max = tl.load(state + 3 * count + unit, mask=inside_units, other=0.0)[:, None]
        teacher_log = tl.load(state + 4 * count + unit, mask=inside_units, other=0.0)[:, None]

    zero = tl.zeros([ROWS], tl.float32)
    m, u, a, n, v, mass = zero - float("inf"), zero, zero, zero - float("inf"), zero, zero
    begin = tl.program_id(1) * tiles_each * BLOCK
    for start in range(begin, tl.minimum(begin + tiles_each * BLOCK, size), BLOCK):
        index = start + tl.arange(0, BLOCK)[None, :]
        inside = index < size
        mask = inside_units[:, None]
        student_columns, teacher_columns = index, index
        if student_ids is not None:
            student_columns = tl.load(student_ids + index, mask=inside, other=0)
        if teacher_ids is not None:
            teacher_columns = tl.load(teacher_ids + index, mask=inside, other=0)
        s = load_logits(
            student,
            student_row_stride,
            student_column_stride,
            student_bias,
            student_scale,
            student_softcap,
            student_row,
            student_columns,
            mask,
            inside,
        )
        t = load_logits(
            teacher,
            teacher_row_stride,
            teacher_column_stride,
            teacher_bias,
            teacher_scale,
            teacher_softcap,
            teacher_row,
            teacher_columns,
            mask,
            inside,
        )
        keep = inside & mask
        if left_out is not None:
            where = left_out + listed * size + index
            keep = keep & (tl.load(where, mask=keep & (listed >= 0), other=0) == 0)
        s, t = tl.where(keep, s, -float("inf")), tl.where(keep, t, -float("inf"))
        if teacher_logsumexp is not None:
            mass += tl.sum(tl.exp(t - normaliser), 1)
        s, t = s * inverse_temperature, t * inverse_temperature
        if state is not None:
            log_q, log_p = s - student_max - student_log, t - teacher_max - teacher_log
            log_m = log_mixture(log_q, log_p, beta)
            u += tl.sum(kl_terms(log_q, log_m), 1)
            a += tl.sum(kl_terms(log_p, log_m), 1)
        else:
            if MODE == FORWARD:
                s, t = t, s
            m2, u2, a2, n2, v2 = summarise(s, t, MODE != MIXED)
            m, u, a, n, v = merge(m, u, a, n, v, m2, u2, a2, n2, v2)

    place = out + tl.program_id(1) * count + unit
    field = tl.num_programs(1) * count
    tl.store(place + field, u, mask=inside_units)
    tl.store(place + 2 * field, a, mask=inside_units)
    if state is None:
        tl.store(place, m, mask=inside_units)
        tl.store(place + 3 * field, n, mask=inside_units)
        tl.store(place + 4 * field, v, mask=inside_units)
    if teacher_logsumexp is not None:
        tl.store(place + 5 * field, mass, mask=inside_units)


@triton.jit
def finish_kernel(
    out,  # float32 [8, G]: see Units
    partial,  # float32 [6, splits, G], of statistics_kernel
    student_continuation,  # float32 [G], -inf where there is none; None: no unit has one
    teacher_continuation,  # float32 [G]
    teacher_rows,  # int64 [G]
    teacher_logsumexp,  # float32 [N_t] or None
    mass_floor,
    count,  # G
    split_count,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    SECOND: tl.constexpr,
    UNITS: tl.constexpr,
):
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < count
    field = split_count * count
    zero = tl.zeros([UNITS], tl.float32)
    s, t = zero - float("inf"), zero - float("inf")
    if student_continuation is not None:
        raw = tl.load(teacher_continuation + unit, mask=inside, other=0.0)
        s = tl.load(student_continuation + unit, mask=inside, other=0.0) * inverse_temperature
        t = raw * inverse_temperature
    if SECOND:
        student_max = tl.load(out + count + unit, mask=inside, other=0.0)
        student_log = tl.load(out + 2 * count + unit, mask=inside, other=0.0)
        teacher_max = tl.load(out + 3 * count + unit, mask=inside, other=0.0)
        teacher_log = tl.load(out + 4 * count + unit, mask=inside, other=0.0)
        log_q, log_p = s - student_max - student_log, t - teacher_max - teacher_log
        log_m = log_mixture(log_q, log_p, beta)
        kl, other_kl = kl_terms(log_q, log_m), kl_terms(log_p, log_m)
        for split in range(split_count):
            place = partial + split * count + unit
            kl += tl.load(place + field, mask=inside, other=0.0)
            other_kl += tl.load(place + 2 * field, mask=inside, other=0.0)
        loss = (1 - beta) * kl + beta * other_kl
    else:
        x, y = s, t
        if MODE == FORWARD:
            x, y = t, s
        # The continuation as a set of one candidate. It is its own maximum: u and v are 1, and NaN if it is NaN.
        u = tl.where(x == -float("inf"), 0.0, 1.0 + 0.0 * x)
        v = tl.where(y == -float("inf"), 0.0, 1.0 + 0.0 * y)
        a = tl.where((y == -float("inf")) & (x != y), float("inf"), 0.0)
        m, n, mass = x, y, zero
        for split in range(split_count):
            place = partial + split * count + unit
            m2 = tl.load(place, mask=inside, other=0.0)
            u2 = tl.load(place + field, mask=inside, other=1.0)
            a2 = tl.load(place + 2 * field, mask=inside, other=0.0)
            n2 = tl.load(place + 3 * field, mask=inside, other=0.0)
            v2 = tl.load(place + 4 * field, mask=inside, other=1.0)
            m, u, a, n, v = merge(m, u, a, n, v, m2, u2, a2, n2, v2)
            if teacher_logsumexp is not None:
                mass += tl.load(place + 5 * field, mask=inside, other=0.0)
        # Maxima and logarithms stay apart: of logits of 1e4 their sum would keep three digits after the point.
        student_max, student_log, teacher_max, teacher_log = m, tl.log(u), n, tl.log(v)
        kl = a / u - student_log + teacher_log
        if MODE == FORWARD:
            student_max, student_log, teacher_max, teacher_log = teacher_max, teacher_log, student_max, student_log
        log_q, log_p = s - student_max - student_log, t - teacher_max - teacher_log
        kept = zero + 1
        loss = kl
        if teacher_logsumexp is not None:
            row = tl.load(teacher_rows + unit, mask=inside, other=0)
            normaliser = tl.load(teacher_logsumexp + row, mask=inside, other=0.0)
            if student_continuation is not None:
                mass += tl.exp(raw - normaliser)
            kept = tl.where(mass < mass_floor, 0.0, 1.0 + 0.0 * normaliser)  # NaN anywhere in the row stays NaN
        tl.store(out + count + unit, student_max, mask=inside)
        tl.store(out + 2 * count + unit, student_log, mask=inside)
        tl.store(out + 3 * count + unit, teacher_max, mask=inside)
        tl.store(out + 4 * count + unit, teacher_log, mask=inside)
        tl.store(out + 7 * count + unit, kept, mask=inside)
    if SECOND:
        kept = tl.load(out + 7 * count + unit, mask=inside, other=0.0)
    if MODE != MIXED or SECOND:
        tl.store(out + unit, tl.where(kept == 0, 0.0, loss * kept), mask=inside)
        tl.store(out + 5 * count + unit, kl, mask=inside)
        if student_continuation is not None:
            gradient = score_gradient(log_q, log_p, kl, beta, MODE) * inverse_temperature
            tl.store(out + 6 * count + unit, gradient, mask=inside)


@dataclass(frozen=True)
class Units:
    """What is known of G units once their candidates are counted.

    The rows of `state` are the losses; the maximum m and log(sum of e^(score - m)) over the candidates by temperature,
    the student's and the teacher's; KL(q || m), what `score_gradient` needs of it; and what the properties name.
    """

    state: Tensor  # float32 [8, G]

    @property
    def losses(self) -> Tensor:
        return self.state[0]

    @property
    def by_continuation(self) -> Tensor:  # [G], the loss's derivative by the student's continuation score
        return self.state[6]

    @property
    def kept(self) -> Tensor:  # [G], 0 where teacher_mass_floor drops the unit, else 1 (or NaN)
        return self.state[7]

    def weighted(self, weights: Tensor | None, values: Tensor) -> Tensor:
        """values [G] times weights [G] (None: 1) and `kept`, and 0 where either is 0, even of NaN."""
        factor = self.kept if weights is None else weights * self.kept
        dropped = self.kept == 0 if weights is None else (self.kept == 0) | (weights == 0)
        return torch.where(dropped, 0.0, factor * values)


@dataclass(frozen=True)
class Candidates:
    """The candidates of G units on both sides."""

    student: Side
    student_rows: Tensor  # int64 [G], the row of the unit's shared candidates
    teacher: Side
    teacher_rows: Tensor  # int64 [G]
    size: int  # K
    student_continuation: Tensor | None = None  # float32 [G], -inf where there is none
    teacher_continuation: Tensor | None = None  # float32 [G]
    left_out: Tensor | None = None  # bool [any, K]
    left_out_rows: Tensor | None = None  # int64 [G], -1 for none
    teacher_logsumexp: Tensor | None = None  # float32 [N_t], where teacher_mass_floor needs it


def mode_of(beta: float) -> int:
    return {0: FORWARD, 1: REVERSE}.get(beta, MIXED).value


def divergence(candidates: Candidates, options: LossOptions) -> Units:
    """The losses of all units, and what their gradient is made from."""
    count, device = len(candidates.student_rows), candidates.student_rows.device
    shape = tiles.tile("statistics", device)
    split_count, each = tiles.splits(count, candidates.size, shape, device)
    partial = torch.empty(6, split_count, count, dtype=torch.float32, device=device)
    units = Units(torch.zeros(8, count, dtype=torch.float32, device=device))
    mode = mode_of(options.beta)
    temperature = 1 / options.temperature
    for second in (False, True)[: 2 if mode == MIXED else 1]:
        mass = None if second else candidates.teacher_logsumexp
        statistics_kernel[triton.cdiv(count, shape.rows), split_count](
            partial,
            *candidates.student.arguments(),
            candidates.student.ids,
            candidates.student_rows,
            *candidates.teacher.arguments(),
            candidates.teacher.ids,
            candidates.teacher_rows,
            candidates.left_out,
            candidates.left_out_rows,
            mass,
            units.state if second else None,
            count,
            candidates.size,
            each,
            temperature,
            float(options.beta),
            MODE=mode,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.warps,
        )
        finish_kernel[(triton.cdiv(count, tiles.UNITS),)](
            units.state,
            partial,
            candidates.student_continuation,
            candidates.teacher_continuation,
            candidates.teacher_rows,
            mass,
            options.teacher_mass_floor,
            count,
            split_count,
            temperature,
            float(options.beta),
            MODE=mode,
            SECOND=second,
            UNITS=tiles.UNITS,
            num_warps=2,
        )
    return units
