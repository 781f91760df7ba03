"""The indexed product: hidden rows times the few rows of a head that each of them names, and its two gradients.

A named row of the head is H contiguous elements, read 16 bytes a thread and multiplied where it is read: no [R, k, H]
tensor is made. Entries whose gradient is 0 (padding, say) read nothing, so that what lies there cannot spread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from simct_kernels.torch_backend.rows import LinearRows, add_repeated
from simct_kernels.triton_backend import tiles

if TYPE_CHECKING:
    from simct_kernels.triton_backend.kept import KeptTiles


@triton.jit
def pick_kernel(
    out,  # float32 [R, k]
    hidden,  # [N, H]
    hidden_row_stride,
    hidden_column_stride,
    rows,  # int64 [R]
    weight,  # [V, H]
    weight_row_stride,
    weight_column_stride,
    ids,  # int64 [R, k]
    count,  # k
    width,  # H
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's products with IDS of the rows that it names."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * IDS + tl.arange(0, IDS)
    inside = place < count
    chosen = tl.load(ids + row * count + place, mask=inside, other=0)
    source = hidden + tl.load(rows + row) * hidden_row_stride
    total = tl.zeros([IDS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = column < width
        column = column.to(tl.int64)
        h = tl.load(source + column * hidden_column_stride, mask=within, other=0.0).to(tl.float32)
        pointers = weight + chosen[:, None] * weight_row_stride + column[None, :] * weight_column_stride
        w = tl.load(pointers, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
        total += w * h[None, :]
    tl.store(out + row * count + place, tl.sum(total, 1), mask=inside)


@triton.jit
def hidden_gradient_kernel(
    out,  # float32 [N, H], contiguous
    gradient,  # float32 [R, k]
    rows,  # int64 [R], no row twice
    weight,  # [V, H]
    weight_row_stride,
    weight_column_stride,
    ids,  # int64 [R, k]
    count,  # k
    width,  # H
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[rows[r]] += sum over j of gradient[r, j] * weight[ids[r, j]], one block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = column < width
    total = tl.zeros([IDS, BLOCK], tl.float32)
    for start in range(0, count, IDS):
        place = start + tl.arange(0, IDS)
        inside = place < count
        g = tl.load(gradient + row * count + place, mask=inside, other=0.0)
        chosen = tl.load(ids + row * count + place, mask=inside, other=0)
        pointers = weight + chosen[:, None] * weight_row_stride + column[None, :] * weight_column_stride
        w = tl.load(pointers, mask=(g != 0)[:, None] & within[None, :], other=0.0).to(tl.float32)
        total += g[:, None] * w
    pointers = out + tl.load(rows + row) * width + column
    tl.store(pointers, tl.load(pointers, mask=within, other=0.0) + tl.sum(total, 0), mask=within)


@triton.jit(do_not_specialize=["count"])
def weight_gradient_kernel(
    out,  # float32 [V, H], contiguous
    partial,  # float32 [2 * segments, H]
    ids,  # int32 [E], ascending
    rows,  # int64 [E], the hidden row of each entry
    gradient,  # float32 [E]
    hidden,  # [N, H]
    hidden_row_stride,
    hidden_column_stride,
    count,  # E
    width,  # H
    SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[ids[e]] += gradient[e] * hidden[rows[e]], without atomics: what has the same id is added up by one program.

    Segments of SEGMENT entries cut runs of equal ids short, so that a token that is everywhere does not keep one
    program busy while the others are done. The program at each piece's first entry adds the piece up, the others have
    nothing to do. A whole run goes to its place, the pieces of a cut one to `partial`: that which a segment begins
    with, of an earlier segment's run, to row 2 * segment, and that which begins in it to the row after.
    """
    entry = tl.program_id(0)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = column < width
    own = tl.load(ids + entry)
    begins = tl.load(ids + entry - 1, mask=entry > 0, other=-1) != own
    if begins | (entry % SEGMENT == 0):
        end = tl.minimum((entry // SEGMENT + 1) * SEGMENT, count)
        others = entry + tl.arange(0, SEGMENT)
        length = tl.sum((tl.load(ids + others, mask=others < end, other=-1) == own).to(tl.int32), 0)
        ends = (entry + length < end) | (tl.load(ids + end, mask=end < count, other=-1) != own)
        total = tl.zeros([ENTRIES, BLOCK], tl.float32)
        for start in range(0, length, ENTRIES):
            place = start + tl.arange(0, ENTRIES)
            g = tl.load(gradient + entry + place, mask=place < length, other=0.0)
            row = tl.load(rows + entry + place, mask=place < length, other=0)
            pointers = hidden + row[:, None] * hidden_row_stride + column[None, :] * hidden_column_stride
            h = tl.load(pointers, mask=(g != 0)[:, None] & within[None, :], other=0.0).to(tl.float32)
            total += g[:, None] * h
        value = tl.sum(total, 0)
        if begins & ends:
            pointers = out + own.to(tl.int64) * width + column
            tl.store(pointers, tl.load(pointers, mask=within, other=0.0) + value, mask=within)
        else:
            slot = 2 * (entry // SEGMENT) + begins.to(tl.int32)
            tl.store(partial + slot.to(tl.int64) * width + column, value, mask=within)


@triton.jit(do_not_specialize=["count"])
def join_kernel(
    out,  # float32 [V, H], contiguous
    partial,  # float32 [2 * segments, H], of weight_gradient_kernel
    ids,  # int32 [E], ascending
    count,  # E
    width,  # H
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the pieces of the run that begins in a segment and goes on in the next, if there is one."""
    segment = tl.program_id(0)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = column < width
    after = (segment + 1) * SEGMENT
    own = tl.load(ids + after - 1)
    before = tl.load(ids + segment * SEGMENT - 1, mask=segment > 0, other=-1)
    if (before != own) & (tl.load(ids + after) == own):
        place = partial + (2 * segment + 1).to(tl.int64) * width + column
        total = tl.load(place, mask=within, other=0.0)
        place += width
        more = after
        while tl.load(ids + more, mask=more < count, other=-1) == own:
            total += tl.load(place, mask=within, other=0.0)
            place += 2 * width
            more += SEGMENT
        pointers = out + own.to(tl.int64) * width + column
        tl.store(pointers, tl.load(pointers, mask=within, other=0.0) + total, mask=within)


def pick(
    hidden: Tensor,  # [N, H]
    rows: Tensor,  # int64 [R]
    weight: Tensor,  # [V, H]
    ids: Tensor,  # int64 [R, k]
) -> Tensor:
    """float32 [R, k]: hidden[rows[r]] times weight[ids[r, j]]."""
    out = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
    count, picked = ids.shape
    if out.numel():
        shape = _tile(picked, hidden.device)
        pick_kernel[count, triton.cdiv(picked, shape.rows)](
            out,
            hidden,
            *hidden.stride(),
            rows.contiguous(),
            weight,
            *weight.stride(),
            ids.contiguous(),
            picked,
            weight.shape[1],
            IDS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.warps,
        )
    return out


def add_hidden_gradient(
    out: Tensor,  # float32 [N, H], contiguous
    gradient: Tensor,  # float32 [R, k]
    rows: Tensor,  # int64 [R], no row twice
    weight: Tensor,  # [V, H]
    ids: Tensor,  # int64 [R, k]
) -> None:
    """out[rows[r]] += sum over j of gradient[r, j] * weight[ids[r, j]]."""
    count, picked = ids.shape
    if not ids.numel():
        return
    shape = _tile(picked, out.device)
    hidden_gradient_kernel[count, triton.cdiv(weight.shape[1], shape.block)](
        out,
        gradient.contiguous(),
        rows.contiguous(),
        weight,
        *weight.stride(),
        ids.contiguous(),
        picked,
        weight.shape[1],
        IDS=shape.rows,
        BLOCK=shape.block,
        num_warps=shape.warps,
    )


def add_weight_gradient(
    out: Tensor,  # float32 [V, H], contiguous
    gradient: Tensor,  # float32 [E]
    hidden: Tensor,  # [N, H]
    rows: Tensor,  # int64 [E], any row any number of times
    ids: Tensor,  # int64 [E], likewise
) -> None:
    """out[ids[e]] += gradient[e] * hidden[rows[e]], always added in the same order. Never waits for the device."""
    count, width = len(ids), hidden.shape[1]
    if not count:
        return
    shape, size = tiles.tile("weight_gradient", out.device), tiles.SEGMENT
    ids, order = ids.int().sort(stable=True)
    segments, blocks = triton.cdiv(count, size), triton.cdiv(width, shape.block)
    # At most 2 / SEGMENT of the entries times H.
    partial = torch.empty(2 * segments, width, dtype=torch.float32, device=out.device)
    weight_gradient_kernel[count, blocks](
        out,
        partial,
        ids,
        rows[order],
        gradient[order],
        hidden,
        *hidden.stride(),
        count,
        width,
        SEGMENT=size,
        ENTRIES=shape.rows,
        BLOCK=shape.block,
        num_warps=shape.warps,
    )
    if segments > 1:
        join_kernel[segments - 1, blocks](
            out, partial, ids, count, width, SEGMENT=size, BLOCK=shape.block, num_warps=shape.warps
        )


def _tile(picked: int, device: torch.device) -> tiles.Tile:
    return tiles.tile("pick_one" if picked == 1 else "pick", device)


class IndexedRows(LinearRows):
    """As LinearRows in float32, with `pick` and `add_pick` in kernels.

    What the picked columns add to weight and bias is kept as a list of entries until the end, so that each row of the
    weight's gradient is read and written once whatever the number of chunks.
    """

    def __init__(self, hidden, head, shared_ids, dtype, **needs) -> None:
        super().__init__(hidden, head, shared_ids, dtype, **needs)
        self.pick_width = 1
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, ids and gradient, flat
        self._class_weight: Tensor | None = None  # float32 [M, H], the weight's gradient of the classes' ids

    def write_kept(
        self,
        kept: KeptTiles | None,  # None: neither hidden nor weight needs a gradient
        head: Callable[[], Tensor],  # the [W, H] weight of these columns
        places: slice | Tensor,  # where the first of them stand in the bias
        values: Tensor,  # float32 [R, W], which may be written over
        write: Callable[[Tensor], None],  # writes the gradient by the values into what it is given
    ) -> bool:
        """Puts a chunk's gradient to the tiles of its kind; whether they are complete."""
        # A bias's gradient is a sum that 16-bit terms would spoil, and float16 needs the gradient's range first.
        direct = kept is not None and self.bias_gradient is None and self.operand_dtype != torch.float16
        out = kept.next(len(values), head) if direct else values
        write(out)
        if self.bias_gradient is not None:
            by_column = out.sum(0)
            self.bias_gradient[places] += by_column if isinstance(places, slice) else by_column[: len(places)]
        if kept is None:
            return False
        if self.operand_dtype == torch.float16:
            kept.add_scaled(out, head)
        elif not direct:
            kept.next(len(out), head).copy_(out)
        return kept.written(head)

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        raw = pick(self.hidden, rows, self.head.weight.detach(), ids)
        return self._finish(raw, None if self._bias is None else self._bias[ids])

    def add_pick(self, rows: Tensor, ids: Tensor, gradient: Tensor) -> None:
        if self.hidden_gradient is not None:
            add_hidden_gradient(self.hidden_gradient, gradient, rows, self.head.weight.detach(), ids)
        if self._needs_weight or self.bias_gradient is not None:
            each = rows[:, None].expand_as(ids)
            self._entries.append((each.flatten(), ids.flatten(), gradient.flatten()))

    def pick_same(self, rows: Tensor, ids: Tensor) -> Tensor:
        return self.pick(rows, ids.expand(len(rows), -1))

    def add_pick_same(self, rows: Tensor, ids: Tensor, gradient: Tensor) -> None:
        """As `add_pick`; the ids, always those of the classes, are few: a product of their own makes the weight's gradient."""
        if self.hidden_gradient is not None:
            each = ids.expand(len(rows), -1)
            add_hidden_gradient(self.hidden_gradient, gradient, rows, self.head.weight.detach(), each)
        if self._needs_weight:
            # A row without a gradient is not read: what lies there cannot spread.
            hidden = self.hidden[rows].to(self.dtype).masked_fill_((gradient == 0).all(dim=1, keepdim=True), 0)
            made = gradient.T @ hidden
            self._class_weight = made if self._class_weight is None else self._class_weight.add_(made)
        if self.bias_gradient is not None:
            self.bias_gradient[ids] += gradient.sum(0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        entries = self._take_entries()
        if entries is not None and self.weight_gradient is not None:
            gradient, ids, rows = entries
            add_weight_gradient(self.weight_gradient, gradient, self.hidden, rows, ids)
        if self._class_weight is not None:
            self.weight_gradient[self.classes.ids] += self._class_weight
        return super().gradients()

    def _take_entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The entries' gradient, ids and rows, float32 and int64 [E], added to the bias's gradient; None if there are none."""
        if not self._entries:
            return None
        rows, ids, gradient = map(torch.cat, zip(*self._entries, strict=True))
        self._entries.clear()
        if self.bias_gradient is not None:
            add_repeated(self.bias_gradient, ids, gradient)
        return gradient, ids, rows
