"""How a server is asked for the log-probabilities of given tokens, and what its answer says. One class a kind of server.

Seen working: vLLM 0.32. SGLang's format is that of its documentation and sources (0.5); no such server was at hand to try it with.
llama.cpp's server computes log-probabilities of what it generates, not of what it reads: it cannot be asked.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from simct.client import words

NEVER = -9999.0  # JSON has no infinity: so vLLM writes the log-probability of what cannot be
SLACK = 1e-3  # nats: what rounding may do to a log-probability
ENTRY = 512  # bytes of JSON that one log-probability takes at most, on average, with its token's text


@dataclass(frozen=True)
class Scores:
    """What a server says of one response of n tokens."""

    # int32 [n, k], the most probable tokens of each row, best first; -1 fills up a smaller vocabulary
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray  # float32 [n, k], -inf with -1
    token_logprobs: np.ndarray  # float32 [n], of the response's own tokens


class Format:
    """What the kinds of servers have in common. `ids`: where a request has its token ids."""

    name: str
    route: str
    ids: str

    def scores(
        self,
        answer: Any,
        prompt: Sequence[int],
        response: Sequence[int],
        k: int,
        at_least: int,
        vocabulary: int | None = None,
    ) -> Scores:
        """`at_least`: tokens that the model surely has; `vocabulary`: the ids that are known to be all of its own.

        RuntimeError for an answer that is not the log-probabilities that were asked for, or that cannot be any."""
        table = Table(self.name, response, k, at_least, vocabulary)
        with _readable(self.name):
            self._fill(table, answer, prompt, response)
        return table.scores()

    def texts(self, answer: Any) -> dict[int, str]:
        """The server's own text of every token in an answer."""
        with _readable(self.name):
            return {int(token): str(text) for token, text in self._texts(answer) if text is not None}

    def limit(self, prompt: Sequence[int], response: Sequence[int], k: int) -> int:
        """Bytes of the longest answer."""
        return (1 << 20) + (len(prompt) + len(response)) * (k + 1) * ENTRY

    def request(
        self, model: str, prompt: Sequence[int], response: Sequence[int], k: int, texts: bool = False
    ) -> dict[str, Any]:
        """The body of a request."""
        raise NotImplementedError

    def _fill(self, table: "Table", answer: Any, prompt: Sequence[int], response: Sequence[int]) -> None:
        raise NotImplementedError

    def _texts(self, answer: Any) -> Iterator[tuple[Any, Any]]:
        raise NotImplementedError


