"""The oracle: the paper's equations 7 to 9 (arXiv 2605.07711), one unit after the other, in plain autograd.

Every other backend is judged by this one in float64. Slow, and as large as the logits.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions


def linear_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,  # unused: the oracle makes every logit at once
) -> tuple[Tensor, Tensor]:
    """The loss, one number if `summed` or else [G], and the units' losses [G] without gradient."""
    student_logits = _logits(student_hidden, student_head)
    teacher_logits = _logits(teacher_hidden, teacher_head)
    return simct_loss(student_logits, teacher_logits, units, shared, options, summed=summed)


def simct_loss(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
) -> tuple[Tensor, Tensor]:
    """As `linear_simct_loss`, from the logits."""
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    has_continuation = units.has_continuation(shared).tolist()
    losses = [student_logits.flatten()[:0]]  # keeps the sum over no unit differentiable
    for g in range(len(units)):
        student_rows = slice(units.student_start[g], units.student_start[g] + units.student_length[g])
        teacher_rows = slice(units.teacher_start[g], units.teacher_start[g] + units.teacher_length[g])
        left_out = units.student_start.new_empty(0)
        if has_continuation[g] and options.candidates == "disjoint":
            left_out = units.left_out[units.left_out[:, 0] == g, 1]
        loss = _unit_loss(
            student_logits[student_rows],
            units.student_tokens[student_rows],
            teacher_logits[teacher_rows],
            units.teacher_tokens[teacher_rows],
            shared,
            left_out,
            has_continuation[g],
            options,
        )
        losses.append(loss[None])
    per_unit = torch.cat(losses)
    return (per_unit.sum() if summed else per_unit), per_unit.detach()


def topk_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_topk_ids: Tensor,  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor,  # [N_t, k]
    teacher_token_logprobs: Tensor,  # [N_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,  # unused
) -> tuple[Tensor, Tensor]:
    """As `linear_simct_loss`, with the teacher's scores as they are served."""
    logits = _logits(student_hidden, student_head)
    has_continuation = units.has_continuation(shared).tolist()
    index_of = {token: index for index, token in enumerate(shared.teacher_ids.tolist())}
    if shared.teacher_classes is not None:
        index_of |= {token: len(shared) + number for number, token in shared.teacher_classes.tolist()}
    losses = [logits.flatten()[:0]]
    for g in range(len(units)):
        student_rows = slice(units.student_start[g], units.student_start[g] + units.student_length[g])
        teacher_rows = slice(units.teacher_start[g], units.teacher_start[g] + units.teacher_length[g])
        tokens, served = teacher_topk_ids[teacher_rows][0], teacher_topk_logprobs[teacher_rows][0]
        best: dict[int, float] = {}  # by token: a server may list one twice
        for token, logprob in zip(tokens.tolist(), served.tolist(), strict=True):
            if token in index_of and logprob != -math.inf:
                before = best.get(token, -math.inf)
                best[token] = logprob if logprob > before or math.isnan(logprob) else before
        found: dict[int, list[float]] = {}
        for token, logprob in best.items():
            found.setdefault(index_of[token], []).append(logprob)
        teacher_score = {
            index: torch.tensor(terms, dtype=torch.float64).logsumexp(0).item() for index, terms in found.items()
        }
        if has_continuation[g] and options.candidates == "disjoint":
            for index in units.left_out[units.left_out[:, 0] == g, 1].tolist():
                teacher_score.pop(index, None)
        kept = torch.tensor(list(teacher_score), dtype=torch.int64, device=logits.device)
        t = logits.new_tensor(list(teacher_score.values()))
        ids = shared.student_ids, shared.student_classes
        if options.top_k is not None:
            first = _candidate_logits(logits[student_rows][0], *ids)[kept]
            choice = first.topk(min(options.top_k, len(kept))).indices
            kept, t = kept[choice], t[choice]
        tokens = units.student_tokens[student_rows]
        s = _scores(logits[student_rows], tokens, ids, kept, has_continuation[g], options)
        if has_continuation[g]:
            realised = teacher_token_logprobs[teacher_rows].detach().to(t.dtype)
            continuation = realised.sum() if options.score == "sum_logprob" else realised.mean()
            t = torch.cat([t, continuation[None]])
        below = options.teacher_mass_floor is not None and t.exp().sum() < options.teacher_mass_floor
        if len(t) == 0 or below:
            losses.append(logits.new_zeros(1))
        else:
            log_q = torch.log_softmax(s / options.temperature, dim=0)
            losses.append(_divergence(log_q, torch.log_softmax(t / options.temperature, dim=0), options.beta)[None])
    per_unit = torch.cat(losses)
    return (per_unit.sum() if summed else per_unit), per_unit.detach()


