"""`LinearRows` for the CPU: products by blocks of a head's rows, so that no copy of a head is ever made.

A block's rows of the head are gathered, or widened where they have 16 bits, just before they are multiplied. Where the ids
are consecutive and nothing is widened, one product reads the head where it lies: on a busy machine every product waits for
the slower of its threads, and few large ones suffer less than many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from simct_kernels.torch_backend.plan import Part
from simct_kernels.torch_backend.rows import LinearRows

# Rows of the head in a block that is copied. Measured on the CPU (AVX2, 32 MB of cache, H of 2,304, float32): blocks of 512
# to 1,024 are 3 to 10 % faster than those of 256 or 2,048.
BLOCK = 1024


class BlockedRows(LinearRows):
    """As LinearRows, one block of columns after the other. After `expect` a read writes over the one before it: memory
    of that size that is asked for anew is mapped anew, page by page, which takes a fifth of the product's time."""

    _values: Tensor | None = None  # flat: the largest chunk's logits

    def expect(self, parts: list[Part]) -> None:
        shared, columns = len(self.shared_ids), self.columns
        sizes = [len(part.rows) * columns if part.whole else len(part.first_rows) * shared for part in parts]
        self._values = torch.empty(max(sizes, default=0), dtype=self.dtype, device=self.hidden.device)

    def shared(self, rows: Tensor) -> Tensor:
        return self._made(rows, self.shared_ids)

    def whole(self, rows: Tensor) -> Tensor:
        return self._made(rows, None)

    def add_shared(self, rows: Tensor, gradient: Tensor) -> None:
        self._add(rows, gradient, self.shared_ids)

    def add_whole(self, rows: Tensor, gradient: Tensor) -> None:
        self._add(rows, gradient, None)

    def _made(self, rows: Tensor, ids: Tensor | None) -> Tensor:
        hidden = self.hidden[rows].to(self.dtype)
        shape = len(rows), self.columns if ids is None else len(ids)
        size = math.prod(shape)
        kept = self._values is not None and size <= len(self._values)
        logits = self._values[:size].view(shape) if kept else hidden.new_empty(shape)
        for columns, block in self._blocks(ids):
            raw = logits[:, columns]
            torch.mm(hidden, self._weight(block).T, out=raw)
            self._finish(raw, None if self._bias is None else self._bias[block])
        return logits

    def _add(self, rows: Tensor, gradient: Tensor, ids: Tensor | None) -> None:
        hidden = self.hidden[rows].to(self.dtype)
        hidden_gradient = torch.zeros_like(hidden)
        for columns, block in self._blocks(ids):
            part = gradient[:, columns]
            if self.hidden_gradient is not None:
                torch.addmm(hidden_gradient, part, self._weight(block), out=hidden_gradient)
            if self.weight_gradient is not None:
                # A view that is added to in place where the block is a slice, else a copy that is put back.
                total = _rows_of(self.weight_gradient, block)
                torch.addmm(total, part.T, hidden, out=total)
                if not isinstance(block, slice):
                    self.weight_gradient.index_copy_(0, block, total)
            if self.bias_gradient is not None:
                self.bias_gradient[block] += part.sum(0)
        if self.hidden_gradient is not None:
            self.hidden_gradient[rows] += hidden_gradient

    def _weight(self, block: slice | Tensor) -> Tensor:  # [b, H]
        return _rows_of(self.head.weight.detach(), block).to(self.dtype)

    def _blocks(self, ids: Tensor | None) -> Iterator[tuple[slice, slice | Tensor]]:
        """The columns of each block of logits, and the head's rows that they are made of: all, or those named by ids."""
        offset = 0 if ids is None else _first_of_range(ids)
        count = self.columns if ids is None else len(ids)
        size = count if offset is not None and self.head.weight.dtype == self.dtype else BLOCK
        for start in range(0, count, size):
            end = min(start + size, count)
            block = ids[start:end] if offset is None else slice(offset + start, offset + end)
            yield slice(start, end), block


def _rows_of(matrix: Tensor, block: slice | Tensor) -> Tensor:
    return matrix[block] if isinstance(block, slice) else matrix.index_select(0, block)


def _first_of_range(ids: Tensor) -> int | None:
    """The first of ids that are consecutive; else None."""
    first, last = int(ids[0]), int(ids[-1])
    is_range = last - first == len(ids) - 1 and bool((ids.diff() == 1).all())
    return first if is_range else None