class VLLM(Format):
    """`/v1/completions` with `prompt_logprobs`. Entry i of the answer is the distribution that predicts prompt token i, entry 0 is
    null; each entry maps token ids to log-probabilities and ranks: the k best, and the prompt's own token where it is not among
    them. Every entry has its text, asked for or not."""

    name, route, ids = "vLLM", "/v1/completions", "prompt"

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

    def _fill(self, table: "Table", answer: Any, prompt: Sequence[int], response: Sequence[int]) -> None:
        rows = _found(answer, self.name, "choices", 0, "prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(prompt) + len(response):
            raise _malformed(self.name, f"prompt_logprobs of {_size(rows)} for {len(prompt) + len(response)} tokens")
        for row, entries in enumerate(rows[len(prompt) :]):
            own = str(response[row])
            if not isinstance(entries, dict) or own not in entries:
                raise _malformed(self.name, f"no log-probability of token {own} at position {len(prompt) + row}")
            # Equal ranks: the own token's counts all that are as probable, so it comes behind them.
            best = sorted(entries.items(), key=lambda item: (item[1]["rank"], item[0] == own))[: table.k]
            table.fill(row, entries[own].get("logprob"), [int(i) for i, _ in best], [e["logprob"] for _, e in best])
            ranks = [entry["rank"] for _, entry in best]
            if ranks != list(range(1, len(best) + 1)):
                raise _malformed(
                    self.name, f"ranks {ranks[:4]} ... at position {len(prompt) + row}: expected 1, 2, 3 ..."
                )

    def _texts(self, answer: Any) -> Iterator[tuple[Any, Any]]:
        rows = _found(answer, self.name, "choices", 0, "prompt_logprobs")
        return ((i, entry.get("decoded_token")) for row in rows if row for i, entry in row.items())


class SGLang(Format):
    """`/generate` with `return_logprob`. With `logprob_start_len` at the last prompt token, the answer has an entry for it, without
    a value, and one for each response token: [log-probability, token id, text or null]."""

    name, route, ids = "SGLang", "/generate", "input_ids"

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

    def _fill(self, table: "Table", answer: Any, prompt: Sequence[int], response: Sequence[int]) -> None:
        own = _found(answer, self.name, "meta_info", "input_token_logprobs")[1:]
        top = _found(answer, self.name, "meta_info", "input_top_logprobs")[1:] if table.k else [[]] * len(own)
        if len(own) != len(response) or len(top) != len(response):
            raise _malformed(self.name, f"{len(own)} and {len(top)} log-probabilities for {len(response)} tokens")
        for row, (entry, best) in enumerate(zip(own, top, strict=True)):
            if entry[1] != response[row]:
                raise _malformed(self.name, f"token {entry[1]} where token {response[row]} was asked for")
            table.fill(row, entry[0], [found[1] for found in best or []], [found[0] for found in best or []])

    def _texts(self, answer: Any) -> Iterator[tuple[Any, Any]]:
        found = [entry for row in answer["meta_info"].get("input_top_logprobs") or [] for entry in row or []]
        return ((entry[1], entry[2]) for entry in found + answer["meta_info"]["input_token_logprobs"])


FORMATS: dict[str, type[Format]] = {"vllm": VLLM, "sglang": SGLang}


class Table:
    """The rows of one response, filled one by one and checked."""

    def __init__(
        self, server: str, response: Sequence[int], k: int, at_least: int, vocabulary: int | None = None
    ) -> None:
        self.server, self.k, self.at_least = server, k, min(k, at_least)
        self.response, self.tokens = np.asarray(response, np.int64), max(at_least, vocabulary or 0)
        self.vocabulary = np.iinfo(np.int32).max if vocabulary is None else vocabulary
        self.topk_ids = np.full((len(response), k), -1, np.int64)
        self.topk_logprobs = np.full((len(response), k), -np.inf)
        self.token_logprobs = np.full(len(response), np.nan)

    def fill(self, row: int, own: Any, ids: list[int], logprobs: list[float]) -> None:
        if len(ids) < self.at_least:
            raise _malformed(self.server, f"{len(ids)} log-probabilities in a row of which {self.k} were asked for")
        if any(type(token) is not int for token in ids):
            raise _malformed(self.server, f"token ids {ids[:4]} ...: expected whole numbers")
        for value in (own, *logprobs):
            if type(value) is not float and type(value) is not int:
                raise _malformed(self.server, f"{value!r} as a log-probability")
        self.token_logprobs[row] = own
        self.topk_ids[row, : len(ids)] = ids
        self.topk_logprobs[row, : len(ids)] = logprobs

    def scores(self) -> Scores:
        ids, best, own = self.topk_ids, self.topk_logprobs, self.token_logprobs
        wrong = (ids >= self.vocabulary) | (ids < 0) & (best > -np.inf)
        if wrong.any():
            raise _malformed(
                self.server,
                f"token id {ids[wrong][0]}: expected ids from 0 to {self.vocabulary - 1} (vocab_size, if its model has more)",
            )
        for values in own, best:
            wrong = values[~(values <= SLACK)]  # NaN, too
            if wrong.size:
                raw = "" if np.isnan(wrong[0]) else ": raw logits? (--logprobs-mode raw_logprobs)"
                raise _malformed(self.server, f"{wrong[0]:.4g} as a log-probability{raw}")
            np.copyto(values, -np.inf, where=values <= NEVER)
            np.minimum(values, 0, out=values)
        total = np.exp(best).sum(axis=1).max(initial=0.0)
        if not total < 1.01:
            raise _malformed(self.server, f"values that add up to a probability of {total:.4g}")
        if self.k and len(self.response):
            self._check_best()
        return Scores(ids.astype(np.int32), best.astype(np.float32), own.astype(np.float32))

    def _check_best(self) -> None:
        ids, best, own = self.topk_ids, self.topk_logprobs, self.token_logprobs
        ordered = np.sort(ids, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise _malformed(self.server, "a token id twice among the best of a row")
        if (best[:, 1:] > best[:, :-1] + SLACK).any():
            raise _malformed(self.server, "log-probabilities that do not fall with their rank")
        least = -math.log(self.tokens)
        if best[:, 0].min() < least - SLACK:
            raise _malformed(
                self.server,
                f"{best[:, 0].min():.4g} as the best log-probability of a row: the best of {self.tokens} tokens has "
                f"{least:.4g} or more",
            )
        among = ids == self.response[:, None]
        same = np.where(among, best, -np.inf).max(axis=1)
        if not np.where(among.any(axis=1), np.isclose(own, same, rtol=0, atol=SLACK), own <= best[:, -1] + SLACK).all():
            raise _malformed(self.server, "another log-probability of a token than its place among the best says")


@contextmanager
def _readable(server: str) -> Iterator[None]:
    """RuntimeError for an answer of another shape."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _malformed(server, f"what cannot be read ({type(error).__name__}: {error})") from None


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
    return RuntimeError(f"the answer of the {server} server has {words(what)}")
