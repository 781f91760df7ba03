"""Gradient tiles that are kept until all rows of a kind have theirs, and the products that they then make at full height.

Products of a chunk's rows are short in the dimension that they sum over, so that adding them up costs more traffic than they
do. The tiles of all rows, in the 16 bits that the products read anyway, take less memory than the sum of the chunks' products
in float32 would: then one product makes the gradient by the hidden states, and one, a range of the vocabulary at a time,
that by the head, which is rounded where it is made. Where they would take more, groups of chunks add theirs up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from simct_kernels.torch_backend.rows import PAD, as_operand, padded, product
from simct_kernels.triton_backend.columns import Columns
from simct_kernels.triton_backend.combine import combine
from simct_kernels.triton_backend.indexed import add_weight_gradient

# The tiles of one kind are kept whole up to this many bytes, or as many as the float32 sum of products would take, whichever is
# more; beyond, a group of chunks holds half of it.
KEPT_BYTES = 5 << 28
# Elements of a range of the head's rows, whose gradient is added up in float32 (128 MiB) before it is rounded to its place.
RANGE_ELEMENTS = 1 << 25


class KeptTiles:
    """The gradient by the logits of the R rows of one kind, W columns, in the order in which their chunks come."""

    def __init__(
        self,
        rows: Tensor,  # int64 [R], no row twice
        heights: list[int],  # of the chunks; their sum is R
        width: int,  # W
        hidden: Tensor,  # [N, H]
        dtype: torch.dtype,  # of the products' operands
        hidden_gradient: Tensor | None,  # float32 [N, H], which the products are added to; None: it is not needed
        needs_weight: bool,
        by_chunk: bool,  # whether a chunk's products are made at once where the weight needs no gradient
    ) -> None:
        self.rows, self.width, self.needs_weight = rows, width, needs_weight
        self.hidden = hidden[rows].to(dtype)
        self.hidden_gradient = hidden_gradient
        self._total: Tensor | None = None  # float32 [W, H], the products of the groups before this one
        self._begin = self._end = 0  # the rows of this group
        row_bytes, total_bytes = width * dtype.itemsize, 4 * width * hidden.shape[1]
        capacity, largest = sum(heights), max(heights)
        if dtype == torch.float16 or (by_chunk and not needs_weight):
            capacity = largest  # float16: each chunk has a scale of its own
        elif capacity * row_bytes > max(KEPT_BYTES, total_bytes if needs_weight else 0):
            capacity = max(largest, KEPT_BYTES // 2 // row_bytes)
        self._capacity = capacity
        self._tiles: Tensor | None = None  # [capacity, W], made when the first chunk asks for its place

    def next(self, height: int, head: Callable[[], Tensor]) -> Tensor:
        """Where a chunk's gradient goes, [height, W], in the operands' dtype; `head` gives the [W, H] weight."""
        if self._tiles is None:
            self._tiles = padded(self._capacity, self.width, self.hidden.dtype, self.hidden.device)
        if self._end - self._begin + height > self._capacity:
            self._multiply(head)
        place = self._end - self._begin
        self._end += height
        return self._tiles[place : place + height]

    def written(self, head: Callable[[], Tensor]) -> bool:
        """After a chunk's gradient was written to `next`. With the last one, all products but what `weight` makes are made,
        and what it does not read is let go of: then true."""
        if self._end < len(self.rows):
            return False
        if self._end > self._begin:
            self._multiply(head)
        if not self.needs_weight or self._total is not None:
            self._tiles = None
        return True

    def _multiply(self, head: Callable[[], Tensor], unit: Tensor | None = None) -> None:
        """This group's products, but that with the hidden states if it is the only one; `unit` multiplies them."""
        tiles, rows = self._tiles[: self._end - self._begin], slice(self._begin, self._end)
        only = len(tiles) == len(self.rows) and unit is None
        self._begin = self._end
        if self.hidden_gradient is not None:
            made = product(tiles, head())
            self.hidden_gradient[self.rows[rows]] += made if unit is None else made.mul_(unit)
        if only or not self.needs_weight:
            return
        if self._total is None:
            self._total = torch.zeros(self.width, self.hidden.shape[1], dtype=torch.float32, device=tiles.device)
        for begin, end in ranges(self.width, self.hidden.shape[1]):
            made = product(tiles[:, begin:end].T, self.hidden[rows])
            self._total[begin:end] += made if unit is None else made.mul_(unit)

    def add_scaled(self, gradient: Tensor, head: Callable[[], Tensor]) -> None:
        """A chunk's gradient, float32 [height, W], whose float16 operands need a scale."""
        tiles = self.next(len(gradient), head)
        operand, unit = as_operand(gradient, tiles.dtype)
        tiles.copy_(operand)
        self._multiply(head, unit)

    def weight(
        self,
        begin: int,
        end: int,
        out: Tensor,  # float32 [end - begin, H]
    ) -> Tensor:
        """The gradient by these rows of the [W, H] head, after all chunks; written to `out`."""
        if self._total is not None:
            return out.copy_(self._total[begin:end])
        return product(self._tiles[:, begin:end].T, self.hidden, out)


