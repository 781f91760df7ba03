"""Everything that the losses read of the logits, in one launch: `forward_kernel`.

Its programs are of three kinds, which do not wait for each other: candidate statistics of a few units, over the K shared
columns of both sides; and, for each side, log-sum-exps of the rows that longer units read whole. The first row of such a
unit is read over its unshared columns only, because the candidates' statistics hold the sum over the shared ones: each
logit is read once. Rows and columns are split over programs where there are few. `finish.py` puts the parts together.

Long rows come first in the grid, so that the last programs to run are many and small.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simct_kernels.triton_backend.rows import logsumexp_of
from simct_kernels.triton_backend.scores import (
    FORWARD,
    MIXED,
    add_sums,
    finite_max,
    kl_terms,
    load_logits,
    log_mixture,
    merge,
    summarise,
)


@triton.jit
def forward_kernel(
    partial,  # float32 [5 or 10, splits, G]: see _candidate_pass
    student_partial,  # float32 [splits, N_s], the log-sum-exps of _row_pass
    teacher_partial,  # float32 [splits, N_t]
    student,  # [N_s, W_s], and so on: see Side
    student_row_stride,
    student_column_stride,
    student_bias,
    student_scale,
    student_softcap,
    student_ids,  # int32 [K] or None
    student_rest,  # int32 [W_s - K], the columns that are not shared; None: those from K on
    student_rows,  # int64 [G], the row of each unit's candidates
    student_unit,  # int64 [N_s], the unit of each row, -1 for none; None: no row is read whole
    student_length,  # int64 [G]
    student_count,  # N_s
    student_width,  # W_s
    student_splits,  # of its rows; 0: no row of it is read whole
    student_tiles,  # of a split
    teacher,  # [N_t, W_t], and so on
    teacher_row_stride,
    teacher_column_stride,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_ids,
    teacher_rest,
    teacher_rows,
    teacher_unit,
    teacher_length,
    teacher_count,
    teacher_width,
    teacher_splits,
    teacher_tiles,
    left_out,  # bool [any, K] or None
    left_out_rows,  # int64 [G], each unit's row of left_out, -1 for none
    state,  # float32 [10, G], of finish_kernel, for the second pass of MIXED; else None
    count,  # G
    size,  # K
    splits,  # of the K columns
    candidate_tiles,  # of a split
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    SUMS: tl.constexpr,  # whether the sums over all shared columns are kept apart from the softmaxes'
    LONGER: tl.constexpr,  # whether the rows of longer units are read whole
    FIRST: tl.constexpr,  # whether the teacher's first rows all are
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    student_programs = student_count * student_splits
    row_programs = student_programs + teacher_count * teacher_splits
    if student_unit is not None:
        if program < student_programs:
            _row_pass(
                student_partial,
                student,
                student_row_stride,
                student_column_stride,
                student_bias,
                student_scale,
                student_softcap,
                student_rest,
                student_rows,
                student_unit,
                student_length,
                program // student_splits,
                program % student_splits,
                student_count,
                student_width,
                size,
                student_tiles,
                LONGER,
                False,
                ROW_BLOCK,
            )
    if teacher_unit is not None:
        if (program >= student_programs) & (program < row_programs):
            place = program - student_programs
            _row_pass(
                teacher_partial,
                teacher,
                teacher_row_stride,
                teacher_column_stride,
                teacher_bias,
                teacher_scale,
                teacher_softcap,
                teacher_rest,
                teacher_rows,
                teacher_unit,
                teacher_length,
                place // teacher_splits,
                place % teacher_splits,
                teacher_count,
                teacher_width,
                size,
                teacher_tiles,
                LONGER,
                FIRST,
                ROW_BLOCK,
            )
    if program >= row_programs:
        place = program - row_programs
        _candidate_pass(
            partial,
            student,
            student_row_stride,
            student_column_stride,
            student_bias,
            student_scale,
            student_softcap,
            student_ids,
            student_rows,
            teacher,
            teacher_row_stride,
            teacher_column_stride,
            teacher_bias,
            teacher_scale,
            teacher_softcap,
            teacher_ids,
            teacher_rows,
            left_out,
            left_out_rows,
            state,
            place // splits,
            place % splits,
            count,
            size,
            splits,
            candidate_tiles,
            inverse_temperature,
            beta,
            MODE,
            SUMS,
            ROWS,
            BLOCK,
        )


@triton.jit
def _row_pass(
    out,  # float32 [splits, N]
    values,
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    rest,
    first_rows,
    row_unit,
    lengths,
    place,
    split,
    count,  # N
    width,  # W
    size,  # K
    tiles_each,
    LONGER: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's log-sum-exp over one split of the columns that it must read: all, the unshared, or none (-inf)."""
    row = place.to(tl.int64)
    unit = tl.load(row_unit + row)
    first = tl.load(first_rows + unit, mask=unit >= 0, other=-1) == row
    wanted = unit < -1
    if LONGER:
        wanted = tl.load(lengths + unit, mask=unit >= 0, other=0) > 1
    if FIRST:
        wanted = wanted | first
    begin = split * tiles_each * BLOCK
    result = -float("inf")
    if wanted:
        if first:
            end = tl.minimum(begin + tiles_each * BLOCK, width - size)
            if rest is None:
                begin, end = begin + size, end + size
            result = logsumexp_of(values, row_stride, column_stride, bias, scale, softcap, rest, row, begin, end, BLOCK)
        else:
            end = tl.minimum(begin + tiles_each * BLOCK, width)
            result = logsumexp_of(values, row_stride, column_stride, bias, scale, softcap, None, row, begin, end, BLOCK)
    tl.store(out + split * count + row, result)


