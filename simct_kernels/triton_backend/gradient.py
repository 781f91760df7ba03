"""The gradient by the student's logits, every element of which is written once, zeros included.

The programs of the same rows follow each other, for what `forward.py` says of the L2 cache. The student's rows are read in
full and in order, unshared columns too: they share their sectors with shared ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simct_kernels.options import LossOptions
from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.candidates import Candidates, Units, mode_of
from simct_kernels.triton_backend.columns import Tables
from simct_kernels.triton_backend.scores import exp, load_logits, score_gradient


@triton.jit(do_not_specialize=["count", "unit_count"])
def gradient_kernel(
    out,  # [N, W], contiguous columns; may be `student` itself
    out_row_stride,
    student,  # [N, W], and so on: see Side
    student_row_stride,
    student_column_stride,
    student_bias,
    student_scale,
    student_softcap,
    table,  # int32 [table_bound], see columns.Tables; None: column k is the teacher's column k
    table_bound,
    shared_index,  # int32 [W], likewise, needed with left_out
    row_unit,  # int64 [N], the unit that a row belongs to, -1 for none; None: row g is unit g's
    first_rows,  # int64 [G], the row of each unit's candidates; None: every row
    lengths,  # int64 [G], needed with tokens
    tokens,  # int64 [N], the column that a continuation's score reads; None: no such gradient falls in these columns
    has_continuation,  # bool or int64 [G], needed with tokens; None: all have
    logsumexp,  # float32 [N]; None: no score reads a row's log-sum-exp
    teacher,  # [N_t, W_t], and so on
    teacher_row_stride,
    teacher_column_stride,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_bound,  # see Side
    teacher_rows,  # int64 [G]
    left_out,  # bool [any, any >= K] or None
    left_out_width,
    left_out_rows,  # int64 [G]
    state,  # float32 [10, G]: see Units
    weights,  # float32 [G], what each unit's gradient is multiplied by
    count,  # N
    unit_count,  # G
    width,  # W
    size,  # K
    splits,  # of the W columns
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,  # tiles of a split
):
    place, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row = place.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_rows = row < count
    unit = row
    if row_unit is not None:
        unit = tl.load(row_unit + row, mask=inside_rows, other=-1)
    weight = tl.load(weights + unit, mask=inside_rows & (unit >= 0), other=0.0)
    live = inside_rows & (unit >= 0) & (weight != 0)  # a dropped unit's gradient is 0 even where it would be NaN
    first = live
    if first_rows is not None:
        first = live & (tl.load(first_rows + unit, mask=live, other=-1) == row)

    # What the continuation's score adds to its rows: by their own tokens' logits and by their log-sum-exps.
    if tokens is not None:
        continued = live
        if has_continuation is not None:
            continued = live & (tl.load(has_continuation + unit, mask=live, other=0) != 0)
        length = tl.load(lengths + unit, mask=continued, other=1)
        by_continuation = tl.load(state + 6 * unit_count + unit, mask=continued, other=0.0)
        by_target = by_continuation
        if not SUM:
            by_target = by_continuation / length.to(tl.float32)
        token = tl.load(tokens + row, mask=continued, other=-1)
    if logsumexp is not None:
        whole = continued & (length > 1)
        by_logsumexp = tl.where(whole, tl.where(first, by_continuation, 0.0) - by_target, 0.0)
        normaliser = tl.load(logsumexp + row, mask=whole, other=0.0)
    read = first
    if logsumexp is not None:
        read = read | whole
    if tokens is not None and student_softcap is not None:
        read = read | continued  # its token's slope is wanted, also where the row is not read whole
    teacher_row = tl.load(teacher_rows + unit, mask=first, other=0)[:, None]
    if left_out is not None:
        listed = tl.load(left_out_rows + unit, mask=first, other=-1)[:, None]
    student_max = tl.load(state + unit_count + unit, mask=first, other=0.0)[:, None]
    student_log = tl.load(state + 2 * unit_count + unit, mask=first, other=0.0)[:, None]
    teacher_max = tl.load(state + 3 * unit_count + unit, mask=first, other=0.0)[:, None]
    teacher_log = tl.load(state + 4 * unit_count + unit, mask=first, other=0.0)[:, None]
    kl = tl.load(state + 5 * unit_count + unit, mask=first, other=0.0)[:, None]

    for tile in range(EACH):
        column = (split * EACH + tile) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside_columns = column < width
        is_shared, teacher_column, teacher_inside = column < size, column, column < teacher_bound
        if table is not None:  # one look-up, not two that wait for each other: by shared token, then by column
            teacher_column = tl.load(table + column, mask=column < table_bound, other=-1)
            is_shared = teacher_column >= 0
            teacher_inside = is_shared
        chosen = first[:, None] & is_shared
        z = load_logits(
            student,
            student_row_stride,
            student_column_stride,
            student_bias,
            student_scale,
            student_softcap,
            row[:, None],
            column,
            read[:, None],
            inside_columns,
        )
        t = load_logits(
            teacher,
            teacher_row_stride,
            teacher_column_stride,
            teacher_bias,
            teacher_scale,
            teacher_softcap,
            teacher_row,
            teacher_column,
            first[:, None],
            teacher_inside,
        )
        if left_out is not None:
            index = column
            if shared_index is not None:
                index = tl.load(shared_index + column, mask=inside_columns, other=-1)
            left_out_inside = (listed >= 0) & (index < left_out_width) & (index >= 0)
            chosen = chosen & (tl.load(left_out + listed * left_out_width + index, mask=left_out_inside, other=0) == 0)

        log_q = z * inverse_temperature - student_max - student_log
        log_p = t * inverse_temperature - teacher_max - teacher_log
        gradient = tl.where(chosen, score_gradient(log_q, log_p, kl, beta, MODE) * inverse_temperature, 0.0)
        if logsumexp is not None:
            softmax = exp(z - normaliser[:, None]) * by_logsumexp[:, None]
            gradient += tl.where(by_logsumexp[:, None] == 0, 0.0, softmax)
        if tokens is not None:
            gradient += tl.where(column == token[:, None], by_target[:, None], 0.0)
        if student_scale is not None:
            gradient *= student_scale
        if student_softcap is not None:
            part = z * (1 / student_softcap)
            gradient *= tl.where(
                gradient == 0, 0.0, 1 - part * part
            )  # an unshared logit is read for nothing, even if it is NaN
        gradient = tl.where(live[:, None], gradient * weight[:, None], 0.0)
        pointers = out + row[:, None] * out_row_stride + column
        tl.store(pointers, gradient.to(out.dtype.element_ty), mask=inside_rows[:, None] & inside_columns)


def write_gradient(
    out: Tensor,  # [N, W]
    tables: Tables,  # of its columns
    candidates: Candidates,
    units: Units,
    weights: Tensor | None,  # [G]; None: 1
    options: LossOptions,
) -> None:
    """Writes the losses' gradient by the values of the student's side into `out`, which may be those values."""
    weights = units.weighted(weights, torch.ones_like(units.losses))
    student, teacher = candidates.student, candidates.teacher
    own = None if candidates.continues is False or student.targets is not None else student.tokens
    scattered = tables.teacher is not None
    shape = tiles.tile("gradient_scattered" if scattered else "gradient", out.device)
    splits = triton.cdiv(out.shape[1], shape.block * shape.each)
    gradient_kernel[(triton.cdiv(out.shape[0], shape.rows) * splits,)](
        out,
        out.stride(0),
        *student.side.arguments(),
        tables.teacher,
        0 if tables.teacher is None else len(tables.teacher),
        None if candidates.left_out is None else tables.shared,
        student.unit,
        None if student.unit is None else student.rows,
        student.length,
        own,
        candidates.has_continuation,
        units.student_logsumexp,
        *teacher.side.arguments(),
        teacher.side.bound,
        teacher.rows,
        candidates.left_out,
        0 if candidates.left_out is None else candidates.left_out.shape[1],
        candidates.left_out_rows,
        units.state,
        weights,
        *(out.shape[0], units.state.shape[1], out.shape[1], candidates.size, splits),
        1 / options.temperature,
        float(options.beta),
        MODE=mode_of(options.beta),
        SUM=options.score == "sum_logprob",
        ROWS=shape.rows,
        BLOCK=shape.block,
        EACH=shape.each,
        num_warps=shape.warps,
    )
