"""What both vLLM engines ask for and what they make of the answer: one request a prompt, token ids in, token ids out."""

import hashlib
import math
from collections.abc import Sequence
from operator import index
from typing import Any

from simct.client import words
from simct.rollouts.protocol import Response, Sampling

ROUNDING = 1e-3  # nats above 0 that a log-probability may come out at


def request_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` of a batch, in [0, 2^31). Hashed: `seed + index` would give a batch the samples of the one before,
    moved by one prompt."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def request_settings(sampling: Sampling, seed: int | None) -> dict[str, Any]:
    """vLLM's sampling parameters, the same names in its Python and its HTTP interface. All that shapes the distribution is said, so
    that no generation_config.json fills in (a top_k, a repetition penalty).

    `seed`: the request's own; on a GPU vLLM's fast sampler then stands aside for one that sorts the whole vocabulary. None: the
    engine's generator draws."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if sampling.temperature == 0 else sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        # Exactly end_ids end a response; without ignore_eos those of the model's configuration would too.
        "ignore_eos": True,
        "stop_token_ids": list(sampling.end_ids),
        "stop": list(sampling.stop_strings),
        # Stop strings are looked for in the text of all tokens, special ones too.
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
    }


def check_prompts(
    prompts: Sequence[Sequence[int]], sampling: Sampling, max_model_len: int, vocab_size: int | None
) -> None:
    """ValueError for a prompt that vLLM would refuse, or whose response it would cut short without a word."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty: expected at least one token id")
        needed = len(prompt) + sampling.max_new_tokens
        if needed > max_model_len:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, with max_new_tokens {sampling.max_new_tokens} that is {needed}: expected "
                f"at most vLLM's max_model_len, {max_model_len} (in this process that of the longest prompt of the data; "
                f"vllm_kwargs={{'max_model_len': {needed}}} or a server's --max-model-len makes room)"
            )
        if min(prompt) < 0 or (vocab_size is not None and max(prompt) >= vocab_size):
            wrong = next(t for t in prompt if t < 0 or t >= (vocab_size or t + 1))
            raise ValueError(f"prompts[{i}] has token id {wrong}: expected ids from 0 to {(vocab_size or 0) - 1}")


def to_response(
    token_ids: Sequence[int],
    finish_reason: str | None,
    stop_reason: int | str | None,
    logprobs: Sequence[float] | None,
    sampling: Sampling,
    vocab_size: int | None = None,
) -> Response:
    """RuntimeError for an answer that is not a response: an aborted request, one whose parts contradict each other, ids that are
    none of `vocab_size`, log-probabilities above 0; FloatingPointError for log-probabilities that are no finite numbers (which JSON
    may write as null)."""
    try:
        token_ids = [index(token) for token in token_ids]
        logprobs = None if logprobs is None else [math.nan if value is None else float(value) for value in logprobs]
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"vLLM's response cannot be read: {words(error)}") from None
    wrong = [token for token in token_ids if token < 0 or (vocab_size is not None and token >= vocab_size)]
    if wrong:
        known = "of 0 or more" if vocab_size is None else f"from 0 to {vocab_size - 1}"
        raise RuntimeError(f"vLLM's response has token id {wrong[0]}: expected ids {known}")
    if len(token_ids) > sampling.max_new_tokens:
        raise RuntimeError(f"vLLM's response has {len(token_ids)} tokens: expected at most {sampling.max_new_tokens}")
    wrong = [value for value in logprobs or () if value > ROUNDING]
    if wrong:
        raise RuntimeError(f"vLLM's response has {wrong[0]} as a log-probability: expected 0 or less")
    reason = "stop_string" if finish_reason == "stop" and isinstance(stop_reason, str) else finish_reason
    ended = bool(token_ids) and token_ids[-1] in sampling.end_ids
    if reason not in ("stop", "stop_string", "length") or (reason == "stop") != ended:
        reasons = f"finish_reason {finish_reason!r}, stop_reason {stop_reason!r}"
        raise RuntimeError(
            f"vLLM ended a response with {words(reasons)} and the last tokens {token_ids[-3:]}: "
            f"expected one of {list(sampling.end_ids)} last exactly for 'stop', or a stop string, or 'length'"
        )
    if logprobs is not None and len(logprobs) != len(token_ids):
        raise RuntimeError(
            f"vLLM gave {len(logprobs)} log-probabilities to {len(token_ids)} tokens: expected one to each"
        )
    return Response(token_ids, reason, logprobs)