class HeadGradient:
    """The gradient by a head's weight [V, H], made when its scale is known, and rounded once."""

    def __init__(
        self,
        shape: torch.Size,
        shared_ids: Tensor,  # int64 [K]
        placed: Columns,
        shared: KeptTiles | None,  # of the shared rows, in their order
        whole: KeptTiles | None,  # of all rows
        entries: tuple[Tensor, Tensor, Tensor]
        | None,  # float32 [E] gradients by logits, their ids and rows of `hidden`
        hidden: Tensor,  # [N, H]
        classes: tuple[list[int], Tensor]
        | None = None,  # ids, and the gradient float32 [M, H] of their rows of the head
    ) -> None:
        self.shape, self.shared_ids, self.placed, self.classes = shape, shared_ids, placed, classes
        self.shared, self.whole, self.entries, self.hidden = shared, whole, entries, hidden

    def make(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """scale times the gradient, [V, H]. The float32 sums are scaled before they are rounded to `dtype`."""
        device = self.shared_ids.device
        # In a backward pass none of these is as it was in the forward pass.
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.cuda.device_of(self.hidden):
            return self._make(scale, torch.empty(self.shape, dtype=dtype, device=device))

    def _make(self, scale: Tensor | None, out: Tensor) -> Tensor:
        options = {"dtype": torch.float32, "device": out.device}
        parts, width = ranges(*self.shape), self.shape[1]
        picked = self.entries is not None or self.classes is not None
        alone = scale is None and out.dtype == torch.float32 and self.shared is None and not picked
        height = max(end - begin for begin, end in parts)
        sums = None
        if not alone and (self.whole is not None or picked):
            sums = torch.empty(height, width, **options)
        edges = torch.tensor([begin for begin, _ in parts] + [self.shape[0]], dtype=torch.int64, device="cpu")
        bounds = list(itertools.pairwise(torch.searchsorted(self.placed.host_ids.contiguous(), edges).tolist()))
        most = max(high - low for low, high in bounds)
        made = None if self.shared is None else torch.empty(most + 2 * PAD, width, **options)
        index = None if self.shared is None else self.placed.index(self.shape[0])
        for (begin, end), (low, high) in zip(parts, bounds, strict=True):
            whole = out[begin:end] if alone else None if sums is None else sums[: end - begin]
            if self.whole is not None:
                self.whole.weight(begin, end, whole)
            elif whole is not None:
                whole.zero_()
            if alone:
                continue
            if self.entries is not None:
                self._add_entries(begin, end, whole)
            for i, row in zip(*(self.classes or ((), ())), strict=True):
                if begin <= i < end:
                    whole[i - begin] += row
            # A product whose operand begins at an odd element would be read element by element: a few more are made.
            shared = None
            if self.shared is not None and high > low:
                low, high = low // PAD * PAD, min(self.shared.width, -(-high // PAD) * PAD)
                shared = self.shared.weight(low, high, made[: high - low])
            combine(out[begin:end], whole, shared, index, scale, begin, low, len(self.shared_ids))
        return out

    def _add_entries(self, begin: int, end: int, sums: Tensor) -> None:
        gradient, ids, rows = self.entries
        inside = (ids >= begin) & (ids < end)
        ids = (ids - begin).clamp_(0, end - begin - 1)
        add_weight_gradient(sums, gradient.masked_fill(~inside, 0), self.hidden, rows, ids)


def ranges(rows: int, width: int) -> list[tuple[int, int]]:
    """Cuts a [rows, width] matrix into ranges of RANGE_ELEMENTS, whose bounds are multiples of 1,024 rows."""
    step = max(1024, RANGE_ELEMENTS // width // 1024 * 1024)
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
