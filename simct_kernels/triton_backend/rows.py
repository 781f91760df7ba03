"""Log-sum-exps of whole rows, or of the columns of a row that are not shared."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.scores import Side, add_sums, finite_max, load_logits, log_sum


@triton.jit
def logsumexp_of(
    values,  # [N, W], and so on: see Side
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    listed,  # int32 [any], the columns meant; None: they are their own places
    row,
    begin,  # the first place
    end,  # one past the last
    BLOCK: tl.constexpr,
):
    """The log-sum-exp of one row over the columns at places begin to end; -inf of none. NaN or +inf makes it NaN."""
    m, total = -float("inf"), 0.0
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < end
        columns = place
        if listed is not None:
            columns = tl.load(listed + place, mask=inside, other=0)
        z = load_logits(values, row_stride, column_stride, bias, scale, softcap, row, columns, True, inside)
        z = tl.where(inside, z, -float("inf"))
        tile_m = tl.max(z, 0)
        m, total = add_sums(m, total, tile_m, tl.sum(tl.exp(z - finite_max(tile_m)), 0))
    return log_sum(m, total)


@triton.jit
def logsumexp_kernel(
    out,  # float32 [splits, N]
    values,  # [N, W], and so on: see Side
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    wanted,  # bool [N], or None for every row
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
    result = logsumexp_of(values, row_stride, column_stride, bias, scale, softcap, None, row, begin, end, BLOCK)
    tl.store(out + tl.program_id(1) * count + row, result)


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
