"""The loss of a served teacher in chunked PyTorch: candidates from its k best log-probabilities.

The student's rows are read as in `torch_backend`: k columns for a unit whose student side is one token, whole rows for
the log-sum-exps of a longer one. Nothing of the teacher is computed: its log-probabilities are its scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.classes import Classes, gather
from simct_kernels.torch_backend.job import PICK_SHARE, Steps, apply_job, compute_dtype
from simct_kernels.torch_backend.plan import Chunk, plan_chunks, without_dropped
from simct_kernels.torch_backend.rows import LinearRows
from simct_kernels.torch_backend.scores import continuation_scores


def topk_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_topk_ids: Tensor,  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor,  # [N_t, k]
    teacher_token_logprobs: Tensor,  # [N_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,
) -> tuple[Tensor, Tensor]:
    """The loss, one number if `summed` or else [G], and the units' losses [G] without gradient."""
    dtype = compute_dtype(student_hidden, student_head.weight)
    job = Job(units, shared, options, student_head, teacher_topk_ids, teacher_topk_logprobs, chunk_rows, dtype)
    return apply_job(job, summed, student_hidden, student_head.weight, student_head.bias, teacher_token_logprobs)


@dataclass(frozen=True)
class Candidates:
    """The shared candidates of each unit, at most k and the classes: those that both `found` and served. Without repeats."""

    columns: Tensor  # int64 [G, k], indices into the shared vocabulary, from K on of its classes; 0 where not found
    scores: Tensor  # [G, k], the teacher's log-probabilities; -inf where not found
    found: Tensor  # bool [G, k]

    def __getitem__(self, units: Tensor) -> Candidates:
        return Candidates(self.columns[units], self.scores[units], self.found[units])

    def gather(self, choice: Tensor) -> Candidates:  # int64 [G, k']
        return Candidates(self.columns.gather(1, choice), self.scores.gather(1, choice), self.found.gather(1, choice))


def shared_candidates(
    topk_ids: Tensor,  # int64 [N_t, k]
    topk_logprobs: Tensor,  # [N_t, k]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
) -> Candidates:
    """A class has the sum of what was served of its ids. Never waits for a GPU."""
    ids, scores = topk_ids[units.teacher_start], topk_logprobs[units.teacher_start]
    classes = Classes.of(shared, "teacher")
    if classes is not None:
        served = scores[:, :, None].masked_fill(ids[:, :, None] != classes.ids, -math.inf)
        by_class = classes.logits(served.amax(dim=1))
    none = len(shared)
    place = torch.searchsorted(shared.ascending_teacher_ids, ids).clamp_(max=none - 1)
    found = (shared.ascending_teacher_ids[place] == ids) & (scores != -math.inf)
    columns = shared.teacher_order[place].masked_fill_(~found, none)
    # A server may list a token twice, as one of its best and as the row's own. The largest counts, and NaN before any number, which
    # is how `sort` orders them.
    scores, ranked = scores.sort(dim=1, descending=True)
    columns, order = columns.gather(1, ranked).sort(dim=1, stable=True)
    found = columns < none
    found[:, 1:] &= columns[:, 1:] != columns[:, :-1]
    if options.candidates == "disjoint" and units.left_out is not None and len(units.left_out):
        left_out = (units.left_out[:, 0] * none + units.left_out[:, 1]).sort().values
        wanted = torch.arange(len(units), device=columns.device)[:, None] * none + columns
        place = torch.searchsorted(left_out, wanted).clamp_(max=len(left_out) - 1)
        found &= (left_out[place] != wanted) | ~units.has_continuation(shared)[:, None]
    scores = scores.gather(1, order).masked_fill_(~found, -math.inf)
    if classes is not None:
        numbers = torch.arange(none, none + classes.count, device=columns.device).expand_as(by_class)
        columns, scores = torch.cat([columns, numbers], dim=1), torch.cat([scores, by_class], dim=1)
        found = torch.cat([found, by_class != -math.inf], dim=1)
    return Candidates(columns.masked_fill_(~found, 0), scores, found)


