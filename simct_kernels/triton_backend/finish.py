"""What `candidate_kernel` and `logsumexp_kernel` found, put together: row log-sum-exps, continuations, and the units' divergences.

A number or two a row and a unit: the launches here cost next to nothing. They are launches of their own because they need
all programs of the forward pass to be done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simct_kernels.triton_backend.scores import (
    FORWARD,
    MIXED,
    add_sums,
    exp,
    gather,
    gather_sums,
    kl_terms,
    load_logits,
    log_add,
    log_mixture,
    log_sum,
    merge,
    score_gradient,
)


@triton.jit(do_not_specialize=["student_count", "student_splits", "teacher_count", "teacher_splits", "count", "splits"])
def finish_kernel(
    state,  # float32 [10, G]: see candidates.Units
    partial,  # float32 [5 or 10, splits, G], of candidate_kernel
    student,  # [N_s, W_s], and so on: see Side
    student_row_stride,
    student_column_stride,
    student_bias,
    student_scale,
    student_softcap,
    student_start,  # int64 [G], the first of each unit's rows
    student_length,  # int64 [G]
    student_tokens,  # int64 [N_s], the column of each row's own token, unless the targets are given
    student_targets,  # float32 [N_s], the logits of the rows' own tokens; None: they are columns
    student_partial,  # float32 [splits, N_s], of unit_logsumexp; None: no row is read whole
    student_count,  # N_s
    student_splits,
    student_logsumexp,  # float32 [N_s], written for the rows of longer units
    student_classes,  # float32 [G, C], the logits of the classes; None: there are none
    teacher,  # [N_t, W_t], and so on
    teacher_row_stride,
    teacher_column_stride,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_start,
    teacher_length,
    teacher_tokens,
    teacher_targets,
    teacher_partial,
    teacher_count,
    teacher_splits,
    teacher_classes,  # float32 [G, C]
    by_class,  # float32 [G, C], written: the loss's derivative by the student's
    class_count,  # C
    has_continuation,  # bool or int64 [G]; None: all have one if CONTINUES
    mass_floor,  # None: no unit is dropped
    count,  # G
    splits,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    SUMS: tl.constexpr,
    LONGER: tl.constexpr,
    CONTINUES: tl.constexpr,
    SUM: tl.constexpr,
    UNITS: tl.constexpr,
    SPLITS: tl.constexpr,  # read at a time
):
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < count
    zero = tl.zeros([UNITS], tl.float32)
    low = zero - float("inf")
    m, u, a, n, v = low, zero, zero, low, zero
    student_top, student_sum, teacher_top, teacher_sum, kept_sum = low, zero, low, zero, zero
    field = splits * count
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[None, :].to(tl.int64)
        mask = inside[:, None] & (split < splits)
        place = partial + split * count + unit[:, None]
        m2 = tl.load(place, mask=mask, other=-float("inf"))
        u2 = tl.load(place + field, mask=mask, other=0.0)
        a2 = tl.load(place + 2 * field, mask=mask, other=0.0)
        n2 = tl.load(place + 3 * field, mask=mask, other=-float("inf"))
        v2 = tl.load(place + 4 * field, mask=mask, other=0.0)
        m2, u2, a2, n2, v2 = gather(m2, u2, a2, n2, v2)
        m, u, a, n, v = merge(m, u, a, n, v, m2, u2, a2, n2, v2)
        if SUMS:
            student_top, student_sum, _ = _add_sums(
                student_top, student_sum, student_sum, place + 5 * field, field, mask, False
            )
            teacher_top, teacher_sum, kept_sum = _add_sums(
                teacher_top, teacher_sum, kept_sum, place + 7 * field, field, mask, True
            )
    if not SUMS:  # nothing is left out, and the temperature is 1
        student_top, student_sum, teacher_top, teacher_sum = m, u, n, v
        if MODE == FORWARD:
            student_top, student_sum, teacher_top, teacher_sum = n, v, m, u
        kept_sum = teacher_sum

    if teacher_partial is not None:
        row = tl.load(teacher_start + unit, mask=inside, other=0)
        rest = _row_logsumexp(teacher_partial, row, inside, teacher_count, teacher_splits)
        teacher_first = log_add(log_sum(teacher_top, teacher_sum), rest)
    if student_partial is not None:
        row = tl.load(student_start + unit, mask=inside, other=0)
        rest = _row_logsumexp(student_partial, row, inside, student_count, student_splits)
        student_first = log_add(log_sum(student_top, student_sum), rest)

    s, t, raw = low, low, low
    if CONTINUES:
        exists = inside
        if has_continuation is not None:
            exists = tl.load(has_continuation + unit, mask=inside, other=0) != 0
        s = _continuation(
            student,
            student_row_stride,
            student_column_stride,
            student_bias,
            student_scale,
            student_softcap,
            student_start,
            student_length,
            student_tokens,
            student_targets,
            student_partial,
            student_logsumexp,
            student_count,
            student_splits,
            student_first if student_partial is not None else zero,
            unit,
            exists,
            LONGER,
            SUM,
            UNITS,
        )
        raw = _continuation(
            teacher,
            teacher_row_stride,
            teacher_column_stride,
            teacher_bias,
            teacher_scale,
            teacher_softcap,
            teacher_start,
            teacher_length,
            teacher_tokens,
            teacher_targets,
            teacher_partial,
            None,
            teacher_count,
            teacher_splits,
            teacher_first if teacher_partial is not None else zero,
            unit,
            exists,
            LONGER,
            SUM,
            UNITS,
        )
        s, t = s * inverse_temperature, raw * inverse_temperature

    kept = zero + 1
    if mass_floor is not None:
        mass = kept_sum * exp(teacher_top - teacher_first)
        mass = tl.where(kept_sum == 0, 0.0, mass) + exp(raw - teacher_first)
        if teacher_classes is not None:
            for number in range(class_count):
                place = teacher_classes + unit * class_count + number
                mass += exp(tl.load(place, mask=inside, other=-float("inf")) - teacher_first)
        kept = tl.where(mass < mass_floor, 0.0, 1.0 + 0.0 * teacher_first)  # NaN anywhere in the row stays NaN

    m, u, a, n, v = _add_candidate(m, u, a, n, v, s, t, MODE)
    if student_classes is not None:
        for number in range(class_count):
            place = unit * class_count + number
            x = tl.load(student_classes + place, mask=inside, other=0.0) * inverse_temperature
            y = tl.load(teacher_classes + place, mask=inside, other=0.0) * inverse_temperature
            m, u, a, n, v = _add_candidate(m, u, a, n, v, x, y, MODE)
    # Maxima and logarithms stay apart: of logits of 1e4 their sum would keep three digits after the point.
    student_max, student_log, teacher_max, teacher_log = m, tl.log(u), n, tl.log(v)
    kl = a / u - student_log + teacher_log
    if MODE == FORWARD:
        student_max, student_log, teacher_max, teacher_log = teacher_max, teacher_log, student_max, student_log
    tl.store(state + count + unit, student_max, mask=inside)
    tl.store(state + 2 * count + unit, student_log, mask=inside)
    tl.store(state + 3 * count + unit, teacher_max, mask=inside)
    tl.store(state + 4 * count + unit, teacher_log, mask=inside)
    tl.store(state + 7 * count + unit, kept, mask=inside)
    if MODE == MIXED:
        if CONTINUES:
            tl.store(state + 8 * count + unit, s, mask=inside)
            tl.store(state + 9 * count + unit, t, mask=inside)
    else:
        log_q, log_p = s - student_max - student_log, t - teacher_max - teacher_log
        _store(state, unit, inside, count, kl, kl, kept, log_q, log_p, inverse_temperature, beta, MODE, CONTINUES)
        if student_classes is not None:
            for number in range(class_count):
                place = unit * class_count + number
                log_q = tl.load(student_classes + place, mask=inside, other=0.0) * inverse_temperature
                log_p = tl.load(teacher_classes + place, mask=inside, other=0.0) * inverse_temperature
                log_q, log_p = log_q - student_max - student_log, log_p - teacher_max - teacher_log
                gradient = score_gradient(log_q, log_p, kl, beta, MODE) * inverse_temperature
                tl.store(by_class + place, gradient, mask=inside)


@triton.jit
def _add_candidate(m, u, a, n, v, s, t, MODE: tl.constexpr):
    """`merge` with a set of one candidate. It is its own maximum: its sum is 1, and NaN if it is NaN."""
    x, y = s, t
    if MODE == FORWARD:
        x, y = t, s
    x_sum = tl.where(x == -float("inf"), 0.0, 1.0 + 0.0 * x)
    y_sum = tl.where(y == -float("inf"), 0.0, 1.0 + 0.0 * y)
    only_x = tl.where((y == -float("inf")) & (x != y), float("inf"), 0.0)
    m, u, a, n, v = merge(m, u, a, n, v, x, x_sum, only_x, y, y_sum)
    return m, u, a, n, v


@triton.jit
def _add_sums(m, total, kept, place, field, mask, KEPT: tl.constexpr):
    """Adds the maxima [U, S] at `place`, and the sums that follow them, to those of U units."""
    top = tl.load(place, mask=mask, other=-float("inf"))
    if KEPT:
        most, part = gather_sums(top, tl.load(place + 2 * field, mask=mask, other=0.0))
        _, kept = add_sums(m, kept, most, part)
    most, part = gather_sums(top, tl.load(place + field, mask=mask, other=0.0))
    m, total = add_sums(m, total, most, part)
    return m, total, kept


@triton.jit(do_not_specialize=["count", "splits"])
def mixture_kernel(
    state,  # float32 [10, G], of finish_kernel
    partial,  # float32 [2, splits, G], of candidate_kernel's second pass
    student_classes,  # as of finish_kernel
    teacher_classes,
    by_class,
    class_count,
    count,  # G
    splits,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    CONTINUES: tl.constexpr,
    UNITS: tl.constexpr,
    SPLITS: tl.constexpr,  # read at a time
):
    """The generalised JSD, whose terms need both sides' log-sum-exps first."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < count
    kl = tl.zeros([UNITS], tl.float32)
    other_kl, log_q, log_p = kl, kl, kl
    if CONTINUES:
        log_q = tl.load(state + 8 * count + unit, mask=inside, other=0.0)
        log_q = log_q - tl.load(state + count + unit, mask=inside, other=0.0)
        log_q = log_q - tl.load(state + 2 * count + unit, mask=inside, other=0.0)
        log_p = tl.load(state + 9 * count + unit, mask=inside, other=0.0)
        log_p = log_p - tl.load(state + 3 * count + unit, mask=inside, other=0.0)
        log_p = log_p - tl.load(state + 4 * count + unit, mask=inside, other=0.0)
        log_m = log_mixture(log_q, log_p, beta)
        kl, other_kl = kl_terms(log_q, log_m), kl_terms(log_p, log_m)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None].to(tl.int64)
        mask = inside[None, :] & (split < splits)
        place = partial + split * count + unit[None, :]
        kl += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        other_kl += tl.sum(tl.load(place + splits * count, mask=mask, other=0.0), 0)
    if student_classes is not None:
        for number in range(class_count):
            place = unit * class_count + number
            q = _class_log(student_classes, place, state + count + unit, inside, count, inverse_temperature)
            p = _class_log(teacher_classes, place, state + 3 * count + unit, inside, count, inverse_temperature)
            log_m = log_mixture(q, p, beta)
            kl += kl_terms(q, log_m)
            other_kl += kl_terms(p, log_m)
    kept = tl.load(state + 7 * count + unit, mask=inside, other=0.0)
    loss = (1 - beta) * kl + beta * other_kl
    _store(state, unit, inside, count, loss, kl, kept, log_q, log_p, inverse_temperature, beta, MODE, CONTINUES)
    if student_classes is not None:
        for number in range(class_count):
            place = unit * class_count + number
            q = _class_log(student_classes, place, state + count + unit, inside, count, inverse_temperature)
            p = _class_log(teacher_classes, place, state + 3 * count + unit, inside, count, inverse_temperature)
            gradient = score_gradient(q, p, kl, beta, MODE) * inverse_temperature
            tl.store(by_class + place, gradient, mask=inside)


