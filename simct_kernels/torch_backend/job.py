"""SimCT's loss in chunked PyTorch, on any device: the divergence of candidate scores, and its gradient by hand.

Single units read the K shared columns of each side; whole vocabularies are read for longer units only. A summed loss
makes its gradients in the forward pass, chunk by chunk, so that each logit is made once: four products in all (two
sides' logits, the gradients of hidden and head). Per-unit losses cannot, since the weights of the units come with the
backward pass, which makes the logits again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.autograd import apply_job
from simct_kernels.torch_backend.blocks import BlockedRows
from simct_kernels.torch_backend.classes import Classes, gather, take_classes
from simct_kernels.torch_backend.divergence import divergence
from simct_kernels.torch_backend.plan import Chunk, plan_chunks, row_blocks, unit_blocks, without_dropped
from simct_kernels.torch_backend.rows import LinearRows, LogitRows, Pending, Rows
from simct_kernels.torch_backend.scores import Scores, by_terms, candidate_scores, leave_out, mass_of

# A unit's top_k columns are picked one by one (k head rows each) where that is at most a 16th of the K shared columns:
# picked columns cost memory traffic, not arithmetic, so a product over all K is as fast above that.
PICK_SHARE = 16


def simct_loss(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, one number if `summed` or else [G], and the units' losses [G] without gradient."""
    job = LossJob(units, shared, options, None, None, "auto", compute_dtype(student_logits, teacher_logits))
    return apply_job(job, summed, student_logits, None, None, teacher_logits)


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
    """As `simct_loss`, with the logits of each side made from its hidden states chunk by chunk."""
    dtype = compute_dtype(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    job = LossJob(units, shared, options, student_head, teacher_head, chunk_rows, dtype)
    return apply_job(job, summed, student_hidden, student_head.weight, student_head.bias, teacher_hidden)


def candidate_mass(
    hidden: Tensor,  # [N, H]
    head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    side: str,
    chunk_rows: int | str,
) -> Tensor:
    """The mass [G] that one side, "student" or "teacher", puts on its candidates. No gradient."""
    columns = head.weight.shape[0]
    chunks = plan_chunks(
        units,
        shared,
        options,
        shared_width=len(shared),
        student_columns=columns,
        teacher_columns=columns,
        chunk_rows=chunk_rows,
        student_always_whole=side == "student",
        teacher_always_whole=side == "teacher",
    )
    dtype = compute_dtype(hidden, head.weight)
    source = linear_rows(hidden, head, getattr(shared, f"{side}_ids"), dtype)
    source.classes = Classes.of(shared, side)
    mass = torch.empty(len(units), dtype=dtype, device=hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for chunk in chunks:
            scores = candidate_scores(source, getattr(chunk, side), chunk, options)
            mass[chunk.units] = mass_of(scores, leave_out(scores.shared, chunk), options, scores.classes)
    return mass


def linear_rows(
    hidden: Tensor,  # [N, H]
    head: LMHead,
    shared_ids: Tensor,  # int64 [K]
    dtype: torch.dtype,
    **needs: tuple[bool, bool, bool],
) -> LinearRows:
    """Rows of head(hidden), made in the way that suits their device."""
    make = BlockedRows if hidden.device.type == "cpu" else LinearRows
    return make(hidden, head, shared_ids, dtype, **needs)


class Steps:
    """What is done with a chunk of units, in PyTorch; a backend with kernels of its own does it in its own way."""

    linear_rows = staticmethod(linear_rows)
    logit_rows = LogitRows
    divergence = staticmethod(divergence)

    def candidate_scores(self, *arguments) -> Scores:
        return candidate_scores(*arguments)

    def add_gradient(self, *arguments) -> None:
        add_gradient(*arguments)


@dataclass(frozen=True)
class LossJob(Steps):
    """What a loss is computed from, besides the tensors that autograd must see."""

    units: AlignedUnits
    shared: SharedVocabulary
    options: LossOptions
    student_head: LMHead | None  # None: logits are given
    teacher_head: LMHead | None
    chunk_rows: int | str
    dtype: torch.dtype

    def run(
        self,
        student_input: Tensor,  # [N_s, H_s] or [N_s, V_s]
        teacher_input: Tensor,  # [N_t, H_t] or [N_t, V_t]
        needs_grad: tuple[bool, bool, bool],  # student_input, weight, bias
        unit_weights: Tensor | None = None,  # [G], what each unit's gradient is multiplied by; None: 1
    ) -> tuple[Tensor, tuple[Tensor | Pending | None, ...]]:
        """The units' losses [G] and the gradients that are needed, in the compute dtype (or that of given logits).

        A weight's may be pending (see rows.Pending).
        """
        student: Rows
        teacher: Rows
        if unit_weights is not None and self.student_head is not None:
            student_input = without_dropped(student_input, self.units, unit_weights)
        if self.student_head is None or self.teacher_head is None:
            student = self.logit_rows(student_input, self.shared.student_ids, self.dtype, needs_grad=needs_grad[0])
            teacher = self.logit_rows(teacher_input, self.shared.teacher_ids, self.dtype)
        else:
            ids = self.shared.student_ids
            student = self.linear_rows(student_input, self.student_head, ids, self.dtype, needs_grad=needs_grad)
            teacher = self.linear_rows(teacher_input, self.teacher_head, self.shared.teacher_ids, self.dtype)
        student.classes, teacher.classes = (Classes.of(self.shared, side) for side in ("student", "teacher"))
        losses = torch.zeros(len(self.units), dtype=self.dtype, device=student_input.device)
        top_k = self.options.top_k or 0
        picks = 0 < top_k * PICK_SHARE <= len(self.shared)
        chunks = plan_chunks(
            self.units,
            self.shared,
            self.options,
            shared_width=max(len(self.shared), top_k * max(student.pick_width, teacher.pick_width) if picks else 0),
            student_columns=student.columns,
            teacher_columns=teacher.columns,
            chunk_rows=self.chunk_rows,
            teacher_always_whole=self.options.teacher_mass_floor is not None,
            merges=not picks,
        )
        # Under autocast float32 products would be rounded to 16 bits.
        with torch.no_grad(), torch.autocast(student_input.device.type, enabled=False):
            student.expect([chunk.student for chunk in chunks])
            # What is picked is no read of shared columns.
            teacher.expect([chunk.teacher for chunk in chunks if chunk.teacher.whole or not picks])
            for chunk in chunks:
                weights = None if unit_weights is None else unit_weights[chunk.units]
                losses[chunk.units] = self._run_chunk(chunk, student, teacher, picks, any(needs_grad), weights)
            if isinstance(student, LinearRows):
                return losses, student.gradients()
        return losses, (student.gradient, None, None)

    def _run_chunk(
        self, chunk: Chunk, student: Rows, teacher: Rows, picks: bool, needs_grad: bool, weights: Tensor | None
    ) -> Tensor:
        """The losses [g] of a chunk's units; adds their gradient to `student`."""
        options, size = self.options, len(self.shared)
        student_scores = self.candidate_scores(student, chunk.student, chunk, options)
        s = leave_out(student_scores.shared, chunk)  # [g, K]
        chosen = None
        if options.top_k is not None and options.top_k < size + self.shared.class_count:
            every = s if student.classes is None else torch.cat([s, student_scores.classes.scores], dim=1)
            chosen = every.topk(options.top_k, sorted=False).indices  # [g, k]
            s = every.gather(1, chosen)
        teacher_scores = self.candidate_scores(teacher, chunk.teacher, chunk, options, chosen if picks else None)
        teacher_scores = replace(
            teacher_scores, logits=None
        )  # the largest tensor, read by now (on a CPU the next read's place)
        t = leave_out(teacher_scores.shared, chunk, chosen if picks else None)
        if chosen is not None and not picks:
            t = gather(t, teacher_scores.classes, chosen, size)
        # Beside the columns of s and t: the classes, unless they are among the chosen, and the continuation.
        beside, by_class = [], None
        if chosen is None and student.classes is not None:
            beside.append((student_scores.classes.scores, teacher_scores.classes.scores))
            by_class = torch.empty_like(student_scores.classes.scores)
        if chunk.has_continuation:
            beside.append((student_scores.continuation[:, None], teacher_scores.continuation[:, None]))

        below = None
        if options.teacher_mass_floor is not None:
            others = teacher_scores.classes if chosen is None else None
            below = mass_of(teacher_scores, t, options, others) < options.teacher_mass_floor
        losses, by_continuation = s.new_empty(len(s)), s.new_empty(len(s))
        columns = s.shape[1]
        for rows in row_blocks(*s.shape, s.device):
            s_all, t_all = s[rows], t[rows]
            if beside:
                s_all = torch.cat([s_all, *(ours[rows] for ours, _ in beside)], dim=1)
                t_all = torch.cat([t_all, *(theirs[rows] for _, theirs in beside)], dim=1)
            losses[rows], gradient = self.divergence(s_all, t_all, options, needs_grad)
            if gradient is None:
                continue
            if weights is not None:
                # Filled, not only multiplied: a unit that the caller drops gives 0 even where its gradient is NaN.
                weight = weights[rows, None]
                gradient.mul_(weight).masked_fill_(weight == 0, 0)
            if below is not None:
                gradient.masked_fill_(below[rows, None], 0)
            t[rows] = gradient[:, :columns]  # the teacher's scores have been read
            if by_class is not None:
                by_class[rows] = gradient[:, columns : columns + by_class.shape[1]]
            if chunk.has_continuation:
                by_continuation[rows] = gradient[:, -1]
        if below is not None:
            losses.masked_fill_(below, 0)
        if needs_grad:
            arguments = student, chunk, student_scores, s, chosen, picks, t, by_continuation, options, by_class
            self.add_gradient(*arguments)
        return losses


def add_gradient(
    student: Rows,
    chunk: Chunk,
    scores: Scores,
    s: Tensor,  # [g, C], the shared scores that the divergence saw
    chosen: Tensor | None,  # int64 [g, C], the candidates that they are; None: the K shared ones
    picks: bool,
    by_shared: Tensor,  # [g, C]
    by_continuation: Tensor,  # [g], read only with continuations
    options: LossOptions,
    by_class: Tensor | None = None,  # [g, classes], where there are any and they are not among the chosen
) -> None:
    """Carries the gradient by the scores back to the student's logits."""
    part, by_members = chunk.student, None
    if scores.classes is not None:
        if chosen is not None:
            by_class, chosen = take_classes(by_shared, chosen, len(student.shared_ids), student.classes.count)
        by_members = scores.classes.by_members(by_class)
    if chunk.has_continuation:
        by_target = by_terms(by_continuation, part, options)
    if scores.logits is None:
        for rows in row_blocks(*s.shape, s.device):
            slope = student.slope(s[rows])
            if isinstance(slope, Tensor) or slope != 1:
                by_shared[rows].mul_(slope)
        if chosen is None:
            student.add_shared(part.first_rows, by_shared)
        elif picks:
            student.add_pick(part.first_rows, student.shared_ids[chosen], by_shared)
        else:
            wide = torch.zeros_like(scores.shared).scatter_add_(1, chosen, by_shared)
            student.add_shared(part.first_rows, wide)
        if chunk.has_continuation:
            by_target = (by_target * student.slope(scores.targets))[:, None]
            student.add_pick(part.rows, part.tokens[:, None], by_target)
        if by_members is not None:
            by_members *= student.slope(scores.classes.members)
            student.add_pick_same(part.first_rows, student.classes.ids, by_members)
        return

    # Whole rows are read for log-probabilities only. A row's log-sum-exp is taken off its own token's logit and, in a
    # unit's first row, off every shared candidate, whose gradients add up to minus the continuation's.
    by_logsumexp = -by_target
    by_logsumexp[part.first] += by_continuation
    gradient = scores.logits  # written over
    for units, rows in unit_blocks(part, gradient.shape[1]):
        block, weight, first = gradient[rows], by_logsumexp[rows, None], part.first[units] - rows.start
        slope = student.slope(block)
        block.sub_(scores.logsumexp[rows, None]).exp_().mul_(weight).masked_fill_(weight == 0, 0)
        first_rows = block[first]
        if chosen is None:
            first_rows[:, student.shared_ids] += by_shared[units]
        else:
            first_rows.scatter_add_(1, student.shared_ids[chosen[units]], by_shared[units])
        if by_members is not None:
            first_rows[:, student.classes.ids] += by_members[units]
        block[first] = first_rows
        block[torch.arange(len(block), device=block.device), part.tokens[rows]] += by_target[rows]
        block.mul_(slope)
    student.add_whole(part.rows, gradient)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 if any input is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
