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

from .. import torch_backend
from ..options import LossOptions
from ..torch_plan import Chunk, Part
from ..torch_rows import LinearRows, product
from .candidates import Candidates, divergence
from .columns import columns_of
from .gradient import Layout, write_gradient
from .rows import continuation_scores, row_logsumexp
from .scores import Side


class _RawRows(LinearRows):
    """As LinearRows, but `shared` and `whole` read raw products, and `shared` pads them: see Columns.padded."""

    def __init__(self, hidden, head, shared_ids, dtype, **needs) -> None:
        super().__init__(hidden, head, shared_ids, dtype, **needs)
        self.placed = columns_of(shared_ids)

    def side(self, part: Part) -> tuple[Side, Tensor]:
        """The logits that a chunk's units need, and the row of each unit's candidates [g] among them."""
        scale = None if self.head.scale == 1 else float(self.head.scale)
        if part.whole:
            return Side(self.whole(part.rows), self.placed.ids, self._bias, scale, self.head.softcap), part.first
        bias = None if self._bias is None else self._bias[self.placed.padded]
        rows = torch.arange(len(part.first), device=part.first.device)
        return Side(self.shared(part.first_rows), None, bias, scale, self.head.softcap), rows

    def gradient_like(self, values: Tensor) -> Tensor:
        """Where to write the gradient by `values`: over them, unless the products would copy it in 16 bits at once.

        A bias's gradient is a sum that 16-bit terms would spoil.
        """
        if self.operand_dtype == self.dtype or self.bias_gradient is not None:
            return values
        return torch.empty_like(values, dtype=self.operand_dtype)

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
        student_side, student_rows = student.side(chunk.student)
        teacher_side, teacher_rows = teacher.side(chunk.teacher)
        student_logsumexp = row_logsumexp(student_side) if chunk.student.whole else None
        teacher_logsumexp = row_logsumexp(teacher_side) if chunk.teacher.whole else None
        student_continuation = teacher_continuation = targets = left_out = None
        if chunk.has_continuation:
            student_continuation, targets = _continuation(
                student, student_side, chunk.student, student_logsumexp, options
            )
            teacher_continuation, _ = _continuation(teacher, teacher_side, chunk.teacher, teacher_logsumexp, options)
        if chunk.left_out is not None:
            left_out = torch.zeros(len(chunk.units), len(self.shared), dtype=torch.bool, device=student_rows.device)
            left_out[chunk.left_out[:, 0], chunk.left_out[:, 1]] = True
        candidates = Candidates(
            student_side,
            student_rows,
            teacher_side,
            teacher_rows,
            len(self.shared),
            student_continuation,
            teacher_continuation,
            left_out,
            None if left_out is None else torch.arange(len(chunk.units), device=student_rows.device),
            None if options.teacher_mass_floor is None else teacher_logsumexp,
        )
        units = divergence(candidates, options)
        if not needs_grad:
            return units.losses

        out, part = student.gradient_like(student_side.values), chunk.student
        if part.whole:
            index = student.placed.index(student.columns)
            layout = Layout(index, part.unit, part.first, part.length, part.tokens, None, student_logsumexp)
            write_gradient(out, layout, candidates, units, weights, options)
            student.add_whole(part.rows, out)
        else:
            write_gradient(out, Layout(None), candidates, units, weights, options)
            student.add_shared(part.first_rows, out)
            if chunk.has_continuation:
                by_target = units.weighted(weights, units.by_continuation)[part.unit]
                if options.score != "sum_logprob":
                    by_target = by_target / part.length[part.unit]
                student.add_pick(part.rows, part.tokens[:, None], (by_target * student.slope(targets))[:, None])
        return units.losses


def _continuation(
    source: _RawRows, side: Side, part: Part, logsumexp: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor | None]:
    """One side's continuation scores [g], and, where only shared columns were read, the logits [R] they are made of."""
    if part.whole:
        logsumexp = logsumexp if options.normalises else None
        return continuation_scores(side, part.first, part.length, part.tokens, logsumexp, options.score), None
    targets = source.pick(part.rows, part.tokens[:, None])
    return continuation_scores(Side(targets), part.first, part.length, None, None, options.score), targets.squeeze(1)
