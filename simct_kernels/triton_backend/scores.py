"""What every kernel reads: one side's logits, finished as its head would, and the arithmetic of two candidate softmaxes.

Scores live on the scale of a unit's first row of raw logits: a shared candidate's score is its logit there, a
continuation's is its mean (or sum of) log-probability plus that row's log-sum-exp. Eq. 7 of the paper takes the
log-sum-exp off all of them instead, one constant for a unit's candidates, which their softmax cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# What a pass over the candidates computes. FORWARD and REVERSE need one pass. MIXED, the generalised JSD, needs two: its
# terms are logarithms of sums of both sides' probabilities, and do not merge before both log-sum-exps are known.
FORWARD, REVERSE, MIXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Side:
    """One side's logits where the kernels find them: softcap * tanh(scale * (values + bias) / softcap)."""

    values: Tensor  # [N, W], any strides
    ids: Tensor | None = None  # int32 [K], the columns of the shared tokens; None: column k is shared token k
    bias: Tensor | None = None  # float32 [W]
    scale: float | None = None
    softcap: float | None = None

    def arguments(self) -> tuple:
        return self.values, *self.values.stride(), self.bias, self.scale, self.softcap


@triton.jit
def load_logits(
    values,  # [N, W]
    row_stride,
    column_stride,
    bias,  # float32 [W] or None
    scale,  # or None
    softcap,  # or None
    rows,  # int64, broadcasts with columns
    columns,
    row_mask,
    column_mask,
):
    """float32, as Side says; what is masked out reads as if `values` were 0 there."""
    pointers = values + rows * row_stride + columns.to(tl.int64) * column_stride
    z = tl.load(pointers, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    return finish_logits(z, bias, scale, softcap, columns, column_mask)


@triton.jit
def finish_logits(z, bias, scale, softcap, columns, column_mask):
    """What a head does to its raw products z, float32."""
    if bias is not None:
        z += tl.load(bias + columns, mask=column_mask, other=0.0)
    if scale is not None:
        z *= scale
    if softcap is not None:
        x = z / softcap
        small = tl.exp(-2 * tl.abs(x))
        z = softcap * tl.where(x < 0, small - 1, 1 - small) / (1 + small)
    return z


@triton.jit
def log_sum(m, sum_exp):
    """The log-sum-exp of what has maximum m and sum_exp = sum of exp(x - m). Of +inf, it is NaN: no softmax."""
    return tl.where(sum_exp == 0, -float("inf"), m + tl.log(sum_exp))


@triton.jit
def finite_max(m):
    """A maximum that may be taken off its terms: -inf (all terms are) minus itself would be NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def add_sums(m1, sum1, m2, sum2):
    """Maximum and sum of exp(x - m) of two sets taken together."""
    m = tl.maximum(m1, m2)
    top = finite_max(m)
    return m, sum1 * tl.exp(m1 - top) + sum2 * tl.exp(m2 - top)


@triton.jit
def log_add(a, b):
    """log(e^a + e^b), NaN if either is."""
    m = tl.maximum(a, b)
    top = finite_max(m)
    return log_sum(m, tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def summarise(x, y, DIVERGES: tl.constexpr):
    """A tile's share [R] of KL(softmax x || softmax y), from x and y [R, B].

    m, n are the maxima of x and y, u, v the sums of e^(x-m) and e^(y-n), a = sum of e^(x-m) ((x-m) - (y-n)).
    A candidate that x excludes adds nothing to a; one that only y excludes makes it infinite, underflow or not.
    """
    m, n = tl.max(x, 1), tl.max(y, 1)
    dx, dy = x - finite_max(m)[:, None], y - finite_max(n)[:, None]
    e = tl.exp(dx)
    if DIVERGES:
        a = tl.sum(tl.where(x == -float("inf"), 0.0, tl.where(e < 1e-37, 1e-37, e) * (dx - dy)), 1)
    else:
        a = tl.zeros_like(m)
    return m, tl.sum(e, 1), a, n, tl.sum(tl.exp(dy), 1)


@triton.jit
def merge(m1, u1, a1, n1, v1, m2, u2, a2, n2, v2):
    """What `summarise` gives for two sets of candidates taken together."""
    m, n = tl.maximum(m1, m2), tl.maximum(n1, n2)
    m_, n_ = finite_max(m), finite_max(n)
    w1, w2 = tl.exp(m1 - m_), tl.exp(m2 - m_)
    a = _recentre(w1, u1, a1, (m1 - m_) - (n1 - n_)) + _recentre(w2, u2, a2, (m2 - m_) - (n2 - n_))
    return m, u1 * w1 + u2 * w2, a, n, v1 * tl.exp(n1 - n_) + v2 * tl.exp(n2 - n_)


@triton.jit
def _recentre(weight, sum_exp, a, shift):
    moved = a + tl.where(sum_exp == 0, 0.0, sum_exp * shift)
    return tl.where(moved == float("inf"), moved, weight * moved)  # infinite stays so where the weight underflows to 0


@triton.jit
def log_mixture(log_q, log_p, beta):
    """log(beta p + (1 - beta) q)."""
    a, b = log_p + tl.log(beta), log_q + tl.log(1 - beta)
    top = tl.maximum(a, b)
    return tl.where(top == -float("inf"), top, top + tl.log(1 + tl.exp(-tl.abs(a - b))))


@triton.jit
def kl_terms(log_a, log_b):
    """a log(a / b): 0 where a excludes, infinite where only b does."""
    return tl.where(log_a == -float("inf"), 0.0, tl.maximum(tl.exp(log_a), 1e-37) * (log_a - log_b))


@triton.jit
def score_gradient(log_q, log_p, kl, beta, MODE: tl.constexpr):
    """The divergence's derivative by a student's score. `kl` is KL(q || m), with p for the mixture m where reverse."""
    q = tl.exp(log_q)
    if MODE == FORWARD:
        gradient = tl.where(log_q == -float("inf"), 0.0, q - tl.exp(log_p))
    else:
        log_m, factor = log_p, 1.0
        if MODE == MIXED:
            log_m, factor = log_mixture(log_q, log_p, beta), 1 - beta
        gradient = factor * q * (tl.where(log_q == -float("inf"), 0.0, log_q - log_m) - kl)
    return gradient
