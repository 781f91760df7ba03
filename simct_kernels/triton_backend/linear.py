"""SimCT's loss from hidden states and heads: the chunks and products of the PyTorch backend, the rest in kernels.

cuBLAS makes the two tiles of raw products of a chunk; the kernels finish them (bias, scale, soft-cap) wherever they read
them, so that a tile is written once by the product, read once for the losses and once more for the gradient, which is
written over it, or beside it where the gradient's products want 16-bit operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simct_kernels import torch_backend
from simct_kernels.torch_backend.plan import Chunk, Part
from simct_kernels.torch_backend.rows import LinearRows, product
from simct_kernels.triton_backend.candidates import Candidates, UnitRows, divergence
from simct_kernels.triton_backend.columns import columns_of
from simct_kernels.triton_backend.gradient import write_gradient
from simct_kernels.triton_backend.indexed import IndexedRows
from simct_kernels.triton_backend.scores import Side


class _RawRows(IndexedRows):
    """As IndexedRows, but `shared` and `whole` read raw products, and `shared` pads them: see Columns.padded."""

    def __init__(self, hidden, head, shared_ids, dtype, **needs) -> None:
        super().__init__(hidden, head, shared_ids, dtype, **needs)
        self.placed = columns_of(shared_ids)

    def unit_rows(self, chunk: Chunk, part: Part) -> UnitRows:
        """The logits of this side that a chunk's units need, and where each unit's are."""
        scale = None if self.head.scale == 1 else float(self.head.scale)
        if part.whole:
            side = Side(self.whole(part.rows), self.placed.ids, self._bias, scale, self.head.softcap)
            rest = self.placed.rest(self.columns)
            return UnitRows(side, part.first, part.first, part.length, part.tokens, unit=part.unit, rest=rest)
        bias = None if self._bias is None else self._bias[self.placed.padded]
        side = Side(self.shared(part.first_rows), None, bias, scale, self.head.softcap)
        targets = self.pick(part.rows, part.tokens[:, None]).squeeze(1) if chunk.has_continuation else None
        rows = torch.arange(len(part.first), device=part.first.device)
        return UnitRows(side, rows, part.first, part.length, None, targets)

    def add_shared(self, rows: Tensor, gradient: Tensor) -> None:
        if self.weight_gradient is not None and self._shared_weight_gradient is None:
            self._shared_weight_gradient = torch.zeros(
                len(self.placed.padded), self.width, dtype=self.dtype, device=gradient.device
            )
        self._add_products(rows, gradient, self._shared_head, self._shared_weight_gradient)
        if self.bias_gradient is not None:
            self.bias_gradient[self.shared_ids] += gradient.sum(0)[: len(self.shared_ids)]

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._shared_weight_gradient is not None:
            self._shared_weight_gradient = self._shared_weight_gradient[: len(self.shared_ids)]
        return super().gradients()

    def _shared_head(self) -> Tensor:  # [K', H]
        if self._shared_weight is None:
            self._shared_weight = self.head.rows(self.placed.padded, self.operand_dtype)
        return self._shared_weight

    def _logits(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(self.hidden[rows].to(self.operand_dtype), weight.T)


@dataclass(frozen=True)
class LinearJob(torch_backend.LossJob):
    """As its base, with a chunk's losses and gradient made by kernels. Without top_k."""

    linear_rows: ClassVar[type[LinearRows]] = _RawRows

    def run(self, student_input: Tensor, *arguments) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.cuda.device_of(student_input):  # Triton launches on the current device
            return super().run(student_input, *arguments)

    def _run_chunk(
        self,
        chunk: Chunk,
        student: _RawRows,
        teacher: _RawRows,
        picks: bool,
        needs_grad: bool,
        weights: Tensor | None,  # [g]
    ) -> Tensor:
        options = self.options
        left_out = None
        if chunk.left_out is not None:
            left_out = torch.zeros(len(chunk.units), len(self.shared), dtype=torch.bool, device=chunk.units.device)
            left_out[chunk.left_out[:, 0], chunk.left_out[:, 1]] = True
        candidates = Candidates(
            student.unit_rows(chunk, chunk.student),
            teacher.unit_rows(chunk, chunk.teacher),
            len(self.shared),
            chunk.has_continuation,
            left_out,
            None if left_out is None else torch.arange(len(chunk.units), device=chunk.units.device),
        )
        units = divergence(candidates, options)
        if not needs_grad:
            return units.losses

        out, part = student.gradient_like(candidates.student.side.values), chunk.student
        if part.whole:
            index = student.placed.index(student.columns)
            write_gradient(out, index, candidates, units, weights, options)
            student.add_whole(part.rows, out)
        else:
            write_gradient(out, None, candidates, units, weights, options)
            student.add_shared(part.first_rows, out)
            if chunk.has_continuation:
                by_target = units.weighted(weights, units.by_continuation)[part.unit]
                if options.score != "sum_logprob":
                    by_target = by_target / part.length[part.unit]
                by_target = by_target * student.slope(candidates.student.targets)
                student.add_pick(part.rows, part.tokens[:, None], by_target[:, None])
        return units.losses
