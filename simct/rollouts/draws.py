"""Tokens drawn from a model's distribution by one uniform number each."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

BLOCK = 512  # tokens
NUCLEUS = 512  # tokens that the nucleus is looked for among, first


def uniform_numbers(seed: int, prompts: int, tokens: int) -> Tensor:
    """float64 [prompts, tokens] in [0, 1): a stream of numbers for each prompt, whatever it is batched with."""
    return torch.rand(prompts, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """int64 [B]: a token of each row of `logits` [B, V], where its cumulative probability passes `uniform` [B] (float64).

    Temperature first, then the nucleus: the fewest most probable tokens that hold `top_p`. Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    probabilities = (logits if temperature == 1 else logits / temperature).softmax(dim=1)
    if top_p == 1:
        return _first_beyond(probabilities, uniform)
    # The nucleus is nearly always among a few: sorting a whole vocabulary takes ten times as long as finding them.
    values, order = probabilities.topk(min(NUCLEUS, logits.shape[1]), dim=1)
    if (values.sum(dim=1) < top_p).any():
        values, order = probabilities.sort(dim=1, descending=True)
    reached = values.double().cumsum(dim=1)
    enough = torch.searchsorted(reached, torch.full_like(reached[:, :1], top_p)).clamp_(max=values.shape[1] - 1)
    token = torch.searchsorted(reached, uniform[:, None] * reached.gather(1, enough), right=True)
    return order.gather(1, token.clamp_(max=values.shape[1] - 1)).squeeze(1)


def _first_beyond(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability is above that share of the row's sum.

    In two steps, block and token, with float64 sums of few terms: one float32 sum over a vocabulary leaves tokens of probability
    below 1e-7 out, a float64 one is slow for its memory.
    """
    rows, vocabulary = probabilities.shape
    blocks = vocabulary // BLOCK
    whole = probabilities[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).sum(dim=2)
    sums = torch.cat([whole, probabilities[:, blocks * BLOCK :].sum(dim=1, keepdim=True)], dim=1).double()
    reached = sums.cumsum(dim=1)
    target = uniform[:, None] * reached[:, -1:]
    # right=True: never a block, nor a token, of probability 0. Where a logit is NaN nothing is passed: hence the clamps.
    block = torch.searchsorted(reached, target, right=True).clamp_(max=blocks)
    share = ((target - reached.gather(1, block)) / sums.gather(1, block) + 1).clamp_(0, 1 - 2**-53)
    columns = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probabilities.gather(1, columns.clamp(max=vocabulary - 1)).double().masked_fill_(columns >= vocabulary, 0)
    reached = inside.cumsum(dim=1)
    token = torch.searchsorted(reached, share * reached[:, -1:], right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + token).clamp_(max=vocabulary - 1).squeeze(1)


class UniformDraws(LogitsProcessor):
    """Makes a greedy `generate` sample: the token that is drawn gets the highest score.

    `generate`'s own sampling draws an exponential number for each token of the vocabulary: with 262,144 of them that takes a
    quarter of a small model's step on a CPU. It draws for a whole batch from the process's one generator, so that a prompt's sample
    would change with its neighbours; and `custom_generate`, the other door, wants a loop over private methods.

    `logprobs` are those of the drawn tokens at temperature 1, without truncation, one [B] for each step.
    """

    def __init__(self, uniform: Tensor, temperature: float, top_p: float) -> None:
        """`uniform` [B, T], for at most T new tokens."""
        self.uniform, self.temperature, self.top_p = uniform, temperature, top_p
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniform[:, len(self.logprobs)].to(scores.device)
        token = draw(scores, uniform, self.temperature, self.top_p)[:, None]
        self.logprobs.append((scores.gather(1, token) - scores.logsumexp(dim=1, keepdim=True)).squeeze(1))
        return scores.scatter_(1, token, torch.inf)
