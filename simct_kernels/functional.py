"""The losses that users call: they check their arguments, choose a backend and reduce. No mathematics here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simct_kernels import backends, ops
from simct_kernels.checks import (
    check_hidden,
    check_ids,
    check_left_out,
    check_matrix,
    check_rows,
    check_served,
    check_token_logprobs,
    check_units,
    whole_head,
)
from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions, check_chunk_rows, check_reduction
from simct_kernels.torch_backend.topk import shared_candidates


def simct_loss(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    score: str = "mean_logprob",
    candidates: str = "paper",
    top_k: int | None = None,
    teacher_mass_floor: float | None = None,
    reduction: str = "sum",
    backend: str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SimCT's loss (arXiv 2605.07711, Eq. 7 to 9) from both models' logits; the gradient goes to student_logits only.

    As `linear_simct_loss`, which see for the options and errors, for logits after any soft-cap and scale
    (bf16, fp16, fp32 or fp64, each side its own).
    """
    options = LossOptions(beta, temperature, score, candidates, top_k, teacher_mass_floor)
    check_reduction(reduction, return_unit_losses)
    check_units(units, shared)
    for side, logits in (("student", student_logits), ("teacher", teacher_logits)):
        check_matrix(f"{side}_logits", logits, units)
        check_rows(f"{side}_logits", logits, side, units)
        check_ids(f"{side}_logits", logits.shape[1], side, units, shared)
    arguments = (student_logits, teacher_logits, units, shared, options)
    loss, unit_losses = _call("simct_loss", arguments, backend, summed=reduction != "none")
    return _reduce(loss, unit_losses, reduction, return_unit_losses)


def linear_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    score: str = "mean_logprob",
    candidates: str = "paper",
    top_k: int | None = None,
    teacher_mass_floor: float | None = None,
    reduction: str = "sum",
    backend: str = "auto",
    chunk_rows: int | str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SimCT's loss (arXiv 2605.07711, Eq. 7 to 9) from last hidden states and output heads, without whole logits.

    Gradients go to student_hidden and to the student head's weight and bias. Hidden states and heads are bf16, fp16,
    fp32 or fp64, each side its own; sums are kept in float32 (float64 if any input is). Double backward is refused.

    Args:
        student_hidden, teacher_hidden: one row for each of `units`' student_tokens and teacher_tokens.
        beta: 0 forward KL(teacher || student), 1 reverse KL, between them the generalised Jensen-Shannon divergence
            beta KL(q_t || m) + (1 - beta) KL(q_s || m) with m = beta q_t + (1 - beta) q_s.
        temperature: divides the scores; the loss is not multiplied by its square.
        score: a continuation's score. "mean_logprob" is the paper's, "sum_logprob" its log-probability; "mean_logit"
            takes raw logits, for it and for the shared candidates, and equals the first only if normalisers agree.
        candidates: "paper", or "disjoint" to leave `units.left_out` out of the units with a continuation.
        top_k: keep of a unit's shared candidates, classes among them, only the student's k most probable, without gradient
            through the choice; the continuation always stays.
        teacher_mass_floor: a unit where the teacher's probability of all candidates is below it has no loss and no
            gradient.
        reduction: "sum", "mean" over units, or "none" for [G].
        backend: "auto" (Triton on a GPU, else PyTorch), "triton", "torch", "reference" (the slow oracle).
        chunk_rows: how many rows of logits of either side exist at once; a unit is never split. "auto": by memory.
        return_unit_losses: also return the units' losses [G], detached. With "sum" and "mean", whose gradients are made
            in the forward pass, this is cheaper than reduction="none".

    Returns:
        The loss in float32 (float64 if any input is), or (loss, unit_losses). No unit gives a differentiable 0. A NaN
        that a unit reads makes that unit's loss NaN, a candidate that only the other side excludes makes it infinite.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids outside a head's vocabulary, an option out of its
            range, a backend that is not installed.
    """
    options = LossOptions(beta, temperature, score, candidates, top_k, teacher_mass_floor)
    check_reduction(reduction, return_unit_losses)
    check_chunk_rows(chunk_rows)
    check_units(units, shared)
    student_head, teacher_head = whole_head("student_head", student_head), whole_head("teacher_head", teacher_head)
    sides = (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head))
    for side, hidden, head in sides:
        check_hidden(f"{side}_hidden", hidden, f"{side}_head", head, units)
        check_rows(f"{side}_hidden", hidden, side, units)
        check_ids(f"{side}_head", head.weight.shape[0], side, units, shared)
    arguments = (student_hidden, student_head, teacher_hidden, teacher_head, units, shared, options)
    loss, unit_losses = _call(
        "linear_simct_loss", arguments, backend, summed=reduction != "none", chunk_rows=chunk_rows
    )
    return _reduce(loss, unit_losses, reduction, return_unit_losses)


def topk_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_topk_ids: Tensor,  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor,  # [N_t, k]
    teacher_token_logprobs: Tensor,  # [N_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    score: str = "mean_logprob",
    candidates: str = "paper",
    top_k: int | None = None,
    teacher_mass_floor: float | None = None,
    reduction: str = "sum",
    backend: str = "auto",
    chunk_rows: int | str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SimCT's loss (arXiv 2605.07711, Eq. 7 to 9) for a served teacher, of which the k best log-probabilities are known.

    A unit's candidates are the shared tokens among the teacher's k best at the unit's first row and, where there is
    one, the continuation, whose score is the mean (or sum) of the teacher's log-probabilities of its own tokens. A
    single unit's own token is a candidate only if it is among the k. Of a class the teacher's side is the sum of those of its
    ids that are among the k, the student's of all. A unit without a candidate has loss 0 and no
    gradient, like one with a single candidate: `topk_candidate_counts` tells which. With k = V_t this is
    `linear_simct_loss`, which see for what is not said here.

    Args:
        teacher_topk_ids: row i's k most probable tokens, in any order. Entries with id -1, or with log-probability -inf,
            are padding. Ids that are not shared are passed over. A repeated id counts once, with the largest of its
            log-probabilities; one NaN among them makes it NaN, and the unit's loss with it.
        teacher_topk_logprobs: their log-probabilities over the teacher's whole vocabulary at temperature 1, in bf16,
            fp16, fp32 or fp64; the computation is in float64 only if student_hidden or the head is.
        teacher_token_logprobs: the log-probability of `units.teacher_tokens[i]` at row i. Only rows of units with a
            continuation are read.
        score: "mean_logprob" or "sum_logprob"; a served teacher has no logits for "mean_logit".
        top_k: of these candidates.
        backend: "auto", "triton", "torch", or "reference" (the slow oracle).

    Raises:
        ValueError: as `linear_simct_loss`, and for score="mean_logit".
    """
    options = LossOptions(beta, temperature, score, candidates, top_k, teacher_mass_floor)
    if not options.normalises:
        raise ValueError(
            'score must be "mean_logprob" or "sum_logprob", got "mean_logit": a served teacher gives log-probabilities, '
            "not logits"
        )
    check_reduction(reduction, return_unit_losses)
    check_chunk_rows(chunk_rows)
    check_units(units, shared)
    student_head = whole_head("student_head", student_head)
    check_hidden("student_hidden", student_hidden, "student_head", student_head, units)
    check_rows("student_hidden", student_hidden, "student", units)
    check_ids("student_head", student_head.weight.shape[0], "student", units, shared)
    check_served(teacher_topk_ids, teacher_topk_logprobs, units)
    check_token_logprobs(teacher_token_logprobs, units)
    served = (teacher_topk_ids, teacher_topk_logprobs, teacher_token_logprobs)
    loss, unit_losses = _call(
        "topk_simct_loss",
        (student_hidden, student_head, *served, units, shared, options),
        backend,
        summed=reduction != "none",
        chunk_rows=chunk_rows,
    )
    return _reduce(loss, unit_losses, reduction, return_unit_losses)


