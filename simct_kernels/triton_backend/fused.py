"""Logits that live in a program's registers only: products of hidden and head rows, and what is made of them at once.

A program multiplies the hidden rows of a few units by the head rows of a tile of columns (`tl.dot` over the width),
finishes the tile as the heads would, takes it into online statistics and forgets it. The head rows are read where they
lie in the vocabulary: each is contiguous, so gathered rows are read in the same whole lines as copied ones.

Every tile leaves its extreme scores behind, 8 bytes for a row and BLOCK columns: the backward tells by them, before it
multiplies anything again, where the gradient is negligible (see fused_gradient.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .scores import (
    FORWARD,
    MIXED,
    REVERSE,
    finish_logits,
    finite_max,
    kl_terms,
    log_mixture,
    log_sum,
    merge,
    summarise,
)


@dataclass(frozen=True)
class Projection:
    """One side's logits, not made yet: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    hidden: Tensor  # [N, H], contiguous rows
    weight: Tensor  # [V, H], contiguous rows
    bias: Tensor | None  # float32 [V]
    scale: float | None
    softcap: float | None
    ids: Tensor | None  # int32 [K], the columns of the shared tokens; None: column k is shared token k

    def arguments(self) -> tuple:
        """Of a kernel, up to the operand type."""
        return (
            self.hidden,
            self.hidden.stride(0),
            self.weight,
            self.weight.stride(0),
            self.hidden.shape[1],
            self.bias,
            self.scale,
            self.softcap,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the products multiply: the common type, or float32 of unequal ones."""
        return self.hidden.dtype if self.hidden.dtype == self.weight.dtype else torch.float32

    @property
    def operand(self) -> tl.dtype:
        """`dtype` in Triton; the interpreter, which cannot multiply bf16, gets float32."""
        return _TYPES[torch.float32 if self.dtype == torch.bfloat16 and interprets(self.hidden) else self.dtype]


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def interprets(tensor: Tensor) -> bool:
    """Whether Triton's interpreter, and no GPU, runs a launch on `tensor`."""
    return tensor.device.type == "cpu"


def shape_of(kernel: str, *sides: Projection) -> tiles.FusedTile:
    wide = any(side.operand == tl.float32 for side in sides)
    return tiles.fused_tile(f"{kernel}32" if wide else kernel, sides[0].hidden.device)


@triton.jit
def logit_tile(
    hidden,  # [N, H], and so on: see Projection
    hidden_stride,
    weight,  # [V, H]
    weight_stride,
    width,  # H
    bias,
    scale,
    softcap,
    rows,  # int64 [ROWS]
    row_mask,
    columns,  # int32 [BLOCK]
    column_mask,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """float32 [ROWS, BLOCK]. What is masked out is not read and counts as 0 in the products."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    depth = tl.arange(0, DEPTH)
    of_hidden = hidden + rows[:, None] * hidden_stride + depth[None, :]
    of_weight = weight + columns.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    for start in range(0, width, DEPTH):
        inside = start + depth < width
        x = tl.load(of_hidden + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
        w = tl.load(of_weight + start, mask=column_mask[None, :] & inside[:, None], other=0.0)
        # Of float32 operands TF32 would keep 10 bits; 16-bit ones are not touched by it.
        total = tl.dot(x.to(OPERAND), w.to(OPERAND), total, input_precision="ieee")
    return finish_logits(total, bias, scale, softcap, columns[None, :], column_mask[None, :])


@triton.jit
def fused_statistics_kernel(
    out,  # float32 [6, splits, G]: what `summarise` gives and the teacher's mass, or at the second pass the two KLs
    extremes,  # float32 [2, tiles, G]: see `Extremes`; None: no gradient is asked for
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
    teacher_logsumexp,  # float32 [G]; None: no mass is asked for
    state,  # float32 [10, G], for the second pass; else None
    count,  # G
    size,  # K
    tiles_each,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_units = unit < count
    student_row = tl.load(student_rows + unit, mask=inside_units, other=0)
    teacher_row = tl.load(teacher_rows + unit, mask=inside_units, other=0)
    zero = tl.zeros([ROWS], tl.float32)
    m, u, a, n, v, mass = zero - float("inf"), zero, zero, zero - float("inf"), zero, zero
    first = tl.program_id(1) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(size, BLOCK))):
        index = tile * BLOCK + tl.arange(0, BLOCK)
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
            teacher_row,
            left_out,
            unit,
            inside_units,
            index,
            size,
            STUDENT,
            TEACHER,
            ROWS,
            BLOCK,
            DEPTH,
        )
        s, t = tl.where(keep, s, -float("inf")), tl.where(keep, t, -float("inf"))
        if teacher_logsumexp is not None:
            normaliser = tl.load(teacher_logsumexp + unit, mask=inside_units, other=0.0)[:, None]
            mass += tl.sum(tl.exp(t - normaliser), 1)
        s, t = s * inverse_temperature, t * inverse_temperature
        if extremes is not None:
            place = extremes + tl.cast(tile, tl.int64) * count + unit
            tl.store(place, tl.max(s, 1), mask=inside_units)
            if MODE == FORWARD:
                tl.store(place + tl.cast(tl.cdiv(size, BLOCK), tl.int64) * count, tl.max(t, 1), mask=inside_units)
            if MODE == REVERSE:
                least = tl.min(tl.where(keep, t, float("inf")), 1)
                tl.store(place + tl.cast(tl.cdiv(size, BLOCK), tl.int64) * count, least, mask=inside_units)
        if state is not None:
            log_q = (
                s - load_state(state, 1, unit, count, inside_units) - load_state(state, 2, unit, count, inside_units)
            )
            log_p = (
                t - load_state(state, 3, unit, count, inside_units) - load_state(state, 4, unit, count, inside_units)
            )
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
def candidate_tiles(
    student,  # [N_s, H_s], and so on: see Projection
    student_stride,
    student_weight,
    student_weight_stride,
    student_width,
    student_bias,
    student_scale,
    student_softcap,
    student_ids,
    student_row,  # int64 [ROWS]
    teacher,  # [N_t, H_t], and so on
    teacher_stride,
    teacher_weight,
    teacher_weight_stride,
    teacher_width,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    teacher_ids,
    teacher_row,  # int64 [ROWS]
    left_out,  # bool [G, K] or None
    unit,  # [ROWS]
    live,  # bool [ROWS], the units that are read
    index,  # int32 [BLOCK], of shared tokens
    size,  # K
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Both sides' logits [ROWS, BLOCK] of units and shared tokens, and which of those are candidates."""
    inside = index < size
    s = logit_tile(
        student,
        student_stride,
        student_weight,
        student_weight_stride,
        student_width,
        student_bias,
        student_scale,
        student_softcap,
        student_row,
        live,
        columns_at(student_ids, index, inside),
        inside,
        STUDENT,
        ROWS,
        BLOCK,
        DEPTH,
    )
    t = logit_tile(
        teacher,
        teacher_stride,
        teacher_weight,
        teacher_weight_stride,
        teacher_width,
        teacher_bias,
        teacher_scale,
        teacher_softcap,
        teacher_row,
        live,
        columns_at(teacher_ids, index, inside),
        inside,
        TEACHER,
        ROWS,
        BLOCK,
        DEPTH,
    )
    keep = live[:, None] & inside[None, :]
    if left_out is not None:
        where = left_out + unit.to(tl.int64)[:, None] * size + index[None, :]
        keep = keep & (tl.load(where, mask=keep, other=0) == 0)
    return s, t, keep


@triton.jit
def columns_at(ids, index, inside):
    """The columns of shared tokens; `ids` is int32 [K], or None where column k is token k."""
    columns = index
    if ids is not None:
        columns = tl.load(ids + index, mask=inside, other=0)
    return columns


@triton.jit
def load_state(state, field, unit, count, mask):
    """[ROWS, 1], a row of the state (see Units in candidates.py)."""
    return tl.load(state + field * count + unit, mask=mask, other=0.0)[:, None]


@triton.jit
def fused_logsumexp_kernel(
    out,  # float32 [splits, R]
    largest,  # float32 [tiles, R], each tile's largest logit; None: no gradient is asked for
    hidden,  # [N, H], and so on: see Projection
    hidden_stride,
    weight,
    weight_stride,
    width,
    bias,
    scale,
    softcap,
    rows,  # int64 [R]
    count,  # R
    columns,  # V
    tiles_each,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = place < count
    row = tl.load(rows + place, mask=live, other=0)
    m, total = tl.zeros([ROWS], tl.float32) - float("inf"), tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(columns, BLOCK))):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
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
        z = tl.where(inside[None, :], z, -float("inf"))
        tile_m = tl.max(z, 1)
        if largest is not None:
            tl.store(largest + tl.cast(tile, tl.int64) * count + place, tile_m, mask=live)
        new = finite_max(tl.maximum(m, tile_m))
        total = total * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        m = tl.maximum(m, tile_m)
    tl.store(out + tl.program_id(1) * count + place, log_sum(m, total), mask=live)