@triton.jit
def _class_log(logits, place, maxima, inside, count, inverse_temperature):
    """Of a class's logit, its logarithm in the candidate softmax whose maximum and logarithm are at `maxima`."""
    z = tl.load(logits + place, mask=inside, other=0.0) * inverse_temperature
    z -= tl.load(maxima, mask=inside, other=0.0)
    return z - tl.load(maxima + count, mask=inside, other=0.0)


@triton.jit
def _store(
    state,
    unit,
    inside,
    count,
    loss,
    kl,
    kept,
    log_q,  # of the continuation
    log_p,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    tl.store(state + unit, tl.where(kept == 0, 0.0, loss * kept), mask=inside)
    tl.store(state + 5 * count + unit, kl, mask=inside)
    if CONTINUES:
        gradient = score_gradient(log_q, log_p, kl, beta, MODE) * inverse_temperature
        tl.store(state + 6 * count + unit, gradient, mask=inside)


@triton.jit
def _row_logsumexp(
    partial,  # float32 [splits, N]
    row,
    mask,
    count,  # N
    splits,
):
    m = tl.zeros_like(row).to(tl.float32) - float("inf")
    total = tl.zeros_like(m)
    for split in range(splits):
        part = tl.load(partial + split * count + row, mask=mask, other=0.0)
        m, total = add_sums(m, total, part, tl.where(part == -float("inf"), 0.0, 1.0 + 0.0 * part))
    return log_sum(m, total)


@triton.jit
def _continuation(
    values,
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    start,
    length,
    tokens,
    targets,
    partial,
    logsumexp,
    count,
    splits,
    first_logsumexp,
    unit,
    exists,
    LONGER: tl.constexpr,
    SUM: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Eq. 7 for the continuations, on the scale of the first row's logits; -inf, so no candidate, where there is none.

    The one row of a unit of length 1 is its first row: the log-sum-exps cancel and are not read.
    """
    first = tl.load(start + unit, mask=exists, other=0)
    rows = tl.load(length + unit, mask=exists, other=0)
    total = tl.zeros([UNITS], tl.float32)
    for step in range(0, tl.max(rows, 0)):
        row, mask = first + step, step < rows
        if targets is not None:
            term = tl.load(targets + row, mask=mask, other=0.0)
        else:
            column = tl.load(tokens + row, mask=mask, other=0)
            term = load_logits(values, row_stride, column_stride, bias, scale, softcap, row, column, mask, mask)
        if LONGER and partial is not None:
            longer = mask & (rows > 1)
            normaliser = _row_logsumexp(partial, row, longer & (step > 0), count, splits)
            normaliser = tl.where(step == 0, first_logsumexp, normaliser)
            if logsumexp is not None:
                tl.store(logsumexp + row, normaliser, mask=longer)
            term -= tl.where(longer, normaliser, 0.0)
        total += tl.where(mask, term, 0.0)
    if not SUM:
        total /= tl.maximum(rows, 1).to(tl.float32)
    if LONGER and partial is not None:
        total += tl.where(rows > 1, first_logsumexp, 0.0)
    return tl.where(exists, total, -float("inf"))
