"""What the log-sum-exps of whole rows add to the gradient by their logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.scores import Side, exp, load_logits


@triton.jit
def softmax_kernel(
    out,  # [N, W], contiguous columns; may be `values` itself
    out_row_stride,
    values,  # [N, W], and so on: see Side
    row_stride,
    column_stride,
    bias,
    scale,
    softcap,
    rows,  # int64 [R], the rows to read and to write; None: the first R
    logsumexp,  # float32 [R]
    by_logsumexp,  # float32 [R], the loss's derivative by them; a row where it is 0 is not read, and gets 0
    width,  # W
    BLOCK: tl.constexpr,
):
    """out[row] = by_logsumexp * softmax of the row, times what the head's scale and soft-cap make of a raw product."""
    blocks = tl.cdiv(width, BLOCK)
    place = (tl.program_id(0) // blocks).to(tl.int64) + tl.arange(0, 1)
    row = place
    if rows is not None:
        row = tl.load(rows + place)
    weight, normaliser = tl.load(by_logsumexp + place), tl.load(logsumexp + place)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    z = load_logits(values, row_stride, column_stride, bias, scale, softcap, row, column, weight != 0, inside)
    gradient = exp(z - normaliser) * weight
    if scale is not None:
        gradient *= scale
    if softcap is not None:
        part = z * (1 / softcap)
        gradient *= 1 - part * part
    gradient = tl.where(weight == 0, 0.0, gradient)
    tl.store(out + row * out_row_stride + column, gradient.to(out.dtype.element_ty), mask=inside)


def write_softmax(
    out: Tensor,  # [N, W]
    side: Side,
    rows: Tensor | None,  # int64 [R]; None: all
    logsumexp: Tensor,  # float32 [R]
    by_logsumexp: Tensor,  # float32 [R]
) -> None:
    """Writes the gradient by the values of `side` into `out`, which may be those values."""
    count, width = len(logsumexp), out.shape[1]
    if not count:
        return
    shape = tiles.tile("softmax", out.device)
    softmax_kernel[(count * triton.cdiv(width, shape.block),)](
        out,
        out.stride(0),
        *side.arguments(),
        None if rows is None else rows.contiguous(),
        logsumexp.contiguous(),
        by_logsumexp.contiguous(),
        width,
        BLOCK=shape.block,
        num_warps=shape.warps,
    )
