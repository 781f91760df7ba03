"""The losses of a job as an autograd function.

A summed loss has its gradients from the forward pass, up to a scale; losses by unit make them in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simct_kernels.torch_backend.rows import Pending

if TYPE_CHECKING:
    from simct_kernels.torch_backend.job import LossJob


def apply_job(
    job: LossJob, summed: bool, student_input: Tensor, weight: Tensor | None, bias: Tensor | None, teacher_input: Tensor
) -> tuple[Tensor, Tensor]:
    make_gradients = summed and torch.is_grad_enabled()
    result = _SimCT.apply(job, summed, make_gradients, student_input, weight, bias, teacher_input)
    return result if summed else (result, result.detach())


class _SimCT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, summed, make_gradients, student_input, weight, bias, teacher_input):
        needs_grad = tuple(ctx.needs_input_grad[3:6]) if make_gradients else (False, False, False)
        losses, gradients = job.run(student_input, teacher_input, needs_grad)
        ctx.job, ctx.summed = job, summed
        ctx.gradients = gradients if make_gradients else None
        ctx.save_for_backward(student_input, weight, bias, teacher_input)
        if not summed:
            return losses
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if torch.is_grad_enabled():
            raise RuntimeError("a SimCT loss cannot be differentiated twice: backward without create_graph=True")
        inputs = ctx.saved_tensors[:3]
        gradients, ctx.gradients = ctx.gradients, None  # given away: a second backward makes them again
        scale = None
        if gradients is None:
            count = len(ctx.job.units)
            unit_weights = grad_loss.expand(count) if ctx.summed else grad_loss
            student_input, _, _, teacher_input = ctx.saved_tensors
            _, gradients = ctx.job.run(student_input, teacher_input, tuple(ctx.needs_input_grad[3:6]), unit_weights)
        elif grad_loss.device.type != "cpu" or grad_loss != 1:  # elsewhere looking would wait
            scale = grad_loss
        # float32 until here: the one rounding to the inputs' dtype comes last.
        gradients = [
            None if gradient is None else scaled(gradient, scale, tensor.dtype)
            for gradient, tensor in zip(gradients, inputs, strict=True)
        ]
        return None, None, None, *gradients, None


def scaled(gradient: Tensor | Pending, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale times a gradient, which may be written over, in `dtype`."""
    if not isinstance(gradient, Tensor):
        return gradient.make(scale, dtype)
    return (gradient if scale is None else gradient.mul_(scale)).to(dtype)
