"""Whole rows: their log-sum-exps over a vocabulary, and the continuations' scores made from them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .scores import Side, finite_max, load_logits, log_sum


@triton.jit
def logsumexp_kernel(
    out,  # float32 [splits, N]
    values,  # [N, W], and so on: see Side
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    wanted,  # uint8 [N], or None for every row
    count,  # N
    width,  # W
    tiles_each,
    BLOCK: tl.constexpr,
):
    """One row's log-sum-exp over one split of its columns. A row that is not wanted is not read, and gets -inf."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tiles_each * BLOCK
    end = tl.minimum(begin + tiles_each * BLOCK, width)
    if wanted is not None:
        end = tl.where(tl.load(wanted + row) != 0, end, begin)
    m, total = -float("inf"), 0.0
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z = load_logits(values, row_stride, column_stride, bias, scale, softcap, row, columns, True, inside)
        z = tl.where(inside, z, -float("inf"))
        tile_m = tl.max(z, 0)
        tile_total = tl.sum(tl.exp(z - finite_max(tile_m)), 0)
        new = tl.maximum(m, tile_m)
        total = total * tl.exp(m - finite_max(new)) + tile_total * tl.exp(tile_m - finite_max(new))
        m = new
    tl.store(out + tl.program_id(1) * count + row, log_sum(m, total))


@triton.jit
def continuation_kernel(
    out,  # float32 [G]
    values,  # [N, W], and so on: see Side
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    start,  # int64 [G], each unit's first row
    length,  # int64 [G], its number of rows
    present,  # bool [G], whether it has a continuation; None: all do
    tokens,  # int64 [N], the column that each row reads; None: column 0
    logsumexp,  # float32 [N], needed of units longer than a row; None: raw logits are scored
    count,  # G
    SUM: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Eq. 7 for the continuations, on the scale of the first row's logits; -inf, so no candidate, where there is none.

    The one row of a unit of length 1 is its first row: the log-sum-exps cancel and are not read.
    """
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < count
    exists = inside
    if present is not None:
        exists = tl.load(present + unit, mask=inside, other=0) != 0
    first = tl.load(start + unit, mask=exists, other=0)
    rows = tl.load(length + unit, mask=exists, other=0)
    total = tl.zeros([UNITS], tl.float32)
    for step in range(0, tl.max(rows, 0)):
        row, mask = first + step, step < rows
        columns = tl.zeros([UNITS], tl.int64)
        if tokens is not None:
            columns = tl.load(tokens + row, mask=mask, other=0)
        term = load_logits(values, row_stride, column_stride, bias, scale, softcap, row, columns, mask, mask)
        if logsumexp is not None:
            term -= tl.load(logsumexp + row, mask=mask & (rows > 1), other=0.0)
        total += tl.where(mask, term, 0.0)
    if not SUM:
        total /= tl.maximum(rows, 1).to(tl.float32)
    if logsumexp is not None:
        total += tl.load(logsumexp + first, mask=exists & (rows > 1), other=0.0)
    tl.store(out + unit, tl.where(exists, total, -float("inf")), mask=inside)


def row_logsumexp(
    side: Side,
    wanted: Tensor | None = None,  # bool [N]
) -> Tensor:
    """float32 [N]; -inf of rows that are not wanted. NaN or +inf in a row makes NaN."""
    count, width = side.values.shape
    shape = tiles.tile("logsumexp", side.values.device)
    splits, each = tiles.splits(count, width, shape, side.values.device)
    out = torch.empty(splits, count, dtype=torch.float32, device=side.values.device)
    if count:
        logsumexp_kernel[count, splits](
            out, *side.arguments(), wanted, count, width, each, BLOCK=shape.block, num_warps=shape.warps
        )
    return out[0] if splits == 1 else out.logsumexp(0)


def continuation_scores(
    side: Side,
    start: Tensor,  # int64 [G]
    length: Tensor,  # int64 [G]
    tokens: Tensor | None,  # int64 [N]
    logsumexp: Tensor | None,  # float32 [N]
    score: str,
    present: Tensor | None = None,  # bool [G]
) -> Tensor:
    """float32 [G], of the student or of the teacher."""
    out = torch.empty(len(start), dtype=torch.float32, device=start.device)
    continuation_kernel[(triton.cdiv(len(start), tiles.UNITS),)](
        out,
        *side.arguments(),
        start,
        length,
        present,
        tokens,
        logsumexp,
        len(start),
        SUM=score == "sum_logprob",
        UNITS=tiles.UNITS,
        num_warps=2,
    )
    return out
