"""SimCT's loss from given logits: a few launches for all units at once, one for the gradient. Never waits for the device.

Autograd keeps what the forward found out about the units, six numbers each, so that the backward reads each logit once.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..inputs import AlignedUnits, SharedVocabulary
from ..options import LossOptions
from .candidates import Candidates, Units, divergence
from .columns import columns_of
from .gradient import Layout, write_gradient
from .rows import continuation_scores, row_logsumexp
from .scores import Side


def _forward(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
) -> tuple[Candidates, Layout, Units]:
    """The losses of the units, and all that their gradient needs."""
    student = Side(student_logits, columns_of(shared.student_ids).ids)
    teacher = Side(teacher_logits, columns_of(shared.teacher_ids).ids)
    continued = units.has_continuation(shared)
    student_unit = _unit_of_rows(units.student_start, units.student_length, len(units.student_tokens))
    student_logsumexp = teacher_logsumexp = None
    if options.normalises:
        student_logsumexp = row_logsumexp(student, _at(continued & (units.student_length > 1), student_unit))
    if options.normalises or options.teacher_mass_floor is not None:
        teacher_unit = _unit_of_rows(units.teacher_start, units.teacher_length, len(units.teacher_tokens))
        wanted = _at(continued & (units.teacher_length > 1) & options.normalises, teacher_unit)
        if options.teacher_mass_floor is not None:
            wanted[units.teacher_start] = True
        teacher_logsumexp = row_logsumexp(teacher, wanted)

    left_out = left_out_rows = None
    if options.candidates == "disjoint" and units.left_out is not None:
        # A byte for each unit and candidate: at most a quarter of what 16-bit logits of the same rows take.
        left_out = torch.zeros(len(units), len(shared), dtype=torch.bool, device=continued.device)
        left_out[units.left_out[:, 0], units.left_out[:, 1]] = True
        left_out_rows = torch.where(continued, torch.arange(len(units), device=continued.device), -1)

    candidates = Candidates(
        student,
        units.student_start.contiguous(),
        teacher,
        units.teacher_start.contiguous(),
        len(shared),
        *(
            continuation_scores(
                side,
                getattr(units, f"{name}_start").contiguous(),
                getattr(units, f"{name}_length").contiguous(),
                getattr(units, f"{name}_tokens").contiguous(),
                logsumexp if options.normalises else None,
                options.score,
                continued,
            )
            for name, side, logsumexp in (
                ("student", student, student_logsumexp),
                ("teacher", teacher, teacher_logsumexp),
            )
        ),
        left_out,
        left_out_rows,
        None if options.teacher_mass_floor is None else teacher_logsumexp,
    )
    layout = Layout(
        columns_of(shared.student_ids).index(student_logits.shape[1]),
        student_unit,
        candidates.student_rows,
        units.student_length.contiguous(),
        units.student_tokens.contiguous(),
        continued,
        student_logsumexp,
    )
    return candidates, layout, divergence(candidates, options)


class LogitsLoss(torch.autograd.Function):
    """The sum of the losses and the losses [G], or the losses only, with the gradient by the student's logits."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, units, shared, options, summed):
        inputs = student_logits.detach(), teacher_logits.detach(), units, shared, options
        with torch.cuda.device_of(student_logits):  # Triton launches on the current device
            candidates, ctx.layout, ctx.found = _forward(*inputs)
        # Logits are kept by autograd only, which notices if they are changed before the backward.
        ctx.candidates = _with_logits(candidates, None, None)
        ctx.save_for_backward(student_logits, teacher_logits)
        ctx.options, ctx.summed = options, summed
        losses = ctx.found.losses.clone()
        if not summed:
            return losses
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if torch.is_grad_enabled():
            raise RuntimeError("a SimCT loss cannot be differentiated twice: backward without create_graph=True")
        student_logits, teacher_logits = ctx.saved_tensors
        gradient = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
        weights = grad_loss.expand(len(ctx.found.losses))
        candidates = _with_logits(ctx.candidates, student_logits, teacher_logits)
        write_gradient(gradient, ctx.layout, candidates, ctx.found, weights, ctx.options)
        return gradient, None, None, None, None, None


def _with_logits(candidates: Candidates, student: Tensor | None, teacher: Tensor | None) -> Candidates:
    return dataclasses.replace(
        candidates,
        student=dataclasses.replace(candidates.student, values=student),
        teacher=dataclasses.replace(candidates.teacher, values=teacher),
    )


def _unit_of_rows(start: Tensor, length: Tensor, count: int) -> Tensor:
    """int64 [count], the unit that each row belongs to, -1 for none."""
    start, order = start.sort()
    rows = torch.arange(count, device=start.device)
    place = torch.searchsorted(start, rows, right=True) - 1
    unit = order[place]  # place -1 reads the last unit, which starts later
    return torch.where((place >= 0) & (rows < start[place] + length[unit]), unit, -1)


def _at(of_unit: Tensor, unit: Tensor) -> Tensor:
    """bool [N], from bool [G] and each row's unit, -1 for none."""
    return of_unit[unit] & (unit >= 0)
