"""Where the student's samples come from: token ids in, token ids out.

An engine knows a model and its sampling settings; it knows no tokenizer, no teacher and no loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import GenerationConfig, PreTrainedModel

IN_PROCESS = ("auto", "continuous", "static")  # with the student's own weights
ENGINES = (*IN_PROCESS, "vllm", "vllm-server")


def check_logprobs(logprobs: Sequence[float]) -> None:
    """FloatingPointError unless the log-probabilities of a response's tokens are finite numbers."""
    for position, value in enumerate(logprobs):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"token {position} of a sampled response has the log-probability {value}: the model's logits are no finite numbers "
                "(weights that have diverged or are damaged, or a precision that does not hold its activations)"
            )


@dataclass(frozen=True)
class Response:
    """One sampled response.

    `token_ids` ends with the end-of-turn token exactly when `finish_reason` is "stop"; "stop_string": it ends with the token that
    completed a stop string; "length": its budget ran out. `logprobs`: log-probability of each token as the engine saw it (of the
    model's own distribution: temperature 1, no truncation), if the engine says so.

    FloatingPointError for log-probabilities that are no finite numbers: such logits give tokens, but no sample of the model.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "stop_string", "length"]
    logprobs: list[float] | None = None

    def __post_init__(self) -> None:
        check_logprobs(self.logprobs or ())


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `end_ids`: every token id that ends a response; `pad_id`: fills padded batches, never returned.
    `stop_strings`: texts that end a response, once its tokens spell one of them."""

    end_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.end_ids:
            raise ValueError("end_ids is empty: expected at least one token id that ends a response")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a number in (0, 1]")
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop or not is_text(stop):
                raise ValueError(f"stop_strings holds {stop!r}: expected texts of at least one character")

    def generation_config(self) -> GenerationConfig:
        greedy = self.temperature == 0
        return GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else self.temperature,
            top_p=None if greedy else self.top_p,
            top_k=None if greedy else 0,  # transformers' own default would cut to the 50 best
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.end_ids),
            pad_token_id=self.pad_id,
        )

    def response(self, token_ids: Sequence[int]) -> Response:
        """Cuts what a model generated after its first end-of-turn token."""
        for position, token in enumerate(token_ids):
            if token in self.end_ids:
                return Response(list(token_ids[: position + 1]), "stop")
        return Response(list(token_ids), "length")


def is_text(string: str) -> bool:
    """Whether it can be written as UTF-8: a byte of a command line that is no character cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in string)


def cut_at_stop_string(response: Response, pieces: Sequence[bytes | None], stop_strings: Sequence[str]) -> Response:
    """The response up to the token that completes a stop string, if one does. `pieces`: the bytes of each of its tokens."""
    stops = [stop.encode() for stop in stop_strings]
    text = b""
    for position, piece in enumerate(pieces):
        new = piece or b""
        # A stop string that ends in this token began at most its own length before it.
        if any(stop in text[max(0, len(text) - len(stop) + 1) :] + new for stop in stops):
            logprobs = None if response.logprobs is None else response.logprobs[: position + 1]
            return Response(response.token_ids[: position + 1], "stop_string", logprobs)
        text += new
    return response


class RolloutEngine(Protocol):
    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        """One response to each prompt (token ids, at least one each), in order. The same arguments and weights give the same
        responses on one machine."""

    def update_weights(self, model: PreTrainedModel) -> None:
        """Called before `generate` when the student's weights have changed: from now on sample from those of `model`. Nothing to
        do for an engine that holds the student itself."""
