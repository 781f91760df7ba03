"""The gradient by hidden states and head without stored logits: tiles are multiplied again, negligible ones skipped.

Let g_ij be the derivative of the losses by row i's raw product with head row j before the unit's weight w_i. A tile of
rows and columns is skipped only if |g_ij| <= threshold for all of its live rows and columns. What is skipped of a row's
hidden gradient is sum_j w_i g_ij W_j, and of a head row's gradient sum_i w_i g_ij h_i, over skipped pairs, so by the
triangle inequality

    |error of dHidden_i|  <=  threshold * |w_i| * sum of |W_j| over the columns j skipped for i,
    |error of dWeight_j|  <=  threshold * sum of |w_i| |h_i| over the rows i skipped for j.

By default threshold = u / C with C the columns of the launch and u the unit roundoff of the operands' dtype (2^-8 bf16,
2^-11 fp16, 2^-24 fp32). A row then loses at most u in the sum of its |g_ij|: no more than the rounding of one
coefficient of size 1 to that dtype, and the error of dHidden_i is at most u |w_i| max_j |W_j|. Threshold 0 is exact.

Tiles are told twice. Before any product, from the extremes that the forward left of every row and tile: with q the
largest student probability of the tile, p the teacher's largest or least (forward or reverse KL), L the loss's KL,

    beta = 0:  |q_j - p_j|                       <=  max(q, p)
    beta = 1:  q_j |log q_j - log p_j - L|       <=  q (|log q| + |log p| + |L|)            where q <= 1/e
    between:   (1 - beta) q_j |log(q_j/m_j) - L| <=  (1 - beta) q (|log q| - log(1 - beta) + |L|)  where q <= 1/e

for x |log x| rises up to 1/e, p_j lies between the tile's least and 1, and (1 - beta) q_j <= m_j <= 1; q > 1/e bounds
nothing. The slope of the head is at most |scale|, for the soft-cap's is at most 1. And again from the tile itself,
before the two gradient products. Bounds and gradients are float32: they hold up to its rounding.

Gradients are added up by atomics, whose order, so the last bits, may differ between runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import LossOptions
from .candidates import Units, mode_of
from .fused import Projection, candidate_tiles, columns_at, load_state, logit_tile, shape_of
from .fused_losses import FusedCandidates
from .scores import FORWARD, REVERSE, score_gradient


@triton.jit
def add_products(
    hidden_gradient,  # float32 [N, H] or None
    weight_gradient,  # float32 [V, H] or None
    bias_gradient,  # float32 [V] or None
    gradient,  # float32 [ROWS, BLOCK], by the raw products; 0 where masked
    hidden,  # [N, H]
    hidden_stride,
    weight,  # [V, H]
    weight_stride,
    width,  # H
    rows,  # int64 [ROWS]
    row_mask,
    columns,  # int32 [BLOCK]
    column_mask,
    OPERAND: tl.constexpr,
    DEPTH: tl.constexpr,
):
    columns = columns.to(tl.int64)
    if bias_gradient is not None:
        tl.atomic_add(bias_gradient + columns, tl.sum(gradient, 0), mask=column_mask, sem="relaxed")
    depth = tl.arange(0, DEPTH)
    g = gradient.to(OPERAND)
    for start in range(0, width, DEPTH):
        place = start + depth
        inside = place < width
        if hidden_gradient is not None:
            mask = column_mask[:, None] & inside[None, :]
            w = tl.load(weight + columns[:, None] * weight_stride + place[None, :], mask=mask, other=0.0)
            change = tl.dot(g, w.to(OPERAND), input_precision="ieee")
            pointers = hidden_gradient + rows[:, None] * width + place[None, :]
            tl.atomic_add(pointers, change, mask=row_mask[:, None] & inside[None, :], sem="relaxed")
        if weight_gradient is not None:
            mask = row_mask[:, None] & inside[None, :]
            x = tl.load(hidden + rows[:, None] * hidden_stride + place[None, :], mask=mask, other=0.0)
            change = tl.dot(tl.trans(g), x.to(OPERAND), input_precision="ieee")
            pointers = weight_gradient + columns[:, None] * width + place[None, :]
            tl.atomic_add(pointers, change, mask=column_mask[:, None] & inside[None, :], sem="relaxed")


@triton.jit
def head_slope(gradient, z, scale, softcap):
    """The gradient by the raw products, from that by the logits z."""
    if scale is not None:
        gradient *= scale
    if softcap is not None:
        gradient *= 1 - (z / softcap) * (z / softcap)
    return gradient


@triton.jit
def score_bound(log_q, log_p, kl, beta, MODE: tl.constexpr):
    """What |score_gradient| cannot pass in a tile: see this file's docstring."""
    q = tl.exp(log_q)
    if MODE == FORWARD:
        p = tl.exp(log_p)
        bound = tl.where(p > q, p, q) + 0.0 * kl  # NaN of a NaN unit, which skips nothing
    else:
        if MODE == REVERSE:
            bound = q * (tl.abs(log_q) + tl.abs(log_p) + tl.abs(kl))
        else:
            bound = (1 - beta) * q * (tl.abs(log_q) - tl.log(1 - beta) + tl.abs(kl))
        bound = tl.where(log_q <= -1, bound, float("inf"))
        bound = tl.where(log_q == -float("inf"), 0.0 * kl, bound)
    return bound


