"""What a trainer logs about one side's predictions, computed chunk by chunk without gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simct_kernels import torch_backend
from simct_kernels.checks import check_hidden, check_ids, check_left_out, check_rows, check_units, whole_head
from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions, check_chunk_rows
from simct_kernels.torch_backend.plan import auto_rows
from simct_kernels.torch_backend.rows import LinearRows
from simct_kernels.values import check_choice, describe, is_dense, refuse_any


class TokenStatistics(NamedTuple):
    """Of each row's softmax over the whole vocabulary, at temperature 1."""

    logprob: Tensor  # float32 [N], of the row's token
    entropy: Tensor  # float32 [N], in nats
    logsumexp: Tensor  # float32 [N]


@torch.no_grad()
def token_statistics(
    hidden: Tensor,  # [N, H]
    head: LMHead,
    tokens: Tensor,  # int64 [N]
    *,
    chunk_rows: int | str = "auto",
) -> TokenStatistics:
    """The log-probability of `tokens` and the entropy and log-sum-exp of their rows' distributions. A sharded head is gathered:
    every process must call it.

    Raises ValueError for shapes, dtypes or devices that do not fit, and on the CPU for tokens outside the vocabulary: elsewhere
    looking at them would wait for the device.
    """
    head = whole_head("head", head)
    check_hidden("hidden", hidden, "head", head)
    check_chunk_rows(chunk_rows)
    is_int64 = is_dense(tokens) and tokens.dtype == torch.int64
    if not is_int64 or tokens.shape != hidden.shape[:1] or tokens.device != hidden.device:
        where = f" on {tokens.device}" if isinstance(tokens, Tensor) else ""
        raise ValueError(
            f"tokens must be int64 [{hidden.shape[0]}] on {hidden.device}, one for each row of hidden, "
            f"got {describe(tokens)}{where}"
        )
    if tokens.is_cpu:
        outside = (tokens < 0) | (tokens >= head.weight.shape[0])
        refuse_any("tokens", tokens, outside, f"must be ids of head, 0 to {head.weight.shape[0] - 1}")
    source = LinearRows(hidden, head, tokens.new_empty(0), torch_backend.compute_dtype(hidden, head.weight))
    step = auto_rows(head.weight.shape[0], hidden.device) if chunk_rows == "auto" else chunk_rows
    columns = torch.empty(3, hidden.shape[0], device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in torch.arange(hidden.shape[0], device=hidden.device).split(min(step, len(hidden) or 1)):
            if len(rows) == 0:
                break
            logits = source.whole(rows)
            logsumexp = logits.logsumexp(dim=1)
            logprob = logits.gather(1, tokens[rows, None]).squeeze(1) - logsumexp
            logits -= logsumexp[:, None]
            # A token of probability 0 adds nothing to the entropy.
            entropy = -logits.exp().mul_(logits.masked_fill_(logits == -torch.inf, 0)).sum(dim=1)
            columns[:, rows] = torch.stack([logprob, entropy, logsumexp]).float()
    return TokenStatistics(*columns)


@torch.no_grad()
def ids_probability(
    hidden: Tensor,  # [N, H]
    head: LMHead,
    ids: Tensor,  # int64 [M]
    logsumexp: Tensor,  # float32 [N], of the rows: see token_statistics
) -> Tensor:
    """float32 [N]: the summed probability of `ids` in each row. Reads M rows of the head."""
    dtype = torch_backend.compute_dtype(hidden, head.weight)
    source = LinearRows(hidden, head, ids.new_empty(0), dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = source.pick_same(torch.arange(len(hidden), device=hidden.device), ids)
    return (logits.float() - logsumexp[:, None]).exp().sum(dim=1)


def candidate_mass(
    hidden: Tensor,  # [N_t, H], or [N_s, H] for the student
    head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    *,
    side: str = "teacher",
    score: str = "mean_logprob",
    candidates: str = "paper",
    chunk_rows: int | str = "auto",
) -> Tensor:
    """float32 [G]: the probability that one side puts on each unit's candidates, `teacher_mass_floor`'s measure.

    It is the sum of the shared candidates' and classes' probabilities and, where there is a continuation, exp of its score (Eq. 7).
    That score is a mean log-probability, unless `score` is another, so that the sum may pass 1. Options and errors are
    those of `linear_simct_loss`, and a sharded head is gathered.
    """
    options = LossOptions(score=score, candidates=candidates)
    check_choice("side", side, ("teacher", "student"))
    check_chunk_rows(chunk_rows)
    check_units(units, shared)
    with torch.no_grad():
        head = whole_head("head", head)
    check_hidden("hidden", hidden, "head", head, units)
    check_rows("hidden", hidden, side, units)
    check_ids("head", head.weight.shape[0], side, units, shared)
    check_left_out(units, shared, options)
    return torch_backend.candidate_mass(hidden, head, units, shared, options, side=side, chunk_rows=chunk_rows).float()