def _unit_loss(
    student_logits: Tensor,  # [m, V_s], the rows of the unit
    student_tokens: Tensor,  # int64 [m]
    teacher_logits: Tensor,  # [n, V_t]
    teacher_tokens: Tensor,  # int64 [n]
    shared: SharedVocabulary,
    left_out: Tensor,  # int64 [any], shared indices
    has_continuation: bool,
    options: LossOptions,
) -> Tensor:
    count = len(shared) + shared.class_count
    is_candidate = torch.ones(count, dtype=torch.bool, device=shared.student_ids.device)
    is_candidate[left_out] = False
    kept = is_candidate.nonzero().squeeze(1)
    ids, teacher_ids = (shared.student_ids, shared.student_classes), (shared.teacher_ids, shared.teacher_classes)
    if options.top_k is not None:
        choice = _candidate_logits(student_logits[0], *ids)[kept].topk(min(options.top_k, len(kept))).indices
        kept = kept[choice]
    s = _scores(student_logits, student_tokens, ids, kept, has_continuation, options)
    t = _scores(teacher_logits, teacher_tokens, teacher_ids, kept, has_continuation, options)

    loss = _divergence(  # Eq. 8 and 9
        torch.log_softmax(s / options.temperature, dim=0),
        torch.log_softmax(t / options.temperature, dim=0),
        options.beta,
    )
    if options.teacher_mass_floor is not None:
        log_mass = t
        if not (has_continuation and options.normalises):
            log_mass = t - teacher_logits[0].logsumexp(dim=0)
        if log_mass.exp().sum() < options.teacher_mass_floor:
            loss = torch.zeros_like(loss)
    return loss


def _scores(
    logits: Tensor,  # [k, V], the rows of one side
    tokens: Tensor,  # int64 [k]
    ids: tuple[Tensor, Tensor | None],  # of this side: int64 [K], and [M, 2] of the classes
    kept: Tensor,  # int64 [C], which of the shared tokens and, from K on, classes are candidates
    has_continuation: bool,
    options: LossOptions,
) -> Tensor:
    """Eq. 7: the scores of the shared candidates and, if there is one, of the continuation: [C] or [C + 1]."""
    if not has_continuation:
        # The log-sum-exp is one constant for all candidates: it cancels in the softmax.
        return _candidate_logits(logits[0], *ids)[kept]
    if options.normalises:
        logits = torch.log_softmax(logits, dim=1)
    realised = logits.gather(1, tokens[:, None]).squeeze(1)  # [k]
    continuation = realised.sum() if options.score == "sum_logprob" else realised.mean()
    return torch.cat([_candidate_logits(logits[0], *ids)[kept], continuation[None]])


def _candidate_logits(
    row: Tensor,  # [V]
    ids: Tensor,  # int64 [K]
    classes: Tensor | None,  # int64 [M, 2], rows (class, id)
) -> Tensor:
    """The logits of the shared tokens, then the log-sum-exps of the classes' logits: [K + classes]."""
    logits = row[ids]
    if classes is None:
        return logits
    sums = []
    for number in range(int(classes[-1, 0]) + 1):
        members = row[classes[classes[:, 0] == number, 1]]
        members = members[members != -math.inf]  # of nothing but these, the derivative would be no number
        sums.append(members.logsumexp(dim=0) if len(members) else row.new_tensor(-math.inf))
    return torch.cat([logits, torch.stack(sums)])


def _divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Of the student's q and the teacher's p, both [C]: forward KL at beta 0, reverse KL at 1, else generalised JSD."""
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    possible = (log_q != -math.inf) | (log_p != -math.inf)
    log_q, log_p = log_q[possible], log_p[possible]
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b): a candidate that a excludes adds nothing, one that only b excludes makes it infinite."""
    support = log_a != -math.inf
    log_a, log_b = log_a[support], log_b[support]
    return (log_a.exp() * (log_a - log_b)).sum()


def _logits(hidden: Tensor, head: LMHead) -> Tensor:
    """[N, V], from [N, H] hidden states, in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    return dataclasses.replace(head, weight=head.weight.to(dtype), bias=bias).logits(hidden.to(dtype))
