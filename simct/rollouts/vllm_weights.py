"""Weights that a vLLM was given: whether it samples from them, and what its own loaders leave undone.

Every way into a vLLM has left something behind once (`reload_weights` on a CPU: the packed copy of a tied head), and none says so.
A few greedy tokens after each change do: their log-probabilities must be the student's.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from simct.rollouts.protocol import Response, Sampling

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 8
GAP = 0.2  # nats: what 16-bit arithmetic changes of a token's log-probability is far less, on average

Generate = Callable[..., list[Response]]


def check_weights(generate: Generate, model: PreTrainedModel, dtype: str, gap: float, where: str) -> None:
    """RuntimeError unless a vLLM's log-probabilities of a few tokens are the student's.

    With sharded parameters every process must call it. `generate`: the engine's; `dtype`: what vLLM computes in, by name; `gap`:
    nats that they may be apart on average (a quarter of it where both sides compute in float32); `where`: for the message.
    """
    size = model.config.get_text_config(decoder=True).vocab_size
    count = PROMPTS * PROMPT_TOKENS
    ids = [(2 * i + 1) * size // (2 * count) for i in range(count)]  # from all over the vocabulary
    prompts = [ids[i::PROMPTS] for i in range(PROMPTS)]
    sampling = Sampling(end_ids=(size - 1,), pad_id=0, max_new_tokens=NEW_TOKENS, temperature=0.0)
    responses = generate(prompts, sampling, seed=0)
    parameter = next(model.parameters())
    # accelerate's autocast is a forward of the object's own.
    exact = dtype.endswith("float32") and parameter.dtype == torch.float32 and "forward" not in vars(model)
    allowed = gap / 4 if exact else gap
    theirs = [response.logprobs for response in responses]
    if any(values is None for values in theirs):
        raise RuntimeError(f"{where} gives no log-probabilities of its samples: its weights cannot be compared")
    own = _own_logprobs(model, prompts, [response.token_ids for response in responses], dtype)
    apart = (torch.tensor([v for values in theirs for v in values]) - own).abs().mean().item()
    if not apart <= allowed:
        raise RuntimeError(
            f"{where} took the student's weights, but its log-probabilities of {len(own)} tokens are {apart:.3g} from the "
            f"student's on average: expected at most {allowed:g} (max_logprob_gap); it samples from other weights, or computes "
            "this model otherwise than transformers does"
        )


@torch.no_grad()
def _own_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], dtype: str
) -> torch.Tensor:
    """float32 [all response tokens]. Rows filled up behind their ends, to one shape on every process: nothing before sees them."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(prompts), PROMPT_TOKENS + NEW_TOKENS, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    training = model.training
    model.eval()
    # Flash attention takes 16 bits only. Once training has begun, the model's own forward sees to that.
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    low = getattr(torch, dtype.removeprefix("torch."), None) if flash else None
    cast = low is not None and low.itemsize == 2 and next(model.parameters()).dtype == torch.float32
    try:
        with torch.autocast(device.type, low) if cast else nullcontext():
            logits = model(input_ids=ids.to(device), use_cache=False).logits
    finally:
        model.train(training)
    values = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None].to(device)).squeeze(2).cpu()
    rows = (row[len(p) - 1 :][: len(r)] for row, p, r in zip(values, prompts, responses, strict=True))
    return torch.cat(list(rows))


def pack_heads(model: nn.Module) -> None:
    """For vLLM's own model without a GPU, after its weights have changed. vLLM packs the weights of linear layers there, and packs
    those of a layer that was given new ones again; but a head that shares the embedding's weights is given none itself."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
