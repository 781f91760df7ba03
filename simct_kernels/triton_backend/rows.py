"""Log-sum-exps of whole rows, or of the columns of a row that are not shared."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.scores import Side, add_exps, gather_sums, load_logits, log_sum


@triton.jit(do_not_specialize=["count", "splits"])
def logsumexp_kernel(
    out,  # float32 [splits, N]
    values,  # [N, W], and so on: see Side
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    wanted,  # bool [N], or None for every row
    row_unit,  # int64 [N], the unit of each row, -1 for none; None: no row has one
    lengths,  # int64 [G], rows of each unit
    first_rows,  # int64 [G], the row of each unit's candidates, of which the unshared columns are read
    rest,  # int32 [any], the columns that are not shared, and more; None: those from K on
    rest_bound,  # its length
    count,  # N
    width,  # W
    size,  # K
    splits,
    tiles_each,
    LONGER: tl.constexpr,  # with row_unit: whether the rows of longer units are read
    FIRST: tl.constexpr,  # likewise: whether all first rows are
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # threads
    VECTOR: tl.constexpr,  # elements that one reads at a time
):
    """One row's log-sum-exp over one split of the columns that it must read. A row that is not wanted gets -inf."""
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    whole, first = True, False
    if wanted is not None:
        whole = tl.load(wanted + row) != 0
    if row_unit is not None:
        unit = tl.load(row_unit + row)
        first = tl.load(first_rows + unit, mask=unit >= 0, other=-1) == row
        whole = unit < -1
        if LONGER:
            whole = tl.load(lengths + unit, mask=unit >= 0, other=0) > 1
        first = first & (whole | FIRST)
    begin = split * tiles_each * BLOCK
    end = begin + tiles_each * BLOCK
    result = -float("inf")
    if first:
        last = width - size
        if rest is None:  # aligned, and so with shared columns to leave out in front of the others
            begin, end = begin + size // 64 * 64, end + size // 64 * 64
            result = _logsumexp(
                values,
                row_stride,
                column_stride,
                bias,
                scale,
                softcap,
                None,
                row,
                begin,
                end,
                size,
                width,
                width,
                BLOCK,
                LANES,
                VECTOR,
            )
        else:
            result = _logsumexp(
                values,
                row_stride,
                column_stride,
                bias,
                scale,
                softcap,
                rest,
                row,
                begin,
                end,
                0,
                last,
                rest_bound,
                BLOCK,
                LANES,
                VECTOR,
            )
    elif whole:
        result = _logsumexp(
            values,
            row_stride,
            column_stride,
            bias,
            scale,
            softcap,
            None,
            row,
            begin,
            end,
            0,
            width,
            width,
            BLOCK,
            LANES,
            VECTOR,
        )
    tl.store(out + split * count + row, result)


@triton.jit
def _logsumexp(
    values,
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    listed,  # int32 [bound], the columns meant; None: they are their own places
    row,
    begin,  # the first place read
    end,  # one past the last
    low,  # the first place meant
    high,  # one past the last
    bound,  # one past the last that there is
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # threads
    VECTOR: tl.constexpr,  # elements that one reads at a time
):
    """The log-sum-exp of one row over the columns at places begin to end and low to high; -inf of none.

    NaN or +inf makes it NaN.
    """
    GROUPS: tl.constexpr = BLOCK // VECTOR
    total = tl.zeros([1, GROUPS if GROUPS < LANES else LANES], tl.float32)
    m = total - float("inf")
    for start in range(begin, tl.minimum(end, high), BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        inside = place < bound
        columns = place
        if listed is not None:
            columns = tl.load(listed + place, mask=inside, other=0)
        z = load_logits(values, row_stride, column_stride, bias, scale, softcap, row, columns, True, inside)
        z = tl.where((place >= low) & (place < high), z, -float("inf"))
        m, total = add_exps(m, total, z, LANES, VECTOR)
    m, total = gather_sums(m, total)
    return tl.sum(log_sum(m, total), 0)


def row_logsumexp(
    side: Side,
    wanted: Tensor | None = None,  # bool [N]
) -> Tensor:
    """float32 [N]; -inf of rows that are not wanted. NaN or +inf in a row makes NaN."""
    out = _launch(side, wanted)
    return out[0] if len(out) == 1 else out.logsumexp(0)


def unit_logsumexp(
    side: Side,
    unit: Tensor,  # int64 [N], each row's unit, -1 for none
    length: Tensor,  # int64 [G]
    first: Tensor,  # int64 [G], each unit's first row
    rest: Tensor | None,  # see Columns
    size: int,  # K
    *,
    longer: bool,
    firsts: bool,
) -> Tensor:
    """float32 [splits, N]: what the rows of longer units, or all units' first rows, hold besides shared candidates.

    That is all of a row but a first one, and of that the columns that are not shared. -inf of other rows. The log-sum-exp
    over the splits is the row's.
    """
    return _launch(side, None, unit, length, first, rest, size, longer, firsts)


def _launch(side: Side, wanted=None, unit=None, length=None, first=None, rest=None, size=0, longer=False, firsts=False):
    count, width = side.values.shape
    shape = tiles.tile("logsumexp", side.values.device)
    splits, each = tiles.splits(count, width, shape, side.values.device)
    out = torch.empty(splits, count, dtype=torch.float32, device=side.values.device)
    if count:
        logsumexp_kernel[(count * splits,)](
            out,
            *side.arguments(),
            wanted,
            unit,
            length,
            first,
            rest,
            0 if rest is None else len(rest),
            *(count, width, size, splits, each),
            LONGER=longer,
            FIRST=firsts,
            BLOCK=shape.block,
            LANES=tiles.threads(shape, side.values.device),
            VECTOR=16 // side.values.element_size(),
            num_warps=shape.warps,
        )
    return out
