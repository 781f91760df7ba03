"""The divergence of few candidates a unit, and its gradient, in one launch: Eq. 8 and 9 with a unit's scores in registers.

What `torch_backend.divergence.divergence` computes, on matrices narrow enough: see `LARGEST`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.divergence import divergence as torch_divergence
from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.candidates import mode_of
from simct_kernels.triton_backend.scores import FORWARD, MIXED, exp, kl_terms, log_mixture, score_gradient

# Candidates of a unit: a tile of the table is this wide or holds several units. Beyond it the scores of one row no longer
# fit a program's registers, and the PyTorch function takes over.
LARGEST = 4096
NARROWEST = 32


@triton.jit(do_not_specialize=["count"])
def small_kernel(
    losses,  # float32 [g]
    gradient,  # float32 [g, C] by the student's scores, or None
    student,  # float32 [g, C]
    teacher,  # float32 [g, C]
    count,  # g
    size,  # C
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, BLOCK)[None, :]
    place = unit[:, None] * size + index
    inside = (unit < count)[:, None] & (index < size)
    log_q = _log_softmax(tl.load(student + place, mask=inside, other=-float("inf")) * inverse_temperature)
    log_p = _log_softmax(tl.load(teacher + place, mask=inside, other=-float("inf")) * inverse_temperature)
    if MODE == MIXED:
        log_m = log_mixture(log_q, log_p, beta)
        kl = tl.sum(tl.where(inside, kl_terms(log_q, log_m), 0.0), 1)
        loss = (1 - beta) * kl + beta * tl.sum(tl.where(inside, kl_terms(log_p, log_m), 0.0), 1)
    else:
        a, b = log_q, log_p
        if MODE == FORWARD:
            a, b = log_p, log_q
        kl = tl.sum(tl.where(inside, kl_terms(a, b), 0.0), 1)
        loss = kl
    tl.store(losses + unit, loss, mask=unit < count)
    if gradient is not None:
        by_score = score_gradient(log_q, log_p, kl[:, None], beta, MODE) * inverse_temperature
        tl.store(gradient + place, by_score, mask=inside)


@triton.jit
def _log_softmax(x):
    """NaN for a row that holds NaN or +inf, or nothing but -inf: it has no softmax."""
    x -= tl.max(x, 1)[:, None]
    return x - tl.log(tl.sum(exp(x), 1))[:, None]


def divergence(
    s: Tensor,  # float32 [g, C]
    t: Tensor,  # float32 [g, C]
    options: LossOptions,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `torch_backend.divergence.divergence`."""
    count, size = s.shape
    if not count or size > LARGEST:
        return torch_divergence(s, t, options, needs_grad)
    losses = torch.empty(count, dtype=torch.float32, device=s.device)
    gradient = torch.empty(count, size, dtype=torch.float32, device=s.device) if needs_grad else None
    shape = tiles.tile("small", s.device)
    block = max(NARROWEST, triton.next_power_of_2(size))
    rows = max(1, shape.rows * shape.block // block)
    small_kernel[(triton.cdiv(count, rows),)](
        losses,
        gradient,
        s.contiguous(),
        t.contiguous(),
        count,
        size,
        1 / options.temperature,
        float(options.beta),
        MODE=mode_of(options.beta),
        ROWS=rows,
        BLOCK=block,
        num_warps=shape.warps,
    )
    return losses, gradient
