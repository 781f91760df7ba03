"""The divergence of two sides' candidate softmaxes, and its gradient by hand (Eq. 8 and 9)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simct_kernels.options import LossOptions


def divergence(
    s: Tensor,  # [g, C]
    t: Tensor,  # [g, C]
    options: LossOptions,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The divergence [g] of the softmaxes of s and t, and its gradient by s [g, C].

    A candidate that KL's first argument excludes adds 0; one that only its second excludes makes the loss infinite.
    """
    beta = options.beta
    if options.temperature != 1:
        s, t = s / options.temperature, t / options.temperature
    log_q, log_p = s.log_softmax(dim=1), t.log_softmax(dim=1)
    gradient = None
    if beta == 0:
        losses, _, p = _kl(log_p, log_q)
        if needs_grad:
            gradient = log_q.exp().sub_(p)
            if _may_exclude(losses):
                gradient.masked_fill_(log_q == -math.inf, 0)
    else:
        # The derivative of the whole divergence by q is (1 - beta) log(q / m), the mixture m held fixed or not; at
        # beta = 1 (reverse KL) p takes the mixture's place, and the factor is 1.
        factor, log_m = 1.0, log_p
        if beta < 1:
            factor = 1 - beta
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(factor))
        losses, ratio, q = _kl(log_q, log_m)
        if needs_grad:
            gradient = ratio.sub_(losses[:, None]).mul_(q)
        if beta < 1:
            losses = factor * losses + beta * _kl(log_p, log_m)[0]
            gradient = None if gradient is None else gradient.mul_(factor)
    if gradient is not None and options.temperature != 1:
        gradient /= options.temperature
    return losses, gradient


def _kl(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(a || b) [g] of two log-probabilities [g, C], log(a / b) [g, C], 0 where a is 0, and a [g, C]."""
    ratio, a = log_a - log_b, log_a.exp()
    kl = (a * ratio).sum(dim=1)
    if _may_exclude(kl):
        ratio.masked_fill_(log_a == -math.inf, 0)
        # Clamped, so that an infinite ratio counts even where the probability before it underflows.
        kl = a.clamp(min=torch.finfo(a.dtype).tiny).mul_(ratio).sum(dim=1)
    return kl, ratio, a


def _may_exclude(losses: Tensor) -> bool:
    """Whether a candidate may have log-probability -inf on a side: then the plain sums [g] over it are not finite.

    On the CPU, where masks cost more than the rest of a sum, the sums are looked at; elsewhere that would wait.
    """
    return losses.device.type != "cpu" or not bool(losses.isfinite().all())