@triton.jit
def any_above(values, limit, mask):
    """Whether any of the values [ROWS] or [ROWS, BLOCK] is above the limit, or NaN."""
    return tl.max(tl.ravel((mask & ~(values <= limit)).to(tl.int32)), 0) != 0


@triton.jit
def fused_gradient_kernel(
    hidden_gradient,  # float32 [N_s, H_s] or None
    weight_gradient,  # float32 [V_s, H_s] or None
    bias_gradient,  # float32 [V_s] or None
    extremes,  # float32 [2, tiles, G], of fused_statistics_kernel
    student,  # [N_s, H_s], and so on: see Projection
    student_stride,
    student_weight,
    student_weight_stride,
    student_width,
    student_bias,
    student_scale,
    student_softcap,
    student_ids,  # int32 [K] or None
    student_rows,  # int64 [G]
    teacher,  # [N_t, H_t], and so on
    teacher_stride,
    teacher_weight,
    teacher_weight_stride,
    teacher_width,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_ids,  # int32 [K] or None
    teacher_rows,  # int64 [G]
    left_out,  # bool [G, K] or None
    state,  # float32 [10, G]: see Units
    weights,  # float32 [G], what each unit's gradient is multiplied by
    threshold,
    count,  # G
    size,  # K
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What the shared candidates' scores add, at each unit's first row."""
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_units = unit < count
    weight = tl.load(weights + unit, mask=inside_units, other=0.0)
    live = weight != 0  # a dropped unit's gradient is 0 even where it would be NaN
    kl = load_state(state, 5, unit, count, live)
    student_log = load_state(state, 2, unit, count, live)
    student_max = load_state(state, 1, unit, count, live)
    teacher_log = load_state(state, 4, unit, count, live)
    teacher_max = load_state(state, 3, unit, count, live)

    tile = tl.program_id(1)
    place = extremes + tl.cast(tile, tl.int64) * count + unit
    top = tl.load(place, mask=live, other=0.0)[:, None] - student_max - student_log
    other = top
    if MODE == FORWARD or MODE == REVERSE:
        place += tl.num_programs(1).to(tl.int64) * count
        other = tl.load(place, mask=live, other=0.0)[:, None] - teacher_max - teacher_log
    bound = score_bound(top, other, kl, beta, MODE) * inverse_temperature
    if student_scale is not None:
        bound *= tl.abs(student_scale)
    if any_above(bound, threshold, live[:, None]):
        index = tile * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        student_row = tl.load(student_rows + unit, mask=live, other=0)
        s, t, keep = candidate_tiles(
            student,
            student_stride,
            student_weight,
            student_weight_stride,
            student_width,
            student_bias,
            student_scale,
            student_softcap,
            student_ids,
            student_row,
            teacher,
            teacher_stride,
            teacher_weight,
            teacher_weight_stride,
            teacher_width,
            teacher_bias,
            teacher_scale,
            teacher_softcap,
            teacher_ids,
            tl.load(teacher_rows + unit, mask=live, other=0),
            left_out,
            unit,
            live,
            index,
            size,
            STUDENT,
            TEACHER,
            ROWS,
            BLOCK,
            DEPTH,
        )
        log_q = s * inverse_temperature - student_max - student_log
        log_p = t * inverse_temperature - teacher_max - teacher_log
        gradient = score_gradient(log_q, log_p, kl, beta, MODE) * inverse_temperature
        gradient = tl.where(keep, head_slope(gradient, s, student_scale, student_softcap), 0.0)
        if any_above(tl.abs(gradient), threshold, keep):
            add_products(
                hidden_gradient,
                weight_gradient,
                bias_gradient,
                tl.where(keep, gradient * weight[:, None], 0.0),
                student,
                student_stride,
                student_weight,
                student_weight_stride,
                student_width,
                student_row,
                live,
                columns_at(student_ids, index, inside),
                inside,
                STUDENT,
                DEPTH,
            )


@triton.jit
def fused_logsumexp_gradient_kernel(
    hidden_gradient,  # float32 [N, H] or None
    weight_gradient,  # float32 [V, H] or None
    bias_gradient,  # float32 [V] or None
    largest,  # float32 [tiles, R], of fused_logsumexp_kernel
    hidden,  # [N, H], and so on: see Projection
    hidden_stride,
    weight,
    weight_stride,
    width,
    bias,
    scale,
    softcap,
    rows,  # int64 [R]
    logsumexp,  # float32 [R]
    factors,  # float32 [R], the losses' derivative by each log-sum-exp before weights
    weights,  # float32 [R]
    threshold,
    count,  # R
    columns,  # V
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What log-sum-exps of whole rows add: factor times the row's softmax."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_rows = place < count
    row_weight = tl.load(weights + place, mask=inside_rows, other=0.0)
    live = row_weight != 0
    factor = tl.load(factors + place, mask=live, other=0.0)[:, None]
    normaliser = tl.load(logsumexp + place, mask=live, other=0.0)[:, None]
    tile = tl.program_id(1)
    wanted = live[:, None] & (factor != 0)
    top = tl.load(largest + tl.cast(tile, tl.int64) * count + place, mask=live, other=0.0)[:, None]
    bound = tl.exp(top - normaliser) * tl.abs(factor)
    if scale is not None:
        bound *= tl.abs(scale)
    if any_above(bound, threshold, wanted):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        row = tl.load(rows + place, mask=live, other=0)
        z = logit_tile(
            hidden,
            hidden_stride,
            weight,
            weight_stride,
            width,
            bias,
            scale,
            softcap,
            row,
            live,
            column,
            inside,
            OPERAND,
            ROWS,
            BLOCK,
            DEPTH,
        )
        keep = wanted & inside[None, :]
        gradient = head_slope(tl.exp(z - normaliser) * factor, z, scale, softcap)
        gradient = tl.where(keep, gradient, 0.0)
        if any_above(tl.abs(gradient), threshold, keep):
            add_products(
                hidden_gradient,
                weight_gradient,
                bias_gradient,
                tl.where(keep, gradient * row_weight[:, None], 0.0),
                hidden,
                hidden_stride,
                weight,
                weight_stride,
                width,
                row,
                live,
                column,
                inside,
                OPERAND,
                DEPTH,
            )


def default_threshold(
    dtype: torch.dtype,  # of the operands
    columns: int,
) -> float:
    """See this file's docstring."""
    return torch.finfo(dtype).eps / 2 / columns


def add_candidates_gradient(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],  # float32 [N, H], [V, H], [V]
    extremes: Tensor,  # float32 [2, tiles, G]
    candidates: FusedCandidates,
    units: Units,
    weights: Tensor,  # float32 [G]
    threshold: float | None,
    options: LossOptions,
) -> None:
    """Adds what the shared candidates' scores give to the gradients of hidden states, weight and bias."""
    student = candidates.student
    shape = shape_of("gradient", student, candidates.teacher)
    count = len(weights)
    if threshold is None:
        threshold = default_threshold(student.dtype, candidates.size)
    fused_gradient_kernel[triton.cdiv(count, shape.rows), extremes.shape[1]](
        *gradients,
        extremes,
        *candidates.arguments(),
        units.state,
        weights,
        float(threshold),
        count,
        candidates.size,
        1 / options.temperature,
        float(options.beta),
        MODE=mode_of(options.beta),
        STUDENT=student.operand,
        TEACHER=candidates.teacher.operand,
        **shape.options(),
    )


def add_logsumexp_gradient(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],  # float32 [N, H], [V, H], [V]
    largest: Tensor,  # float32 [tiles, R]
    side: Projection,
    rows: Tensor,  # int64 [R]
    logsumexp: Tensor,  # float32 [R]
    factors: Tensor,  # float32 [R]
    weights: Tensor,  # float32 [R]
    threshold: float | None,
) -> None:
    """Adds what the rows' log-sum-exps give, each multiplied by its factor and weight."""
    shape = shape_of("gradient", side)
    count, columns = len(rows), side.weight.shape[0]
    if threshold is None:
        threshold = default_threshold(side.dtype, columns)
    fused_logsumexp_gradient_kernel[triton.cdiv(count, shape.rows), largest.shape[0]](
        *gradients,
        largest,
        *side.arguments(),
        rows,
        logsumexp,
        factors,
        weights,
        float(threshold),
        count,
        columns,
        OPERAND=side.operand,
        **shape.options(),
    )
