"""The log-sum-exps of the student's rows that a continuation needs, in chunks, forward and backward: the part of a served
teacher's loss that no choice of candidates avoids."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.plan import auto_rows
from simct_kernels.torch_backend.rows import LinearRows

from ..cases import Problem
from ..floor import needed
from . import Method, only


class _LogSumExp(torch.autograd.Function):
    """Its sum; the gradient is made in the forward pass, as the losses make theirs."""

    @staticmethod
    def forward(ctx, hidden, weight, source: LinearRows, rows: Tensor):
        total = torch.zeros((), device=hidden.device)
        for part in rows.split(auto_rows(source.columns, hidden.device)):
            logits = source.whole(part)
            logsumexp = logits.logsumexp(1)
            total += logsumexp.sum()
            slope = source.slope(logits)
            source.add_whole(part, logits.sub_(logsumexp[:, None]).exp_().mul_(slope))
        by_hidden, by_weight, _ = source.gradients()
        ctx.gradients = by_hidden.to(hidden.dtype), by_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx, by_total):
        return (*(gradient.mul_(by_total) for gradient in ctx.gradients), None, None)


def prepare(problem: Problem) -> Callable[[], Tensor]:
    units, head = problem.units, problem.student_head
    whole = units.has_continuation(problem.shared) & (units.student_length > 1)
    unit = torch.repeat_interleave(torch.arange(len(units), device=problem.device), units.student_length)
    rows = whole[unit].nonzero().squeeze(1)
    assert len(rows) == needed(units, problem.shared, "student", LossOptions()).whole

    def call() -> Tensor:
        needs = (True, True, False)
        source = LinearRows(problem.student_hidden, head, problem.shared.student_ids, torch.float32, needs_grad=needs)
        return _LogSumExp.apply(problem.student_hidden, head.weight, source, rows)

    return call


METHODS = [Method("log-sum-exp of the student alone", prepare, only("served"), same_loss=False)]
