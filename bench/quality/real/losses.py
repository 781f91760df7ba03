"""Cross entropies over a large vocabulary: whole, in chunks of rows; and estimated, for the models' first training."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class ChunkedCrossEntropy(torch.autograd.Function):
    """-sum log p(targets), without a matrix of rows x vocabulary: hidden [N, H], weight [V, H] (their products in its precision,
    sums in float32), targets int64 [N]."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = (hidden[rows] @ weight.T).float()
            chosen = targets[rows, None]
            log_sums = logits.logsumexp(1, keepdim=True)
            total += (log_sums - logits.gather(1, chosen)).sum()
            probabilities = logits.sub_(log_sums).exp_()
            slopes = probabilities.scatter_add_(1, chosen, probabilities.new_full((len(chosen), 1), -1.0))
            slopes = slopes.to(weight.dtype)
            hidden_grad[rows] = slopes @ weight
            weight_grad += slopes.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * slope.to(hidden_grad.dtype), (weight_grad * slope).to(ctx.dtype), None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int = 512) -> Tensor:
    """-sum log p(targets) over the whole vocabulary."""
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_rows)


def sampled_cross_entropy(hidden: Tensor, weight: Tensor, used: Tensor, drawn: Tensor, targets: Tensor) -> Tensor:
    """The mean of -log p(targets), where the vocabulary's other tokens are estimated by some of them.

    Args:
        used: int64 [U], ids that targets are among; drawn: int64 [D], of the other ids, drawn uniformly: all together stand for all
            others. targets: int64 [N], indices into `used`.
    """
    each = math.log((len(weight) - len(used)) / len(drawn))
    logits = torch.cat([hidden @ weight[used].T, hidden @ weight[drawn].T + each], dim=1).float()
    return torch.nn.functional.cross_entropy(logits, targets)
