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
    ids: Tensor | None = None  # int32 [K' >= K], the columns of the shared tokens; None: column k is shared token k
    bias: Tensor | None = None  # float32 [W]
    scale: float | None = None
    softcap: float | None = None

    def arguments(self) -> tuple:
        return self.values, *self.values.stride(), self.bias, self.scale, self.softcap

    @property
    def bound(self) -> int:
        """Up to where shared tokens can be read, K or more: a bound that 16 divides makes for 16-byte reads, an odd K not.

        What is read from K on is a real column, but no shared token: the arithmetic leaves it out.
        """
        return self.values.shape[1] if self.ids is None else len(self.ids)


@triton.jit
def exp(x):
    """e^x in two instructions: Triton makes five of `tl.exp`, which keeps results below 1.2e-38 that nothing here needs."""
    return tl.exp2(x * 1.4426950408889634)


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
        small = exp(tl.abs(z) * (-2 / softcap))  # one division of scalars, and one of the elements
        z = tl.where(z < 0, -softcap, softcap) * ((1 - small) / (1 + small))
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
    return m, sum1 * exp(m1 - top) + sum2 * exp(m2 - top)


@triton.jit
def log_add(a, b):
    """log(e^a + e^b), NaN if either is."""
    m = tl.maximum(a, b)
    top = finite_max(m)
    return log_sum(m, exp(a - top) + exp(b - top))


@triton.jit
def fold_max(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The maxima [R, L] of a tile [R, B], by lanes.

    A lane takes every L-th group of VECTOR neighbours, as a thread does of a tile that is read 16 bytes at a time: nothing
    crosses threads. L is at most LANES, the number of threads.
    """
    return tl.max(tl.max(_by_lanes(x, LANES, VECTOR), 3), 1)


@triton.jit
def fold_sum(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The sums [R, L] of a tile [R, B], by lanes: see fold_max."""
    return tl.sum(tl.sum(_by_lanes(x, LANES, VECTOR), 3), 1)


@triton.jit
def _by_lanes(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    GROUPS: tl.constexpr = x.shape[1] // VECTOR
    L: tl.constexpr = GROUPS if GROUPS < LANES else LANES
    return tl.reshape(x, [x.shape[0], GROUPS // L, L, VECTOR])


@triton.jit
def add_tile(m, u, a, n, v, x, y, scale, DIVERGES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """What a tile x, y [R, B] adds to KL(softmax scale x || softmax scale y), by lanes [R, L]. scale > 0.

    m, n are the maxima of x and y, u, v the sums of e^(scale (x-m)) and e^(scale (y-n)), and a = sum of
    e^(scale (x-m)) ((x-m) - (y-n)). A candidate that x excludes adds nothing to a (that it is not quite nothing, 1e-16 at
    most, saves two instructions of some twenty); one that only y excludes makes it infinite, underflow or not.
    """
    next_m, next_n = tl.maximum(m, fold_max(x, LANES, VECTOR)), tl.maximum(n, fold_max(y, LANES, VECTOR))
    m_, n_ = finite_max(next_m), finite_max(next_n)
    dx, dy = x - _spread(m_, x, LANES, VECTOR), y - _spread(n_, y, LANES, VECTOR)
    binary = scale * 1.4426950408889634  # 2^(binary x) = e^(scale x)
    e = tl.exp2(dx * binary)
    m, n = m - m_, n - n_
    weight = tl.exp2(m * binary)
    if DIVERGES:
        a = recentre(weight, u, a, m - n)
        a += fold_sum(tl.maximum(e, 1.2e-38) * tl.maximum(dx - dy, -1e22), LANES, VECTOR)
    u = u * weight + fold_sum(e, LANES, VECTOR)
    v = v * tl.exp2(n * binary) + fold_sum(tl.exp2(dy * binary), LANES, VECTOR)
    return next_m, u, a, next_n, v


@triton.jit
def add_exps(m, total, x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Maximum and sum of exp(x - maximum) by lanes [R, L], with a tile [R, B] added."""
    next_m = tl.maximum(m, fold_max(x, LANES, VECTOR))
    top = finite_max(next_m)
    return next_m, total * exp(m - top) + fold_sum(exp(x - _spread(top, x, LANES, VECTOR)), LANES, VECTOR)


@triton.jit
def _spread(lanes, x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """What each element's lane has, [R, B] as x."""
    GROUPS: tl.constexpr = x.shape[1] // VECTOR
    return tl.reshape(
        tl.broadcast_to(lanes[:, None, :, None], [x.shape[0], GROUPS // lanes.shape[1], lanes.shape[1], VECTOR]),
        x.shape,
    )


@triton.jit
def merge(m1, u1, a1, n1, v1, m2, u2, a2, n2, v2):
    """What `add_tile` gives at scale 1, for two sets of candidates taken together."""
    m, n = tl.maximum(m1, m2), tl.maximum(n1, n2)
    m_, n_ = finite_max(m), finite_max(n)
    w1, w2 = exp(m1 - m_), exp(m2 - m_)
    a = recentre(w1, u1, a1, (m1 - m_) - (n1 - n_)) + recentre(w2, u2, a2, (m2 - m_) - (n2 - n_))
    return m, u1 * w1 + u2 * w2, a, n, v1 * exp(n1 - n_) + v2 * exp(n2 - n_)


@triton.jit
def gather(m, u, a, n, v):
    """As `merge`, of the S sets of each of R units [R, S] taken together: [R] each."""
    top, low = tl.max(m, 1), tl.max(n, 1)
    dm, dn = m - finite_max(top)[:, None], n - finite_max(low)[:, None]
    weight = exp(dm)
    return top, tl.sum(u * weight, 1), tl.sum(recentre(weight, u, a, dm - dn), 1), low, tl.sum(v * exp(dn), 1)


@triton.jit
def gather_sums(m, total):
    """As `add_sums`, of S sets of each of R units [R, S] taken together: [R] each."""
    top = tl.max(m, 1)
    return top, tl.sum(total * exp(m - finite_max(top)[:, None]), 1)


@triton.jit
def recentre(weight, sum_exp, a, shift):
    moved = a + tl.where(sum_exp == 0, 0.0, sum_exp * shift)
    return tl.where(moved == float("inf"), moved, weight * moved)  # infinite stays so where the weight underflows to 0


@triton.jit
def log_mixture(log_q, log_p, beta):
    """log(beta p + (1 - beta) q)."""
    a, b = log_p + tl.log(beta), log_q + tl.log(1 - beta)
    top = tl.maximum(a, b)
    return tl.where(top == -float("inf"), top, top + tl.log(1 + exp(-tl.abs(a - b))))


@triton.jit
def kl_terms(log_a, log_b):
    """a log(a / b): 0 where a excludes, infinite where only b does."""
    return tl.where(log_a == -float("inf"), 0.0, tl.maximum(exp(log_a), 1e-37) * (log_a - log_b))


@triton.jit
def score_gradient(log_q, log_p, kl, beta, MODE: tl.constexpr):
    """The divergence's derivative by a student's score. `kl` is KL(q || m), with p for the mixture m where reverse."""
    q = exp(log_q)
    if MODE == FORWARD:
        gradient = tl.where(log_q == -float("inf"), 0.0, q - exp(log_p))
    else:
        log_m, factor = log_p, 1.0
        if MODE == MIXED:
            log_m, factor = log_mixture(log_q, log_p, beta), 1 - beta
        gradient = factor * q * (tl.where(log_q == -float("inf"), 0.0, log_q - log_m) - kl)
    return gradient
