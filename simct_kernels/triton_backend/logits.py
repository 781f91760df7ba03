"""SimCT's loss from given logits: a few launches for all units at once, one for the gradient.

Which unit a row belongs to, and which units have a continuation, is found on the CPU and copied once: the same in PyTorch on the
device took 70 launches, half of the call's time at one vocabulary. No call waits, but the first one of units that were made there.

Autograd keeps what the forward found out about the units, a few numbers each, so that the backward reads each logit once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simct_kernels.host import on_host
from simct_kernels.inputs import AlignedUnits, SharedVocabulary
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.classes import Classes
from simct_kernels.torch_backend.plan import Packed, has_continuation, sources_of
from simct_kernels.triton_backend.candidates import Candidates, UnitRows, Units, divergence
from simct_kernels.triton_backend.columns import columns_of, tables
from simct_kernels.triton_backend.gradient import write_gradient
from simct_kernels.triton_backend.scores import Side


def _candidates(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
) -> Candidates:
    place = _place_of(units, shared)

    def rows(logits: Tensor, side: str) -> UnitRows:
        start, length, tokens = (
            getattr(units, f"{side}_{part}").contiguous() for part in ("start", "length", "tokens")
        )
        columns, unit = columns_of(getattr(shared, f"{side}_ids")), getattr(place, f"{side}_unit")
        rest = columns.rest(logits.shape[1])
        classes = Classes.of(shared, side)
        if classes is not None:
            classes = classes.scores(logits[start[:, None], classes.ids].float(), None)
        return UnitRows(Side(logits, columns.ids), start, start, length, tokens, None, unit, rest, classes)

    left_out = left_out_rows = None
    if options.candidates == "disjoint" and units.left_out is not None:
        # A byte for each unit and candidate: at most a quarter of what 16-bit logits of the same rows take.
        width = triton.cdiv(len(shared), 64) * 64
        left_out = torch.zeros(len(units), width, dtype=torch.bool, device=student_logits.device)
        left_out[units.left_out[:, 0], units.left_out[:, 1]] = True
        left_out_rows = place.continued_unit
    student, teacher = rows(student_logits, "student"), rows(teacher_logits, "teacher")
    return Candidates(student, teacher, len(shared), place.continued, left_out, left_out_rows)


class LogitsLoss(torch.autograd.Function):
    """The sum of the losses and the losses [G], or the losses only, with the gradient by the student's logits."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, units, shared, options, summed):
        inputs = student_logits.detach(), teacher_logits.detach(), units, shared, options
        with torch.cuda.device_of(student_logits):  # Triton launches on the current device
            candidates = _candidates(*inputs)
            ctx.found: Units = divergence(candidates, options)
        # The place of the shared columns is looked up here, where finding it may wait for the device.
        columns = columns_of(shared.student_ids), columns_of(shared.teacher_ids)
        ctx.tables = tables(*columns, student_logits.shape[1])
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
        with torch.cuda.device_of(student_logits):
            write_gradient(gradient, ctx.tables, candidates, ctx.found, weights, ctx.options)
            classes = candidates.student.classes
            if classes is not None:
                by_members = ctx.found.by_members(weights, classes)
                places = candidates.student.rows[:, None], classes.classes.ids
                gradient[places] += by_members.to(gradient.dtype)
        return gradient, None, None, None, None, None


def _with_logits(candidates: Candidates, student: Tensor | None, teacher: Tensor | None) -> Candidates:
    def replace(rows: UnitRows, values: Tensor | None) -> UnitRows:
        return dataclasses.replace(rows, side=dataclasses.replace(rows.side, values=values))

    return dataclasses.replace(
        candidates, student=replace(candidates.student, student), teacher=replace(candidates.teacher, teacher)
    )


@dataclass(frozen=True)
class _Place:
    """Of G units, on their device."""

    student_unit: Tensor  # int64 [N_s], the unit that each row belongs to, -1 for none
    teacher_unit: Tensor  # int64 [N_t]
    continued: Tensor  # int64 [G], 1 for units with a continuation, else 0
    continued_unit: Tensor  # int64 [G], the unit's own number if it has one, else -1


def _place_of(units: AlignedUnits, shared: SharedVocabulary) -> _Place:
    kept = _KEPT.get(units.student_start)
    candidates = shared.student_ids, shared.teacher_ids, shared.student_classes, shared.teacher_classes
    sources = sources_of(units, *(getattr(units, name) for name in _FIELDS[1:]), *candidates)
    if kept is not None and all(a is b for a, b in zip(kept[0], sources, strict=True)):
        return kept[1]
    host = {name: on_host(getattr(units, name)) for name in _FIELDS}
    continued = has_continuation(host, *(None if ids is None else on_host(ids) for ids in candidates))
    rows = [
        _unit_of_rows(host[f"{side}_start"], host[f"{side}_length"], len(host[f"{side}_tokens"]))
        for side in ("student", "teacher")
    ]
    numbers = torch.arange(len(units), dtype=torch.int64, device="cpu")
    parts = [*rows, continued.long(), torch.where(continued, numbers, -1)]
    packed = Packed()
    places = [packed.add(part) for part in parts]
    read = packed.read(units.student_start.device)
    place = _Place(*map(read, places))
    _KEPT[units.student_start] = sources, place
    return place


_FIELDS = ("student_start", "student_length", "teacher_start", "teacher_length", "student_tokens", "teacher_tokens")
_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _unit_of_rows(start: Tensor, length: Tensor, count: int) -> Tensor:
    """int64 [count], the unit that each row belongs to, -1 for none. On the CPU."""
    unit = torch.full((count,), -1, dtype=torch.int64, device="cpu")
    numbers = torch.arange(len(start), dtype=torch.int64, device="cpu").repeat_interleave(length)
    first = length.cumsum(0) - length
    unit[torch.arange(len(numbers), dtype=torch.int64, device="cpu") + (start - first)[numbers]] = numbers
    return unit
