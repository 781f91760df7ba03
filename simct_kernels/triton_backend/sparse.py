"""The losses that choose few of the shared tokens, in Triton: `top_k` and a served teacher's k best.

The plan of the PyTorch backend's jobs, whose chunk reads the chosen columns by indexed products, with their gradients
(`indexed`), and takes the divergence in one launch (`small`). Whole rows, which longer units need for their
log-sum-exps, are raw products, or the given logits where they lie: kernels finish what they read. Their gradient is a
softmax over the vocabulary and, apart from it, the chosen columns' own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simct_kernels import torch_backend
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.classes import gather, take_classes
from simct_kernels.torch_backend.job import Steps
from simct_kernels.torch_backend.plan import Chunk, Part
from simct_kernels.torch_backend.rows import LogitRows, padded, product
from simct_kernels.torch_backend.scores import Scores, by_terms, continuation_scores
from simct_kernels.triton_backend import small
from simct_kernels.triton_backend.columns import columns_of
from simct_kernels.triton_backend.indexed import IndexedRows
from simct_kernels.triton_backend.kept import HeadGradient, KeptTiles
from simct_kernels.triton_backend.rows import row_logsumexp
from simct_kernels.triton_backend.scores import Side
from simct_kernels.triton_backend.softmax import write_softmax


class _LinearRows(IndexedRows):
    """As its base, where `whole` gives raw products [R, V], whose gradient tiles are kept (see kept.py)."""

    def __init__(self, hidden, head, shared_ids, dtype, *, needs_grad=(False, False, False)) -> None:
        super().__init__(hidden, head, shared_ids, dtype, needs_grad=(needs_grad[0], False, needs_grad[2]))
        self._needs_weight = needs_grad[1]
        self._kept: KeptTiles | None = None

    def expect(self, parts: list[Part]) -> None:
        whole = [part.rows for part in parts if part.whole]
        if whole and (self._needs_weight or self.hidden_gradient is not None):
            needs = self.hidden, self.operand_dtype, self.hidden_gradient, self._needs_weight, False
            self._kept = KeptTiles(torch.cat(whole), list(map(len, whole)), self.columns, *needs)

    def whole(self, rows: Tensor) -> Tensor:
        values = padded(len(rows), self.columns, self.dtype, rows.device)
        return product(self.hidden[rows].to(self.operand_dtype), self._whole_head().T, values)

    def places(self, rows: Tensor) -> Tensor:  # int64 [R], where `whole` has these rows
        return torch.arange(len(rows), device=rows.device)

    def logsumexp(self, values: Tensor, rows: Tensor) -> Tensor:  # [R]
        return row_logsumexp(self._side(values))

    def read(self, values: Tensor, places: Tensor, ids: Tensor) -> Tensor:  # [K] or [R, k] ids -> [R, K] or [R, k]
        return self._finish(values[places[:, None], ids], None if self._bias is None else self._bias[ids])

    def add_softmax(self, rows: Tensor, values: Tensor, logsumexp: Tensor, by_logsumexp: Tensor) -> None:
        """Adds by_logsumexp [R] times the softmax of the rows, which it may write over `values`."""

        def write(out: Tensor) -> None:
            write_softmax(out, self._side(values), None, logsumexp, by_logsumexp)

        self.write_kept(self._kept, self._whole_head, slice(None), values, write)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._needs_weight:
            # In float32: the picked columns are added to it.
            shape, placed = self.head.weight.shape, columns_of(self.shared_ids)
            head = HeadGradient(shape, self.shared_ids, placed, None, self._kept, None, self.hidden)
            self.weight_gradient = head.make(None, self.dtype)
        return super().gradients()

    def _side(self, values: Tensor) -> Side:
        scale = None if self.head.scale == 1 else float(self.head.scale)
        return Side(values, None, self._bias, scale, self.head.softcap)


class _LogitRows(LogitRows):
    """As its base, where `whole` gives all the logits [N, V] as they are."""

    def whole(self, rows: Tensor) -> Tensor:
        return self.logits

    def places(self, rows: Tensor) -> Tensor:
        return rows

    def logsumexp(self, values: Tensor, rows: Tensor) -> Tensor:
        wanted = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        wanted[rows] = True
        return row_logsumexp(Side(values), wanted)[rows]

    def read(self, values: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return values[places[:, None], ids].to(self.dtype)

    def add_softmax(self, rows: Tensor, values: Tensor, logsumexp: Tensor, by_logsumexp: Tensor) -> None:
        """As of `_LinearRows`. Nothing was added to these rows before: a row belongs to one unit."""
        write_softmax(self.gradient, Side(values), rows, logsumexp, by_logsumexp)


class _KernelSteps(Steps):
    linear_rows = _LinearRows
    logit_rows = _LogitRows
    divergence = staticmethod(small.divergence)

    def run(self, student_input: Tensor, *arguments) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.cuda.device_of(student_input):  # Triton launches on the current device
            return super().run(student_input, *arguments)

    def candidate_scores(
        self,
        source: _LinearRows | _LogitRows,
        part: Part,
        chunk: Chunk,
        options: LossOptions,
        columns: Tensor | None = None,  # int64 [g, k], candidates; None: the K shared ones
    ) -> Scores:
        if not part.whole:
            return torch_backend.candidate_scores(source, part, chunk, options, columns)
        values, places = source.whole(part.rows), source.places(part.rows)
        logsumexp = source.logsumexp(values, part.rows)
        first_logsumexp = logsumexp[part.first]
        ids, classes = source.shared_ids, None
        if columns is not None:
            ids = ids[columns if source.classes is None else columns.clamp(max=len(ids) - 1)]
        shared = source.read(values, places[part.first], ids)
        if options.normalises:
            shared -= first_logsumexp[:, None]
        if source.classes is not None:
            members = source.read(values, places[part.first], source.classes.ids)
            classes = source.classes.scores(members, first_logsumexp if options.normalises else None)
            if columns is not None:
                shared = gather(shared, classes, columns, len(source.shared_ids), picked=True)
        continuation = targets = None
        if chunk.has_continuation:
            targets = source.read(values, places, part.tokens[:, None]).squeeze(1)
            continuation = continuation_scores(targets - logsumexp if options.normalises else targets, part, options)
        return Scores(shared, continuation, targets, values, logsumexp, first_logsumexp, classes)

    def add_gradient(
        self,
        student: _LinearRows | _LogitRows,
        chunk: Chunk,
        scores: Scores,
        s: Tensor,  # [g, C]
        chosen: Tensor,  # int64 [g, C]
        picks: bool,
        by_shared: Tensor,  # [g, C]
        by_continuation: Tensor,  # [g]
        options: LossOptions,
        by_class: None = None,  # the classes are among the chosen
    ) -> None:
        if scores.logits is None:
            arguments = student, chunk, scores, s, chosen, picks, by_shared, by_continuation, options
            return torch_backend.add_gradient(*arguments)
        part = chunk.student
        by_target = by_terms(by_continuation, part, options)
        by_logsumexp = -by_target
        by_logsumexp[part.first] += by_continuation
        student.add_softmax(part.rows, scores.logits, scores.logsumexp, by_logsumexp)
        classes = scores.classes
        if classes is not None:
            by_class, chosen = take_classes(by_shared, chosen, len(student.shared_ids), student.classes.count)
            by_members = classes.by_members(by_class) * student.slope(classes.members)
            student.add_pick_same(part.first_rows, student.classes.ids, by_members)
        slope = student.slope(s + scores.first_logsumexp[:, None])
        student.add_pick(part.first_rows, student.shared_ids[chosen], by_shared * slope)
        student.add_pick(part.rows, part.tokens[:, None], (by_target * student.slope(scores.targets))[:, None])


class TopKJob(_KernelSteps, torch_backend.LossJob):
    """For `top_k` smaller than K."""


class ServedJob(_KernelSteps, torch_backend.topk_job):
    """For a served teacher."""
