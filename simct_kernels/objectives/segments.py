"""Ragged rows, units among them: stretches of different lengths laid out one after the other, their sums and log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor

from simct_kernels.torch_backend.rows import add_repeated


def expand(begin: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the stretches begin[i], ..., stop[i] - 1, and before them the i that each belongs to: both int64 [N]."""
    length = stop.long() - begin.long()
    owner = torch.repeat_interleave(length)
    before = length.cumsum(0) - length
    return owner, torch.arange(len(owner), device=owner.device) + (begin.long() - before)[owner]


def segment_sum(
    values: Tensor,  # [N]
    owner: Tensor,  # int64 [N], below count
    count: int,
) -> Tensor:
    """[count], always added in the same order."""
    return add_repeated(values.new_zeros(count), owner, values)


def segment_logsumexp(
    values: Tensor,  # [N]
    owner: Tensor,  # int64 [N], below count
    count: int,
) -> Tensor:
    """[count], -inf for a segment without values.

    Each segment is shifted by its own maximum. The differences of one cumulative sum of exponentials would be cheaper, and would
    lose a segment whose share of the row's mass is below the sum's rounding: there the logarithm, and the gradient above all, which
    divides by that share, would be noise even in float64.
    """
    peak = values.new_full((count,), -torch.inf).scatter_reduce_(0, owner, values, "amax")
    peak = peak.masked_fill_(peak == -torch.inf, 0)
    return segment_sum((values - peak[owner]).exp_(), owner, count).log_().add_(peak)


class SumByUnit(torch.autograd.Function):
    """The sum of each unit's values, always added in the same order."""

    @staticmethod
    def forward(ctx, values, unit, count):
        ctx.save_for_backward(unit)
        return segment_sum(values, unit, count)

    @staticmethod
    def backward(ctx, upstream):
        return upstream[ctx.saved_tensors[0]], None, None


def reduce_units(losses: Tensor, reduction: str, return_unit_losses: bool) -> Tensor | tuple[Tensor, Tensor]:
    """[G] losses as `reduction` says, with the losses themselves, detached, if they are asked for."""
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / max(1, len(losses))
    return (loss, losses.detach()) if return_unit_losses else loss
