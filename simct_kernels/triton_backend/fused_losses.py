"""Launches of `fused`: losses of units and log-sum-exps of rows, with no tensor of rows and columns but the extremes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import LossOptions
from . import tiles
from .candidates import Units, mode_of
from .fused import Projection, fused_logsumexp_kernel, fused_statistics_kernel, shape_of
from .scores import FORWARD, MIXED, kl_terms, log_mixture, merge, score_gradient


@triton.jit
def fused_finish_kernel(
    out,  # float32 [10, G]: the first 8 of candidates.Units
    partial,  # float32 [6, splits, G], of fused_statistics_kernel
    student_continuation,  # float32 [G]; None: no unit has one
    teacher_continuation,  # float32 [G]
    teacher_logsumexp,  # float32 [G] or None
    mass_floor,
    count,  # G
    split_count,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    SECOND: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Merges the splits and the continuation. At the second pass of the generalised JSD they are plain sums."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < count
    field = split_count * count
    zero = tl.zeros([UNITS], tl.float32)
    s, t = zero - float("inf"), zero - float("inf")
    if student_continuation is not None:
        s = tl.load(student_continuation + unit, mask=inside, other=0.0) * inverse_temperature
        t = tl.load(teacher_continuation + unit, mask=inside, other=0.0) * inverse_temperature
    m, u, a, n, v, mass = s, zero, zero, t, zero, zero
    if not SECOND:
        # A set of one candidate, its own maximum: u and v are 1, and NaN if it is NaN.
        u = tl.where(s == -float("inf"), 0.0, 1.0 + 0.0 * s)
        v = tl.where(t == -float("inf"), 0.0, 1.0 + 0.0 * t)
        if MODE == FORWARD:
            m, u, n, v = n, v, m, u
        a = tl.where((n == -float("inf")) & (m != n), float("inf"), 0.0)
    for split in range(split_count):
        place = partial + split * count + unit
        u2 = tl.load(place + field, mask=inside, other=1.0)
        a2 = tl.load(place + 2 * field, mask=inside, other=0.0)
        if SECOND:
            u += u2
            a += a2
        else:
            m2 = tl.load(place, mask=inside, other=0.0)
            n2 = tl.load(place + 3 * field, mask=inside, other=0.0)
            v2 = tl.load(place + 4 * field, mask=inside, other=1.0)
            m, u, a, n, v = merge(m, u, a, n, v, m2, u2, a2, n2, v2)
            if teacher_logsumexp is not None:
                mass += tl.load(place + 5 * field, mask=inside, other=0.0)
    if SECOND:
        student_max = tl.load(out + count + unit, mask=inside, other=0.0)
        student_log = tl.load(out + 2 * count + unit, mask=inside, other=0.0)
        teacher_max = tl.load(out + 3 * count + unit, mask=inside, other=0.0)
        teacher_log = tl.load(out + 4 * count + unit, mask=inside, other=0.0)
        kept = tl.load(out + 7 * count + unit, mask=inside, other=0.0)
    else:
        student_max, student_log, teacher_max, teacher_log = m, tl.log(u), n, tl.log(v)
        kl = a / u - student_log + teacher_log
        if MODE == FORWARD:
            student_max, student_log, teacher_max, teacher_log = teacher_max, teacher_log, student_max, student_log
        kept = zero + 1
        if teacher_logsumexp is not None:
            normaliser = tl.load(teacher_logsumexp + unit, mask=inside, other=0.0)
            if student_continuation is not None:
                mass += tl.exp(t / inverse_temperature - normaliser)
            kept = tl.where(mass < mass_floor, 0.0, 1.0 + 0.0 * normaliser)  # NaN anywhere in the row stays NaN
        tl.store(out + count + unit, student_max, mask=inside)
        tl.store(out + 2 * count + unit, student_log, mask=inside)
        tl.store(out + 3 * count + unit, teacher_max, mask=inside)
        tl.store(out + 4 * count + unit, teacher_log, mask=inside)
        tl.store(out + 7 * count + unit, kept, mask=inside)
    log_q, log_p = s - student_max - student_log, t - teacher_max - teacher_log
    if SECOND:
        log_m = log_mixture(log_q, log_p, beta)
        kl = u + kl_terms(log_q, log_m)
        loss = (1 - beta) * kl + beta * (a + kl_terms(log_p, log_m))
    elif MODE != MIXED:
        loss = kl
    if MODE != MIXED or SECOND:
        tl.store(out + unit, tl.where(kept == 0, 0.0, loss * kept), mask=inside)
        tl.store(out + 5 * count + unit, kl, mask=inside)
        if student_continuation is not None:
            gradient = score_gradient(log_q, log_p, kl, beta, MODE) * inverse_temperature
            tl.store(out + 6 * count + unit, gradient, mask=inside)


@dataclass(frozen=True)
class FusedCandidates:
    """The candidates of G units, whose shared logits are made tile by tile."""

    student: Projection
    student_rows: Tensor  # int64 [G], the row of the unit's shared candidates
    teacher: Projection
    teacher_rows: Tensor  # int64 [G]
    size: int  # K
    student_continuation: Tensor | None = None  # float32 [G]; None: no unit has one
    teacher_continuation: Tensor | None = None  # float32 [G]
    left_out: Tensor | None = None  # bool [G, K]
    teacher_logsumexp: Tensor | None = None  # float32 [G], where teacher_mass_floor needs it

    def arguments(self) -> tuple:
        """Of a kernel that makes both sides' tiles."""
        return (
            *self.student.arguments(),
            self.student.ids,
            self.student_rows,
            *self.teacher.arguments(),
            self.teacher.ids,
            self.teacher_rows,
            self.left_out,
        )


