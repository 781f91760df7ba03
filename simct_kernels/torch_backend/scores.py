"""Eq. 7 for one side: the scores of a chunk's candidates, and their probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.classes import ClassScores, gather
from simct_kernels.torch_backend.plan import Chunk, Part, row_blocks
from simct_kernels.torch_backend.rows import Rows, add_repeated


@dataclass(frozen=True)
class Scores:
    """One side's scores of a chunk's candidates, up to a constant for each unit where its log-sum-exps cancel."""

    shared: Tensor  # [g, K] or [g, k]
    continuation: Tensor | None  # [g]
    targets: Tensor | None  # [R], the logits of the rows' own tokens
    logits: Tensor | None  # [R, V], where whole rows are read
    logsumexp: Tensor | None  # [R], likewise
    first_logsumexp: Tensor | None  # [g], likewise
    classes: ClassScores | None = None


def candidate_scores(
    source: Rows,
    part: Part,
    chunk: Chunk,
    options: LossOptions,
    columns: Tensor | None = None,  # int64 [g, k], the candidates wanted; None: the K shared ones
) -> Scores:
    """Eq. 7 for one side."""
    ids, candidates = source.shared_ids, columns
    if columns is not None and source.classes is not None:
        columns = columns.clamp(max=len(ids) - 1)
    logits = logsumexp = first_logsumexp = continuation = targets = None
    if part.whole:
        logits = source.whole(part.rows)
        logsumexp = torch.cat([logits[block].logsumexp(1) for block in row_blocks(*logits.shape, logits.device)])
        # A row with +inf has no softmax; minus an infinite log-sum-exp its other tokens would merely look impossible.
        logsumexp.masked_fill_(logsumexp == math.inf, math.nan)
        first_logsumexp = logsumexp[part.first]
        if columns is None:
            shared = logits.new_empty(len(part.first), len(ids))
            for block in row_blocks(*logits.shape, logits.device):
                shared[block] = logits[part.first[block]][:, ids]
        else:
            shared = logits[part.first[:, None], ids[columns]]
        if options.normalises:
            shared -= first_logsumexp[:, None]
    elif columns is None:
        shared = source.shared(part.first_rows)
    else:
        shared = source.pick(part.first_rows, ids[columns])
    if chunk.has_continuation:
        if logits is not None:
            targets = logits.gather(1, part.tokens[:, None]).squeeze(1)
        else:
            targets = source.pick(part.rows, part.tokens[:, None]).squeeze(1)
        terms = targets - logsumexp if part.whole and options.normalises else targets
        continuation = continuation_scores(terms, part, options)
    classes = None
    if source.classes is not None:
        if logits is None:
            members = source.pick_same(part.first_rows, source.classes.ids)
        else:
            members = logits[part.first[:, None], source.classes.ids]
        classes = source.classes.scores(members, first_logsumexp if options.normalises else None)
        if candidates is not None:
            shared = gather(shared, classes, candidates, len(ids), picked=True)
    return Scores(shared, continuation, targets, logits, logsumexp, first_logsumexp, classes)


def continuation_scores(terms: Tensor, part: Part, options: LossOptions) -> Tensor:
    """The scores [g] of a chunk's continuations, from the terms [R] of their rows."""
    total = add_repeated(terms.new_zeros(len(part.length)), part.unit, terms)
    return total if options.score == "sum_logprob" else total / part.length


def by_terms(by_continuation: Tensor, part: Part, options: LossOptions) -> Tensor:
    """The gradient [R] by the terms of `continuation_scores`, from that by the scores [g]."""
    if options.score != "sum_logprob":
        by_continuation = by_continuation / part.length
    return by_continuation[part.unit]


def leave_out(shared: Tensor, chunk: Chunk, columns: Tensor | None = None) -> Tensor:
    """Takes the candidates that `disjoint` leaves out away, in place, from scores of all K or of the given columns."""
    if chunk.left_out is not None:
        unit, index = chunk.left_out.T
        if columns is None:
            shared[unit, index] = -math.inf
        else:
            found = (columns[unit] == index[:, None]).int()  # [e, k]
            shared.masked_fill_(torch.zeros_like(columns, dtype=torch.int32).index_add_(0, unit, found) > 0, -math.inf)
    return shared


def mass_of(scores: Scores, shared: Tensor, options: LossOptions, classes: ClassScores | None) -> Tensor:
    """The probability [g] of the candidates, `shared` [g, K], classes and the continuation, of a side that reads whole rows."""
    continuation, by_class = scores.continuation, None if classes is None else classes.scores
    if not options.normalises:
        shared = shared - scores.first_logsumexp[:, None]
        by_class = None if by_class is None else by_class - scores.first_logsumexp[:, None]
        continuation = None if continuation is None else continuation - scores.first_logsumexp
    mass = torch.cat([shared[rows].exp().sum(1) for rows in row_blocks(*shared.shape, shared.device)])
    if by_class is not None:
        mass += by_class.exp().sum(1)
    return mass if continuation is None else mass + continuation.exp()