@dataclass(frozen=True)
class Job(Steps):
    """As `torch_backend.LossJob`, for a served teacher."""

    units: AlignedUnits
    shared: SharedVocabulary
    options: LossOptions
    student_head: LMHead
    teacher_topk_ids: Tensor  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor  # [N_t, k]
    chunk_rows: int | str
    dtype: torch.dtype

    def run(
        self,
        student_hidden: Tensor,  # [N_s, H_s]
        teacher_token_logprobs: Tensor,  # [N_t]
        needs_grad: tuple[bool, bool, bool],  # hidden, weight, bias
        unit_weights: Tensor | None = None,  # [G], what each unit's gradient is multiplied by; None: 1
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The units' losses [G] and the gradients that are needed, in the compute dtype."""
        if unit_weights is not None:
            student_hidden = without_dropped(student_hidden, self.units, unit_weights)
        ids = self.shared.student_ids
        student = self.linear_rows(student_hidden, self.student_head, ids, self.dtype, needs_grad=needs_grad)
        student.classes = Classes.of(self.shared, "student")
        losses = torch.zeros(len(self.units), dtype=self.dtype, device=student_hidden.device)
        k = self.teacher_topk_ids.shape[1]
        picks = k * PICK_SHARE <= len(self.shared)
        chunks = plan_chunks(
            self.units,
            self.shared,
            self.options,
            shared_width=k * student.pick_width if picks else len(self.shared),
            student_columns=student.columns,
            teacher_columns=1,  # no teacher's row is ever made
            chunk_rows=self.chunk_rows,
        )
        # Under autocast float32 products would be rounded to 16 bits.
        with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
            token_logprobs = teacher_token_logprobs.to(self.dtype)
            logprobs = self.teacher_topk_logprobs.to(self.dtype)
            candidates = shared_candidates(self.teacher_topk_ids, logprobs, self.units, self.shared, self.options)
            # What is picked is no read of shared columns.
            student.expect([chunk.student for chunk in chunks if chunk.student.whole or not picks])
            for chunk in chunks:
                weights = None if unit_weights is None else unit_weights[chunk.units]
                losses[chunk.units] = self._run_chunk(
                    chunk, candidates[chunk.units], token_logprobs, student, picks, any(needs_grad), weights
                )
            return losses, student.gradients()

    def _run_chunk(
        self,
        chunk: Chunk,
        candidates: Candidates,  # of its g units
        token_logprobs: Tensor,  # [N_t]
        student: LinearRows,
        picks: bool,
        needs_grad: bool,
        weights: Tensor | None,  # [g]
    ) -> Tensor:
        """The losses [g] of a chunk's units; adds their gradient to `student`."""
        options = self.options
        by_column = picks or chunk.student.whole
        scores = self.candidate_scores(
            student, chunk.student, chunk, options, candidates.columns if by_column else None
        )
        s = scores.shared
        if not by_column:
            s = gather(s, scores.classes, candidates.columns, len(self.shared))
        s = s.masked_fill(~candidates.found, -math.inf)
        if options.top_k is not None and options.top_k < s.shape[1]:
            # A candidate that the student excludes still comes before what is none.
            ranked = s.clamp(min=torch.finfo(s.dtype).min).masked_fill_(~candidates.found, -math.inf)
            choice = ranked.topk(options.top_k, sorted=False).indices
            s, candidates = s.gather(1, choice), candidates.gather(choice)

        t = candidates.scores
        if chunk.has_continuation:
            terms = token_logprobs[chunk.teacher.rows]
            continuation = continuation_scores(terms, chunk.teacher, options)
            s_all = torch.cat([s, scores.continuation[:, None]], dim=1)
            t_all = torch.cat([t, continuation[:, None]], dim=1)
        else:
            # No candidate at all: one that both sides are sure of stands in, and gives neither loss nor gradient.
            empty = ~candidates.found.any(dim=1, keepdim=True) & (torch.arange(s.shape[1], device=s.device) == 0)
            s_all, t_all = s.masked_fill(empty, 0), t.masked_fill(empty, 0)
        losses, gradient = self.divergence(s_all, t_all, options, needs_grad)
        if options.teacher_mass_floor is not None:
            below = t_all.exp().sum(dim=1) < options.teacher_mass_floor
            losses = losses.masked_fill(below, 0)
            gradient = None if gradient is None else gradient.masked_fill_(below[:, None], 0)
        if gradient is not None:
            if weights is not None:
                gradient.mul_(weights[:, None]).masked_fill_(weights[:, None] == 0, 0)
            columns = s.shape[1]
            by_shared, by_continuation = gradient[:, :columns], gradient[:, columns:].squeeze(1)
            self.add_gradient(student, chunk, scores, s, candidates.columns, picks, by_shared, by_continuation, options)
        return losses
