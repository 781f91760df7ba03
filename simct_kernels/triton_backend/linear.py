"""SimCT's loss from hidden states and heads: the chunks and products of the PyTorch backend, the rest in kernels.

cuBLAS makes the two tiles of raw products of a chunk; the kernels finish them (bias, scale, soft-cap) wherever they read
them, so that a tile is written once by the product, read once for the losses and once more for the gradient, which goes to
where its products will read it, when all chunks have theirs (see kept.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels import torch_backend
from simct_kernels.torch_backend.plan import Chunk, Part
from simct_kernels.torch_backend.rows import Pending, product, row_size
from simct_kernels.triton_backend.candidates import Candidates, UnitRows, Units, divergence
from simct_kernels.triton_backend.columns import Columns, columns_of, tables
from simct_kernels.triton_backend.gradient import write_gradient
from simct_kernels.triton_backend.indexed import IndexedRows
from simct_kernels.triton_backend.kept import HeadGradient, KeptTiles
from simct_kernels.triton_backend.scores import Side


class _RawRows(IndexedRows):
    """As IndexedRows, but `shared` and `whole` read raw products, [R, K'] and [R, V], which the next read writes over.

    K' is K or a little more: see Columns.padded. Consecutive ids read the head where it lies.
    """

    def __init__(self, hidden, head, shared_ids, dtype, *, needs_grad=(False, False, False), by_chunk=False) -> None:
        of_hidden, self.of_weight, of_bias = needs_grad
        super().__init__(hidden, head, shared_ids, dtype, needs_grad=(of_hidden, False, of_bias))
        self._needs_weight = self.of_weight
        self.by_chunk = by_chunk
        self.placed = columns_of(shared_ids)
        first, self.shared_width = self.placed.first, len(self.placed.padded)
        if first is not None and first + self.shared_width > self.columns:
            self.shared_width = len(shared_ids)
        # Whose rows and bias the columns of `shared` are.
        self._shared_places = self.placed.padded if first is None else slice(first, first + self.shared_width)
        self._shared_kept: KeptTiles | None = None
        self._whole_kept: KeptTiles | None = None
        self._values: Tensor | None = None  # float32, flat: the largest chunk's products

    def expect(self, parts: list[Part]) -> None:
        """Makes room for the largest chunk and, where a gradient is needed, for all gradient tiles."""
        sizes = [
            len(part.rows) * row_size(self.columns)
            if part.whole
            else len(part.first_rows) * row_size(self.shared_width)
            for part in parts
        ]
        self._values = torch.empty(max(sizes), dtype=torch.float32, device=self.hidden.device)
        if self.hidden_gradient is None and not self.of_weight:
            return
        common = self.hidden, self.operand_dtype, self.hidden_gradient, self.of_weight, self.by_chunk
        shared = [part.first_rows for part in parts if not part.whole]
        whole = [part.rows for part in parts if part.whole]
        if shared:
            self._shared_kept = KeptTiles(torch.cat(shared), list(map(len, shared)), self.shared_width, *common)
        if whole:
            self._whole_kept = KeptTiles(torch.cat(whole), list(map(len, whole)), self.columns, *common)

    def shared(self, rows: Tensor) -> Tensor:
        return self._logits(rows, self._shared_head(), None)

    def unit_rows(self, chunk: Chunk, part: Part) -> UnitRows:
        """The logits of this side that a chunk's units need, and where each unit's are."""
        scale = None if self.head.scale == 1 else float(self.head.scale)
        classes = None
        if self.classes is not None:
            classes = self.classes.scores(self.pick_same(part.first_rows, self.classes.ids), None)
        if part.whole:
            side = Side(self.whole(part.rows), self.placed.ids, self._bias, scale, self.head.softcap)
            rest = self.placed.rest(self.columns)
            return UnitRows(side, part.first, part.first, part.length, part.tokens, None, part.unit, rest, classes)
        bias = None if self._bias is None else self._bias[self._shared_places]
        side = Side(self.shared(part.first_rows), None, bias, scale, self.head.softcap)
        targets = self.pick(part.rows, part.tokens[:, None]).squeeze(1) if chunk.has_continuation else None
        rows = torch.arange(len(part.first), device=part.first.device)
        return UnitRows(side, rows, part.first, part.length, None, targets, classes=classes)

    def write_gradient(
        self,
        part: Part,
        teacher: Columns | None,  # None: its shared columns were read
        candidates: Candidates,
        units: Units,
        weights: Tensor | None,  # [g]
        options,
    ) -> None:
        """The gradient by the logits that `unit_rows` read."""
        values = candidates.student.side.values
        found = tables(self.placed, teacher, self.columns if part.whole else None)
        kept, head = self._whole_kept, self._whole_head
        if not part.whole:
            kept, head = self._shared_kept, self._shared_head
        places = slice(None) if part.whole else self.shared_ids

        def write(out: Tensor) -> None:
            write_gradient(out, found, candidates, units, weights, options)

        complete = self.write_kept(kept, head, places, values, write)
        if complete and not part.whole:
            self._shared_weight = None  # no chunk reads it any more: those of whole rows come last

    def gradients(self) -> tuple[Tensor | None, Pending | None, Tensor | None]:
        self._values = None
        entries = self._take_entries()
        weight = None
        if self.of_weight:
            kept = self._shared_kept, self._whole_kept
            shape = self.head.weight.shape
            classes = None if self._class_weight is None else (self.classes.host_ids, self._class_weight)
            weight = HeadGradient(shape, self.shared_ids, self.placed, *kept, entries, self.hidden, classes)
        return self.hidden_gradient, weight, self.bias_gradient

    def _shared_head(self) -> Tensor:  # [K', H]
        if self._shared_weight is None:
            if self.placed.first is None:
                self._shared_weight = self.head.rows(self.placed.padded, self.operand_dtype)
            else:
                self._shared_weight = self.head.weight.detach()[self._shared_places].to(self.operand_dtype)
        return self._shared_weight

    def _logits(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        height, width = len(rows), len(weight)
        values = self._values[: height * row_size(width)].view(height, -1)[:, :width]
        return product(self.hidden[rows].to(self.operand_dtype), weight.T, values)


@dataclass(frozen=True)
class LinearJob(torch_backend.LossJob):
    """As its base, with a chunk's losses and gradient made by kernels. Without top_k."""

    def linear_rows(self, *arguments, **needs) -> _RawRows:
        return _RawRows(*arguments, by_chunk=self.chunk_rows != "auto", **needs)

    def run(self, student_input: Tensor, *arguments) -> tuple[Tensor, tuple[Tensor | Pending | None, ...]]:
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

        part = chunk.student
        placed = teacher.placed if chunk.teacher.whole else None
        student.write_gradient(part, placed, candidates, units, weights, options)
        if not part.whole and chunk.has_continuation:
            by_target = units.weighted(weights, units.by_continuation)[part.unit]
            if options.score != "sum_logprob":
                by_target = by_target / part.length[part.unit]
            by_target = by_target * student.slope(candidates.student.targets)
            student.add_pick(part.rows, part.tokens[:, None], by_target[:, None])
        classes = candidates.student.classes
        if classes is not None:
            by_members = units.by_members(weights, classes) * student.slope(classes.members)
            student.add_pick_same(part.first_rows, student.classes.ids, by_members)
        return units.losses
