"""ALM, approximate likelihood matching (Minixhofer et al. 2025, arXiv 2503.20083): a baseline, on aligned units.

It compares how likely each side finds a unit's whole text, against everything else: no vocabulary takes part but the rows' own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simct_kernels.checks import check_tokens, check_unit_loss
from simct_kernels.inputs import AlignedUnits, LMHead
from simct_kernels.objectives.row_function import over_rows
from simct_kernels.objectives.segments import SumByUnit, expand, reduce_units
from simct_kernels.torch_backend.job import compute_dtype
from simct_kernels.torch_backend.plan import auto_rows
from simct_kernels.values import check_choice

DIVERGENCES = ("kl", "reverse_kl")


@torch.compiler.disable
def alm_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    *,
    temperature: float = 1.0,
    divergence: str = "kl",
    reduction: str = "sum",
    chunk_rows: int | str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A divergence of the two Bernoulli distributions "the text goes on with this unit" of teacher and student.

    With log p = the sum of the log-probabilities of a unit's tokens on one side, and p^(1/tau) on both sides:
    loss(unit) = KL( (p_T^(1/tau), 1 - p_T^(1/tau)) || (p_S^(1/tau), 1 - p_S^(1/tau)) ). Gradients go to student_hidden and the
    student head's weight and bias. The paper's chunks are the units here; its correction for the bias of chunk ends is not made.

    Args:
        student_hidden, teacher_hidden: one row for each of `units`' student_tokens and teacher_tokens.
        temperature: tau. The authors' default is 100; a large one weighs the log-likelihoods' difference alone.
        divergence: "kl", KL(teacher || student), the authors' default, or "reverse_kl".
        reduction: "sum", "mean" over units, or "none" for [G].
        chunk_rows: how many rows of logits of either side exist at once. "auto": by memory.
        return_unit_losses: also return the units' losses [G], detached.

    Returns:
        The loss in float32 (float64 if any input is), or (loss, unit_losses). No unit gives a differentiable 0. A NaN that
        a unit reads makes that unit's loss NaN, a text that only the compared side excludes makes it infinite. Probabilities
        near 1 keep their distance from it (down to e^-87 in float32). Double backward is refused.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, tokens outside a head's vocabulary, an option out of its range.
    """
    check_choice("divergence", divergence, DIVERGENCES)
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    options = (temperature, reduction, chunk_rows, return_unit_losses)
    student_head, teacher_head = check_unit_loss(*sides, units, *options)
    check_tokens("student_head", student_head, "student", units)
    check_tokens("teacher_head", teacher_head, "teacher", units)
    dtype = compute_dtype(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    student = _unit_logprobs(student_hidden, student_head, "student", units, chunk_rows, dtype)
    with torch.no_grad():
        teacher = _unit_logprobs(teacher_hidden, teacher_head, "teacher", units, chunk_rows, dtype)
    student, teacher = student / temperature, teacher / temperature
    losses = _BinaryDivergence.apply(student, teacher, divergence)
    return reduce_units(losses, reduction, return_unit_losses)


def _unit_logprobs(
    hidden: Tensor, head: LMHead, side: str, units: AlignedUnits, chunk_rows: int | str, dtype: torch.dtype
) -> Tensor:
    """[G]: the log-probability of each unit's text under its side's tokens."""
    start, length, tokens = (getattr(units, f"{side}_{part}") for part in ("start", "length", "tokens"))
    unit, rows = expand(start, start + length)
    step = chunk_rows if isinstance(chunk_rows, int) else auto_rows(2 * head.weight.shape[0], hidden.device)
    logprobs = over_rows(_TokenLogprob(tokens[rows]), hidden, head, rows, step=step, dtype=dtype)
    return SumByUnit.apply(logprobs, unit, len(units))


class _TokenLogprob:
    """log p(token) = log sigmoid(z_token - lse of all others): near 0 it keeps the digits that z_token - lse has lost."""

    def __init__(self, tokens: Tensor) -> None:  # int64 [R]
        self.tokens = tokens

    def value(self, logits: Tensor, part: slice) -> Tensor:
        return F.logsigmoid(self._margin(logits, part)[0])

    def gradient(self, logits: Tensor, part: slice) -> Tensor:
        margin, others, token = self._margin(logits, part)
        missed = torch.sigmoid(-margin)[:, None]  # 1 - p(token)
        gradient = logits.sub_(others[:, None]).exp_().mul_(-missed)  # 0 at the token, which is -inf here
        return gradient.scatter_(1, token, missed)

    def _margin(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        token = self.tokens[part, None]
        own = logits.gather(1, token).squeeze(1)
        others = logits.scatter_(1, token, -torch.inf).logsumexp(dim=1)
        # An infinite logit is no distribution, although its log sigmoid would be a number.
        margin = (own - others).masked_fill_(own.maximum(others) == torch.inf, torch.nan)
        return margin, others, token


class _BinaryDivergence(torch.autograd.Function):
    """Of [G] log-probabilities; the gradient goes to the student's, and none to a unit that the caller dropped."""

    @staticmethod
    def forward(ctx, student, teacher, divergence):
        ctx.save_for_backward(student, teacher)
        ctx.divergence = divergence
        return _BinaryDivergence.compute(student, teacher, divergence)

    @staticmethod
    def compute(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
        return _binary_kl(teacher, student) if divergence == "kl" else _binary_kl(student, teacher)

    @staticmethod
    def backward(ctx, upstream):
        student, teacher = ctx.saved_tensors
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            losses = _BinaryDivergence.compute(student, teacher, ctx.divergence)
        (gradient,) = torch.autograd.grad(losses, student, upstream)
        # Zero times what a non-finite loss leaves would be a NaN.
        return gradient.masked_fill(upstream == 0, 0), None, None


def _binary_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of the Bernoulli distributions with these log-probabilities, elementwise."""
    with_it = _times(log_p.exp(), log_p - log_q)
    without_it = _times(-torch.expm1(log_p), log1mexp(log_p) - log1mexp(log_q))
    return with_it + without_it


def _times(weight: Tensor, difference: Tensor) -> Tensor:
    """weight * difference, 0 where the weight is (the difference may be infinite or undefined there); both sides differentiable."""
    nothing = weight == 0
    return torch.where(nothing, weight, weight * difference.masked_fill(nothing, 0))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, accurate at both ends; -inf at 0, without gradient."""
    certain = x == 0
    near = x > -0.6931  # log 2: above it, 1 - e^x is small and expm1 keeps its digits
    small = torch.log(-torch.expm1(x.masked_fill(~near | certain, -1.0))).masked_fill(certain, -torch.inf)
    large = torch.log1p(-torch.exp(x.masked_fill(near, -1.0)))
    return torch.where(near, small, large)
