"""Statistics of each unit's candidates: `candidate_kernel`, which reads the K shared columns of both sides once.

A program takes a few units and a few tiles of columns, and the programs of the same units follow each other, so that the
rows that are being read stay in the L2 cache: the shared columns of the side whose ids are in disorder lie scattered, and
each sector of 32 bytes holds several of them, which other tiles want. `finish.py` puts the parts together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simct_kernels.triton_backend.scores import (
    FORWARD,
    MIXED,
    add_exps,
    add_tile,
    exp,
    finite_max,
    fold_sum,
    gather,
    gather_sums,
    kl_terms,
    load_logits,
    log_mixture,
)


@triton.jit(do_not_specialize=["count", "splits"])
def candidate_kernel(
    out,  # float32 [5 or 10, splits, G]
    student,  # [N_s, W_s], and so on: see Side
    student_row_stride,
    student_column_stride,
    student_bias,
    student_scale,
    student_softcap,
    student_ids,  # int32 [any >= K] or None
    student_bound,  # see Side
    student_rows,  # int64 [G], the row of each unit's candidates
    teacher,  # [N_t, W_t], and so on
    teacher_row_stride,
    teacher_column_stride,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_ids,
    teacher_bound,
    teacher_rows,
    left_out,  # bool [any, any >= K] or None
    left_out_width,
    left_out_rows,  # int64 [G], each unit's row of left_out, -1 for none
    state,  # float32 [10, G], of finish_kernel, for the second pass of MIXED; else None
    count,  # G
    size,  # K
    splits,  # of the K columns
    tiles_each,  # of a split
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    SUMS: tl.constexpr,  # whether the sums over all shared columns are kept apart from the softmaxes'
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # threads
    VECTOR: tl.constexpr,  # elements that one reads at a time
):
    """A few units' statistics over one split of the shared columns, without the continuation.

    out[:5] is what `merge` takes, and with SUMS out[5:] each side's maximum and sum of exp(z - maximum) at temperature
    1 over all shared columns, then the teacher's sum without what is left out. With `state`: out[0] and out[1] are the
    unit's terms of the generalised JSD's two KLs.
    """
    place, split = tl.program_id(0) // splits, tl.program_id(0) % splits
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

    # Sums are kept by lanes: what crosses threads, shuffles and barriers, waits for the end.
    GROUPS: tl.constexpr = BLOCK // VECTOR
    zero = tl.zeros([ROWS, GROUPS if GROUPS < LANES else LANES], tl.float32)
    low = zero - float("inf")
    m, u, a, n, v = low, zero, zero, low, zero
    student_top, student_sum, teacher_top, teacher_sum, kept_top, kept_sum = low, zero, low, zero, low, zero
    begin = split * tiles_each * BLOCK
    for start in range(begin, tl.minimum(begin + tiles_each * BLOCK, size), BLOCK):
        index = start + tl.arange(0, BLOCK)[None, :]
        mask = inside_units[:, None]
        student_inside, teacher_inside = index < student_bound, index < teacher_bound
        student_columns, teacher_columns = index, index
        if student_ids is not None:
            student_columns = tl.load(student_ids + index, mask=student_inside, other=0)
        if teacher_ids is not None:
            teacher_columns = tl.load(teacher_ids + index, mask=teacher_inside, other=0)
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
            student_inside,
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
            teacher_inside,
        )
        keep = (index < size) & mask
        if SUMS:
            s, t = tl.where(keep, s, -float("inf")), tl.where(keep, t, -float("inf"))
            student_top, student_sum = add_exps(student_top, student_sum, s, LANES, VECTOR)
            teacher_top, teacher_sum = add_exps(teacher_top, teacher_sum, t, LANES, VECTOR)
        if left_out is not None:
            where = left_out + listed * left_out_width + index
            keep = keep & (tl.load(where, mask=(index < left_out_width) & (listed >= 0), other=0) == 0)
        s, t = tl.where(keep, s, -float("inf")), tl.where(keep, t, -float("inf"))
        if SUMS:
            kept_top, kept_sum = add_exps(kept_top, kept_sum, t, LANES, VECTOR)
        if state is not None:
            log_q = s * inverse_temperature - student_max - student_log
            log_p = t * inverse_temperature - teacher_max - teacher_log
            log_m = log_mixture(log_q, log_p, beta)
            u += fold_sum(kl_terms(log_q, log_m), LANES, VECTOR)
            a += fold_sum(kl_terms(log_p, log_m), LANES, VECTOR)
        elif MODE == FORWARD:
            m, u, a, n, v = add_tile(m, u, a, n, v, t, s, inverse_temperature, True, LANES, VECTOR)
        else:
            m, u, a, n, v = add_tile(m, u, a, n, v, s, t, inverse_temperature, MODE != MIXED, LANES, VECTOR)

    out += split * count + unit
    field = splits * count
    if state is not None:
        tl.store(out, tl.sum(u, 1), mask=inside_units)
        tl.store(out + field, tl.sum(a, 1), mask=inside_units)
    else:
        scale = inverse_temperature
        m, u, a, n, v = gather(m * scale, u, a * scale, n * scale, v)
        tl.store(out, m, mask=inside_units)
        tl.store(out + field, u, mask=inside_units)
        tl.store(out + 2 * field, a, mask=inside_units)
        tl.store(out + 3 * field, n, mask=inside_units)
        tl.store(out + 4 * field, v, mask=inside_units)
    if SUMS:
        top, total = gather_sums(student_top, student_sum)
        tl.store(out + 5 * field, top, mask=inside_units)
        tl.store(out + 6 * field, total, mask=inside_units)
        top, total = gather_sums(teacher_top, teacher_sum)
        tl.store(out + 7 * field, top, mask=inside_units)
        tl.store(out + 8 * field, total, mask=inside_units)
        kept_top, kept_sum = gather_sums(kept_top, kept_sum)
        tl.store(out + 9 * field, kept_sum * exp(kept_top - finite_max(top)), mask=inside_units)