@torch.no_grad()
def topk_candidate_counts(
    teacher_topk_ids: Tensor,  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor,  # [N_t, k]
    units: AlignedUnits,
    shared: SharedVocabulary,
    *,
    candidates: str = "paper",
) -> Tensor:
    """int64 [G]: how many candidates each unit has in `topk_simct_loss`, the continuation included, before its `top_k`.

    A unit with 0 has none of the teacher's k best to learn from; with 1 its softmaxes are certain on both sides. In
    both cases its loss is 0: `(counts < 2).sum()` are the units that teach nothing. A class is one candidate. A token of
    log-probability NaN counts.
    Errors are as in `topk_simct_loss`.
    """
    options = LossOptions(candidates=candidates)
    check_units(units, shared)
    check_served(teacher_topk_ids, teacher_topk_logprobs, units)
    check_left_out(units, shared, options)
    found = shared_candidates(teacher_topk_ids, teacher_topk_logprobs, units, shared, options).found
    return found.sum(dim=1) + units.has_continuation(shared)


def _call(loss: str, arguments: tuple, backend: str, **keywords: Any) -> tuple[Tensor, Tensor]:
    """A loss of the chosen backend; within torch.compile its custom op, which is not traced into."""
    name = backends.choose(backend, arguments[0].device.type)
    if torch.compiler.is_compiling() and name != "reference":
        return getattr(ops, loss)(*arguments, **keywords, backend=name)
    check_left_out(*arguments[-3:])
    module = backends.load(name)
    return getattr(module, loss)(*arguments, **keywords)


def _reduce(
    loss: Tensor, unit_losses: Tensor, reduction: str, return_unit_losses: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if reduction == "mean":
        loss = loss / max(1, len(unit_losses))
    return (loss, unit_losses) if return_unit_losses else loss
