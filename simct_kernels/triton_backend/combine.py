"""The gradient by a range of a head's rows: what all rows gave and what the shared rows gave, added, scaled and rounded.

One launch instead of an indexed addition and a multiplication into another dtype, which PyTorch does not vectorise: every sum
is read once and every element of the gradient written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a program's tile: a warp takes 8 neighbouring columns a thread, 1 KB of a row; H of 2,304 to 8,192 are
# multiples of 256. 32 elements a thread and operand.
_ROWS, _BLOCK, _WARPS = 16, 256, 4


@triton.jit(do_not_specialize=["first", "low", "count"])
def combine_kernel(
    out,  # [R, H], contiguous
    whole,  # float32 [R, H], contiguous; None: 0
    shared,  # float32 [S, H], contiguous, of the shared tokens from `low` on; None: none of these rows is shared
    shared_index,  # int32 [V], which shared token a row of the head is, -1 for none; None: row k is token k for all K
    scale,  # float32 [], or None for 1
    first,  # the first of these rows in the head
    low,  # the first of the shared tokens
    size,  # K
    count,  # R
    width,  # H
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside_rows, inside = row < count, column < width
    inside = inside & inside_rows[:, None]
    place = row[:, None] * width + column
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if whole is not None:
        total = tl.load(whole + place, mask=inside, other=0.0)
    if shared is not None:
        token = first + row
        if shared_index is not None:
            token = tl.load(shared_index + first + row, mask=inside_rows, other=-1).to(tl.int64)
        is_shared = (token >= 0) & (token < size)
        places = (token - low)[:, None] * width + column
        total += tl.load(shared + places, mask=inside & is_shared[:, None], other=0.0)
    if scale is not None:
        total *= tl.load(scale)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def combine(
    out: Tensor,  # [R, H], contiguous: the head's rows from `first` on
    whole: Tensor | None,  # float32 [R, H]; None: 0
    shared: Tensor | None,  # float32 [S, H], of the shared tokens from `low` on, all of these rows' among them
    shared_index: Tensor | None,  # int32 [V], which shared token a row is, -1 for none; None: the first K are
    scale: Tensor | None,  # float32 []
    first: int,
    low: int,
    size: int,  # K
) -> None:
    count, width = out.shape
    combine_kernel[triton.cdiv(count, _ROWS), triton.cdiv(width, _BLOCK)](
        out,
        whole,
        shared,
        shared_index,
        None if scale is None else scale.to(torch.float32),
        first,
        low,
        size,
        count,
        width,
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