def fused_divergence(
    candidates: FusedCandidates, options: LossOptions, needs_grad: bool
) -> tuple[Units, Tensor | None]:
    """The losses of all units, and, if a gradient is to come, each tile's extreme scores [2, tiles, G].

    Extremes are the largest score of the student, and of the teacher the largest (beta = 0) or least (beta = 1).
    """
    count, device = len(candidates.student_rows), candidates.student_rows.device
    shape = shape_of("scores", candidates.student, candidates.teacher)
    split_count, each = tiles.splits(count, candidates.size, shape, device)
    extremes = None
    if needs_grad:
        extremes = torch.empty(2, triton.cdiv(candidates.size, shape.block), count, device=device)
    partial = torch.empty(6, split_count, count, device=device)
    units = Units(torch.zeros(10, count, device=device), None)
    mode = mode_of(options.beta)
    temperature = 1 / options.temperature
    for second in (False, True)[: 2 if mode == MIXED.value else 1]:
        mass = None if second else candidates.teacher_logsumexp
        fused_statistics_kernel[triton.cdiv(count, shape.rows), split_count](
            partial,
            None if second else extremes,
            *candidates.arguments(),
            mass,
            units.state if second else None,
            count,
            candidates.size,
            each,
            temperature,
            float(options.beta),
            MODE=mode,
            STUDENT=candidates.student.operand,
            TEACHER=candidates.teacher.operand,
            **shape.options(),
        )
        fused_finish_kernel[(triton.cdiv(count, tiles.UNITS),)](
            units.state,
            partial,
            candidates.student_continuation,
            candidates.teacher_continuation,
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
    return units, extremes


def fused_logsumexp(
    side: Projection,
    rows: Tensor,  # int64 [R]
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """float32 [R], over the whole vocabulary, and, if a gradient is to come, each tile's largest logit [tiles, R]."""
    count, columns = len(rows), side.weight.shape[0]
    shape = shape_of("scores", side)
    split_count, each = tiles.splits(count, columns, shape, rows.device)
    out = torch.empty(split_count, count, device=rows.device)
    largest = torch.empty(triton.cdiv(columns, shape.block), count, device=rows.device) if needs_grad else None
    fused_logsumexp_kernel[triton.cdiv(count, shape.rows), split_count](
        out, largest, *side.arguments(), rows, count, columns, each, OPERAND=side.operand, **shape.options()
    )
    return out[0] if split_count == 1 else out.logsumexp(0), largest