@triton.jit
def _candidate_pass(
    out,
    student,
    student_row_stride,
    student_column_stride,
    student_bias,
    student_scale,
    student_softcap,
    student_ids,
    student_rows,
    teacher,
    teacher_row_stride,
    teacher_column_stride,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_ids,
    teacher_rows,
    left_out,
    left_out_rows,
    state,
    place,
    split,
    count,
    size,
    splits,
    tiles_each,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A few units' statistics over one split of the shared columns, without the continuation.

    out[:5] is what `summarise` gives, and with SUMS out[5:] each side's maximum and sum of exp(z - maximum) at temperature
    1 over all shared columns, then the teacher's sum without what is left out. With `state`: out[0] and out[1] are the
    unit's terms of the generalised JSD's two KLs.
    """
    unit = place * ROWS + tl.arange(0, ROWS)
    inside_units = unit < count
    student_row = tl.load(student_rows + unit, mask=inside_units, other=0)[:, None]
    teacher_row = tl.load(teacher_rows + unit, mask=inside_units, other=0)[:, None]
    if left_out is not None:
        listed = tl.load(left_out_rows + unit, mask=inside_units, other=-1)[:, None]
    if state is not None:
        student_max = tl.load(state + count + unit, mask=inside_units, other=0.0)[:, None]
        student_log = tl.load(state + 2 * count + unit, mask=inside_units, other=0.0)[:, None]
        teacher_max = tl.load(state + 3 * count + unit, mask=inside_units, other=0.0)[:, None]
        teacher_log = tl.load(state + 4 * count + unit, mask=inside_units, other=0.0)[:, None]

    zero = tl.zeros([ROWS], tl.float32)
    low = zero - float("inf")
    m, u, a, n, v = low, zero, zero, low, zero
    student_top, student_sum, teacher_top, teacher_sum, kept_sum = low, zero, low, zero, zero
    begin = split * tiles_each * BLOCK
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
        if SUMS:
            s, t = tl.where(keep, s, -float("inf")), tl.where(keep, t, -float("inf"))
            student_top, student_sum, _ = _add_tile(student_top, student_sum, student_sum, s, s)
        if left_out is not None:
            where = left_out + listed * size + index
            keep = keep & (tl.load(where, mask=keep & (listed >= 0), other=0) == 0)
        if SUMS:
            teacher_top, teacher_sum, kept_sum = _add_tile(
                teacher_top, teacher_sum, kept_sum, t, tl.where(keep, t, -float("inf"))
            )
        s, t = tl.where(keep, s, -float("inf")), tl.where(keep, t, -float("inf"))
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

    out += split * count + unit
    field = splits * count
    if state is not None:
        tl.store(out, u, mask=inside_units)
        tl.store(out + field, a, mask=inside_units)
    else:
        tl.store(out, m, mask=inside_units)
        tl.store(out + field, u, mask=inside_units)
        tl.store(out + 2 * field, a, mask=inside_units)
        tl.store(out + 3 * field, n, mask=inside_units)
        tl.store(out + 4 * field, v, mask=inside_units)
    if SUMS:
        tl.store(out + 5 * field, student_top, mask=inside_units)
        tl.store(out + 6 * field, student_sum, mask=inside_units)
        tl.store(out + 7 * field, teacher_top, mask=inside_units)
        tl.store(out + 8 * field, teacher_sum, mask=inside_units)
        tl.store(out + 9 * field, kept_sum, mask=inside_units)


@triton.jit
def _add_tile(m, total, kept, z, z_kept):
    """Maximum, sum of exp(z - maximum) and the same of what is kept, with a tile [R, B] added."""
    tile_m = tl.max(z, 1)
    top = finite_max(tile_m)[:, None]
    _, kept = add_sums(m, kept, tile_m, tl.sum(tl.exp(z_kept - top), 1))
    m, total = add_sums(m, total, tile_m, tl.sum(tl.exp(z - top), 1))
    return m, total, kept
