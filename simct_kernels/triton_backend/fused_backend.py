"""`linear_simct_loss` with fused tiles, `backend="triton_fused"`: to compare with chunks of products, never the default.

No logit is ever stored: the forward multiplies hidden states and heads tile by tile, the backward does it again where
the gradient is not negligible (fused_gradient.py has the bound). Losses are the same on every run. Gradients are added
up by atomics and are not, so where torch.use_deterministic_algorithms asks for it, chunks of products do the work, as
they do for float64 and top_k, for logits that are given and for a served teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import torch_backend
from ..inputs import AlignedUnits, LMHead, SharedVocabulary
from ..options import LossOptions
from ..torch_plan import Chunk, Part
from ..torch_rows import LinearRows, add_repeated
from . import linear_job as chunked_job
from . import simct_loss as simct_loss
from . import topk_job as topk_job
from . import topk_simct_loss as topk_simct_loss
from .columns import columns_of
from .fused import Projection
from .fused_gradient import add_candidates_gradient, add_logsumexp_gradient
from .fused_losses import FusedCandidates, fused_divergence, fused_logsumexp
from .linear import LinearJob


def linear_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,
) -> tuple[Tensor, Tensor]:
    """As `triton_backend.linear_simct_loss`. chunk_rows="auto" takes all rows at once, if nothing is left out of candidates."""
    dtype = torch_backend.compute_dtype(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    job = linear_job(units, shared, options, student_head, teacher_head, chunk_rows, dtype)
    return torch_backend.apply_job(job, summed, student_hidden, student_head.weight, student_head.bias, teacher_hidden)


def linear_job(
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    student_head: LMHead,
    teacher_head: LMHead,
    chunk_rows: int | str,
    dtype: torch.dtype,
) -> torch_backend.LossJob:
    """What `linear_simct_loss` runs below autograd."""
    job = chunked_job(units, shared, options, student_head, teacher_head, chunk_rows, dtype)
    if not isinstance(job, LinearJob) or torch.are_deterministic_algorithms_enabled():
        return job
    # The mask of "disjoint" has a byte for each unit and shared token.
    if chunk_rows == "auto" and options.candidates != "disjoint":
        chunk_rows = len(units.student_tokens) + len(units.teacher_tokens)
    return FusedJob(units, shared, options, student_head, teacher_head, chunk_rows, dtype)


class _UnmadeRows(LinearRows):
    """As LinearRows, but rows of logits are left for the kernels to make."""

    def __init__(self, hidden, head, shared_ids, dtype, **needs) -> None:
        super().__init__(hidden, head, shared_ids, dtype, **needs)
        self.projection = Projection(
            _with_contiguous_rows(self.hidden),
            _with_contiguous_rows(head.weight.detach()),
            self._bias,
            None if head.scale == 1 else float(head.scale),
            head.softcap,
            columns_of(shared_ids).ids,
        )

    @property
    def buffers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden_gradient, self.weight_gradient, self.bias_gradient


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@dataclass(frozen=True)
class FusedJob(torch_backend.LossJob):
    """As its base, with a chunk's logits made and forgotten in the kernels. Without top_k.

    `threshold` bounds the gradient of what the backward may skip; None: see fused_gradient.py; 0: nothing.
    """

    threshold: float | None = None

    linear_rows: ClassVar[type[LinearRows]] = _UnmadeRows

    def run(self, student_input: Tensor, *arguments) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.cuda.device_of(student_input):  # Triton launches on the current device
            return super().run(student_input, *arguments)

    def _run_chunk(
        self,
        chunk: Chunk,
        student: _UnmadeRows,
        teacher: _UnmadeRows,
        picks: bool,
        needs_grad: bool,
        weights: Tensor | None,  # [g]
    ) -> Tensor:
        options, part = self.options, chunk.student
        student_logsumexp = teacher_logsumexp = largest = None
        if part.whole:
            student_logsumexp, largest = fused_logsumexp(student.projection, part.rows, needs_grad)
        if chunk.teacher.whole:
            teacher_logsumexp, _ = fused_logsumexp(teacher.projection, chunk.teacher.rows, False)
        student_continuation = teacher_continuation = targets = left_out = None
        if chunk.has_continuation:
            student_continuation, targets = _continuation(student, part, student_logsumexp, options)
            teacher_continuation, _ = _continuation(teacher, chunk.teacher, teacher_logsumexp, options)
        if chunk.left_out is not None:
            left_out = torch.zeros(len(chunk.units), len(self.shared), dtype=torch.bool, device=part.rows.device)
            left_out[chunk.left_out[:, 0], chunk.left_out[:, 1]] = True
        candidates = FusedCandidates(
            student.projection,
            part.first_rows,
            teacher.projection,
            chunk.teacher.first_rows,
            len(self.shared),
            student_continuation,
            teacher_continuation,
            left_out,
            None if options.teacher_mass_floor is None else teacher_logsumexp[chunk.teacher.first],
        )
        units, extremes = fused_divergence(candidates, options, needs_grad)
        if not needs_grad:
            return units.losses

        factors = units.weighted(weights, torch.ones_like(units.losses))
        add_candidates_gradient(student.buffers, extremes, candidates, units, factors, self.threshold, options)
        if chunk.has_continuation:
            by_target = units.by_continuation[part.unit]
            if options.score != "sum_logprob":
                by_target = by_target / part.length[part.unit]
            weighted = torch.where(factors[part.unit] == 0, 0.0, by_target * factors[part.unit])
            student.add_pick(part.rows, part.tokens[:, None], (weighted * student.slope(targets))[:, None])
            if part.whole:
                by_logsumexp = -by_target
                by_logsumexp[part.first] += units.by_continuation
                add_logsumexp_gradient(
                    student.buffers,
                    largest,
                    student.projection,
                    part.rows,
                    student_logsumexp,
                    by_logsumexp,
                    factors[part.unit],
                    self.threshold,
                )
        return units.losses


def _continuation(
    source: _UnmadeRows, part: Part, logsumexp: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """One side's continuation scores [g] on the scale of the first rows' logits, and the logits [R] that they read."""
    targets = source.pick(part.rows, part.tokens[:, None]).squeeze(1)
    normalises = logsumexp is not None and options.normalises
    terms = targets - logsumexp if normalises else targets
    scores = add_repeated(terms.new_zeros(len(part.length)), part.unit, terms)
    if options.score != "sum_logprob":
        scores = scores / part.length
    return scores + logsumexp[part.first] if normalises else scores, targets
