"""How a server is asked for the log-probabilities of given tokens, and what its answer says. One class a kind of server.

Seen working: vLLM 0.32. SGLang's format is that of its documentation and sources (0.5); no such server was at hand to try it with.
llama.cpp's server computes log-probabilities of what it generates, not of what it reads: it cannot be asked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NEVER = -9999.0  # JSON has no infinity: so vLLM writes the log-probability of what cannot be


@dataclass(frozen=True)
class Scores:
    """What a server says of one response of n tokens."""

    topk_ids: (
        np.ndarray
    )  # int32 [n, k], the most probable tokens of each row, best first; -1 fills up a smaller vocabulary
    topk_logprobs: np.ndarray  # float32 [n, k], -inf with -1
    token_logprobs: np.ndarray  # float32 [n], of the response's own tokens


class VLLM:
    """`/v1/completions` with `prompt_logprobs`. Entry i of the answer is the distribution that predicts prompt token i, entry 0 is
    null; each entry maps token ids to log-probabilities and ranks: the k best, and the prompt's own token where it is not among
    them. Every entry has its text, asked for or not."""

    name, route = "vLLM", "/v1/completions"

    def request(
        self, model: str, prompt: Sequence[int], response: Sequence[int], k: int, texts: bool = False
    ) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": [*prompt, *response],
            "prompt_logprobs": k,
            "max_tokens": 1,  # none is refused
            "temperature": 1.0,
            "add_special_tokens": False,
        }

    def scores(self, answer: Any, prompt: Sequence[int], response: Sequence[int], k: int, at_least: int) -> Scores:
        rows = _found(answer, self.name, "choices", 0, "prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(prompt) + len(response):
            raise _malformed(self.name, f"prompt_logprobs of {_size(rows)} for {len(prompt) + len(response)} tokens")
        table = Table(self.name, response, k, at_least)
        for row, entries in enumerate(rows[len(prompt) :]):
            own = str(response[row])
            if not isinstance(entries, dict) or own not in entries:
                raise _malformed(self.name, f"no log-probability of token {own} at position {len(prompt) + row}")
            table.token_logprobs[row] = _number(self.name, entries[own].get("logprob"))
            # Equal ranks: the own token's counts all that are as probable, so it comes behind them.
            best = sorted(entries.items(), key=lambda item: (item[1]["rank"], item[0] == own))[:k]
            table.fill(row, [int(i) for i, _ in best], [entry["logprob"] for _, entry in best])
        return table.scores()

    def texts(self, answer: Any) -> dict[int, str]:
        """The server's own text of every token in an answer."""
        rows = _found(answer, self.name, "choices", 0, "prompt_logprobs")
        entries = (item for row in rows if row for item in row.items())
        return {int(i): entry["decoded_token"] for i, entry in entries if entry.get("decoded_token") is not None}


class SGLang:
    """`/generate` with `return_logprob`. With `logprob_start_len` at the last prompt token, the answer has an entry for it, without
    a value, and one for each response token: [log-probability, token id, text or null]."""

    name, route = "SGLang", "/generate"

    def request(
        self, model: str, prompt: Sequence[int], response: Sequence[int], k: int, texts: bool = False
    ) -> dict[str, Any]:
        return {
            "model": model,
            "input_ids": [*prompt, *response],
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
            "top_logprobs_num": k,
            "return_text_in_logprobs": texts,
        }

    def scores(self, answer: Any, prompt: Sequence[int], response: Sequence[int], k: int, at_least: int) -> Scores:
        own = _found(answer, self.name, "meta_info", "input_token_logprobs")[1:]
        top = _found(answer, self.name, "meta_info", "input_top_logprobs")[1:] if k else [[]] * len(own)
        if len(own) != len(response) or len(top) != len(response):
            raise _malformed(self.name, f"{len(own)} and {len(top)} log-probabilities for {len(response)} tokens")
        table = Table(self.name, response, k, at_least)
        for row, (entry, best) in enumerate(zip(own, top, strict=True)):
            if entry[1] != response[row]:
                raise _malformed(self.name, f"token {entry[1]} where token {response[row]} was asked for")
            table.token_logprobs[row] = _number(self.name, entry[0])
            table.fill(row, [found[1] for found in best or []], [found[0] for found in best or []])
        return table.scores()

    def texts(self, answer: Any) -> dict[int, str]:
        found = [entry for row in answer["meta_info"].get("input_top_logprobs") or [] for entry in row or []]
        found += answer["meta_info"]["input_token_logprobs"]
        return {entry[1]: entry[2] for entry in found if entry[2] is not None}


FORMATS: dict[str, type[VLLM] | type[SGLang]] = {"vllm": VLLM, "sglang": SGLang}


class Table:
    """The rows of one response, filled one by one and checked."""

    def __init__(self, server: str, response: Sequence[int], k: int, at_least: int) -> None:
        self.server, self.k, self.at_least = server, k, min(k, at_least)
        self.topk_ids = np.full((len(response), k), -1, np.int32)
        self.topk_logprobs = np.full((len(response), k), -np.inf, np.float32)
        self.token_logprobs = np.full(len(response), np.nan, np.float32)

    def fill(self, row: int, ids: list[int], logprobs: list[float]) -> None:
        if len(ids) < self.at_least:
            raise _malformed(self.server, f"{len(ids)} log-probabilities in a row of which {self.k} were asked for")
        self.topk_ids[row, : len(ids)] = ids
        self.topk_logprobs[row, : len(ids)] = [_number(self.server, value) for value in logprobs]

    def scores(self) -> Scores:
        total = np.exp(self.topk_logprobs.astype(np.float64)).sum(axis=1)
        worst = max(total.max(initial=0.0), math.exp(self.token_logprobs.max(initial=-np.inf)))
        if not worst < 1.01:
            raise _malformed(
                self.server,
                f"values that add up to a probability of {worst:.4g}: raw logits? (--logprobs-mode raw_logprobs)",
            )
        return Scores(self.topk_ids, self.topk_logprobs, self.token_logprobs)


def _number(server: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise _malformed(server, f"{value!r} as a log-probability")
    return -math.inf if value <= NEVER else float(value)


def _found(answer: Any, server: str, *path: str | int) -> Any:
    for part in path:
        try:
            answer = answer[part]
        except (KeyError, IndexError, TypeError):
            answer = None
        if answer is None:
            raise _malformed(server, f"no {path[-1]}")
    return answer


def _size(rows: Any) -> str:
    return f"{len(rows)} entries" if isinstance(rows, list) else type(rows).__name__


def _malformed(server: str, what: str) -> RuntimeError:
    return RuntimeError(f"the answer of the {server} server has {what}")
