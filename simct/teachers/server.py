"""A model behind a server (`ServedModel`): what it is, whether its tokenizer is the local one, and the scores of one response."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from simct.client import Refused, Request, RetryingClient, words
from simct.pairing.tokens import token_bytes
from simct.teachers.formats import FORMATS, Scores
from simct.teachers.readers import LONG, Readers, Unread, default_count

KEY = "SIMCT_TEACHER_API_KEY"

# Encoded and scored when a server is met: what tokenizer it has, and which weights.
PROBE = (
    "The quick brown fox jumps over the lazy dog. In 2026, about 12,345 people lived there.\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2  # of a circle\n\nnaïve café, 中文, Русский 👍\n"
)
SPREAD, SPREAD_BEST = (
    64,
    16,
)  # tokens whose texts are compared as well, and how many of the likeliest in the place of each
SAME_MODEL = 0.1  # nats: what precision and batching change of a token's log-probability is less, on average


class ServedModel:
    """The model that a server is asked for, met once and checked.

    Args:
        client: of the server.
        tokenizer: the model's, on this machine.
        top_k: log-probabilities of each row that will be asked for.
        name: one of those that the server lists; needed if there are several.
        server: "vllm", "sglang" or "auto".
        wait: seconds to wait for a server that is still starting.
        vocab_size: ids that the model has, where its head is padded; else as many as its tokenizer has tokens.
        readers: processes that read long answers; 0: none; None: by the machine's cores.
    Attributes:
        name: the model's name there.
        max_model_len: its context in tokens; infinite if the server does not say.
        size: token ids of the local tokenizer.
        fingerprint: float32 [n], its log-probabilities of a fixed text.
    Raises:
        ConnectionError, TimeoutError, RuntimeError: no server answers. PermissionError: it wants another key.
        ValueError: it cannot be used, see `ServedTeacher`.
    """

    def __init__(
        self,
        client: RetryingClient,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_k: int,
        name: str | None = None,
        server: str = "auto",
        wait: float = 0.0,
        vocab_size: int | None = None,
        readers: int | None = None,
    ) -> None:
        self._readers = Readers(default_count() if readers is None else readers) if readers != 0 else None
        self._pieces = token_bytes(tokenizer)
        self.size = len(self._pieces)
        if not 1 <= top_k <= self.size:
            raise ValueError(
                f"top_k (of a run: teacher_top_k) is {top_k}: expected 1 to {self.size}, the tokens of the teacher's tokenizer"
            )
        if server not in ("auto", *FORMATS):
            raise ValueError(f"server is {server!r}: expected one of 'auto', {', '.join(map(repr, FORMATS))}")
        if vocab_size is not None and vocab_size < self.size:
            raise ValueError(
                f"vocab_size is {vocab_size}: expected at least {self.size}, the tokens of the teacher's tokenizer"
            )
        self._client, self._tokenizer, self._top_k = client, tokenizer, top_k
        self._vocabulary = self.size if vocab_size is None else vocab_size
        self.base_url = client.base_url
        entry = self._listed(name, wait)
        self.name = str(entry["id"])
        self.max_model_len = self._context(entry)
        self.format = FORMATS[self._kind(entry, server)]()
        self._check_spelling(wait)
        self._check_encoding(wait)
        self.fingerprint = self._probe(wait)
        self._met = client.interruptions

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], k: int) -> list[Scores]:
        """Of pairs of a prompt and a response. Raises ValueError for what the server refuses; PermissionError, ConnectionError,
        TimeoutError or RuntimeError if it does not answer, or answers what can be no score of these tokens."""
        return self._ask([self._request(*pair, k) for pair in pairs])

    def check_same(self) -> None:
        """After a failed request: the server may have been started anew, with something else. ValueError if it was."""
        met = self._client.interruptions
        if met == self._met:
            return
        self._listed(self.name, self._client.patience)
        if not same_model(self._probe(self._client.patience), self.fingerprint):
            raise ValueError(
                f"{self.base_url} came back with other weights under the name {self.name!r}: expected the teacher that the run "
                "began with"
            )
        self._met = met

    # ---- Requests ----

    def _request(self, prompt: Sequence[int], response: Sequence[int], k: int, texts: dict | None = None) -> Request:
        """`texts`: filled with the server's own text of each token in its answer."""
        prompt, response = ([int(token) for token in ids] for ids in (prompt, response))

        def read(answer: Any) -> Scores:
            if texts is not None:  # of a tokenizer that is not known yet
                texts.update(self.format.texts(answer))
                return self.format.scores(answer, prompt, response, k, self.size)
            return self.format.scores(answer, prompt, response, k, self.size, self._vocabulary)

        def apart(content: bytes) -> Scores | None:
            if self._readers is None or texts is not None or len(content) < LONG:
                return None
            asked = dict(prompt=prompt, response=response, k=k, at_least=self.size, vocabulary=self._vocabulary)
            try:
                return self._readers.read(content, server=self.format.name.lower(), **asked)
            except Unread:
                return None

        body = self.format.request(self.name, prompt, response, k, texts is not None)
        return Request("POST", self.format.route, body, read, self.format.limit(prompt, response, k), apart=apart)

    def _ask(self, requests: Sequence[Request], patience: float | None = None) -> list[Scores]:
        try:
            return self._client.call_all(requests, patience=patience)
        except Refused as error:
            raise ValueError(self._explained(error)) from None
        except PermissionError as error:
            raise self._no_key(error) from None

    def _explained(self, error: Refused) -> str:
        limit = re.search(r"logprobs of (\d+),? which is greater than max allowed: (\d+)", error.words)
        if limit:
            k, allowed = limit.groups()
            return (
                f"top_k (of a run: teacher_top_k) is {k}, but {self.base_url} allows {allowed} log-probabilities a token: "
                f"expected at most {allowed}, or a server started with --max-logprobs {k}"
            )
        if re.search(r"context length|max_tokens must be at least 1|longer than|too long", error.words):
            tokens = len(error.body[self.format.ids])
            return (
                f"prompt and response have {tokens} tokens, too many for {self.base_url}: expected fewer, or a server with a "
                f"longer context ({error.words})"
            )
        unknown = re.search(r"[Tt]oken id (-?\d+) is out of vocabulary", error.words)
        if unknown:
            return (
                f"{self.base_url} serves a model without token id {unknown[1]}, the tokenizer {self._tokenizer.name_or_path!r} has "
                f"{self.size}: expected the teacher's own tokenizer"
            )
        if error.status == 404:
            return f"{self.base_url} has no model {self.name!r}, or no route {self.format.route} ({error.words})"
        return str(error)

    def _no_key(self, error: PermissionError) -> PermissionError:
        return PermissionError(f"{error}: expected a key that the server takes, in {KEY} or as api_key")

    # ---- What the server is ----

    def _listed(self, name: str | None, patience: float) -> dict[str, Any]:
        """What the server says of the model."""
        try:
            listed = self._client.call(Request("GET", "/v1/models"), patience=patience)["data"]
            names = [str(entry["id"]) for entry in listed]
        except (Refused, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.base_url} does not list its models ({words(error)}): expected a vLLM or SGLang server"
            ) from None
        except PermissionError as error:
            raise self._no_key(error) from None
        except ConnectionError as error:
            command = f"vllm serve TEACHER --max-logprobs {self._top_k}"
            raise ConnectionError(f"{error}: expected a server, such as `{command}`") from None
        if name is None and len(names) == 1:
            return listed[0]
        if name not in names:
            known = words(", ".join(map(repr, names))) or "none"
            raise ValueError(f"model_name is {name!r}: expected one that {self.base_url} serves, {known}")
        return listed[names.index(name)]

    def _context(self, entry: dict[str, Any]) -> float:
        length = entry.get("max_model_len")
        if length is not None and (type(length) is not int or length < 3):
            raise ValueError(
                f"max_model_len of {self.base_url} is {words(length)}: expected a number of tokens, 3 or more"
            )
        return float("inf") if length is None else length

    def _kind(self, entry: dict[str, Any], server: str) -> str:
        owner = str(entry.get("owned_by") or "").lower()
        if owner in ("llamacpp", "llama.cpp"):
            raise ValueError(
                f"{self.base_url} is a llama.cpp server, which has no log-probabilities of the tokens that it reads: expected a "
                "vLLM or SGLang server, or the teacher's GGUF file as a local teacher"
            )
        if server != "auto":
            return server
        if owner not in FORMATS:
            raise ValueError(
                f"{self.base_url} does not say what kind of server it is (owned_by: {words(owner)!r}): expected server='vllm' "
                "or 'sglang'"
            )
        return owner

    def _probe(self, patience: float) -> np.ndarray:
        """Log-probabilities of a fixed text."""
        ids = list(self._tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        ids = ids[: int(min(self.max_model_len - 1, len(ids)))]  # a server with a short context
        (scores,) = self._ask([self._request(ids[:1], ids[1:], 0)], patience)
        return scores.token_logprobs

    def _check_spelling(self, patience: float) -> None:
        """Tokens from all over the vocabulary, its last one among them, must have the local tokenizer's texts."""
        ordinary = [i for i, piece in enumerate(self._pieces) if piece]
        count = int(min(SPREAD, self.max_model_len - 1))
        ids = [ordinary[round(i * (len(ordinary) - 1) / (count - 1))] for i in range(count)]
        texts: dict[int, str] = {}
        best = min(self._top_k, SPREAD_BEST)  # `top_k` of them, to see that so many may be asked for, in one place
        self._ask([self._request(ids[:1], ids[1:2], self._top_k, texts)], patience)
        self._ask([self._request(ids[:1], ids[1:], best, texts)], patience)
        if not any(texts.get(token) for token in ids[1:]):
            raise ValueError(f"{self.base_url} does not say its tokens' texts: its tokenizer cannot be compared")
        for token, theirs in texts.items():
            if (
                token >= self.size or not self._pieces[token]
            ):  # filling of the head; a special token, which may have no text
                continue
            ours = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
            # Bytes that are no character alone have no text to compare, and white space depends on what stands beside it.
            comparable = "\N{REPLACEMENT CHARACTER}" not in ours + theirs and theirs
            if comparable and "".join(ours.split()) != "".join(theirs.split()):
                raise self._other_tokenizer(f"token {token} is {theirs!r} there and {ours!r} here")

    def _check_encoding(self, patience: float) -> None:
        """vLLM encodes text on request: the same text must become the same tokens."""
        if self.format.name != "vLLM":
            return
        body = {"model": self.name, "prompt": PROBE, "add_special_tokens": False}
        try:
            theirs = list(self._client.call(Request("POST", "/tokenize", body), patience=patience)["tokens"])
        except (Refused, PermissionError, KeyError, TypeError):  # not open to everyone: the tokens' texts were compared
            return
        ours = list(self._tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        if theirs != ours:
            first = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), 0)
            some = slice(first, first + 4)
            raise self._other_tokenizer(
                f"from its token {first} on, a text is {theirs[some]} there and {ours[some]} here"
            )

    def _other_tokenizer(self, difference: str) -> ValueError:
        return ValueError(
            f"{self.base_url} serves {self.name!r} with another tokenizer than {self._tokenizer.name_or_path!r}: "
            f"{words(difference)}; expected the teacher's own"
        )


def same_model(fingerprint: np.ndarray, other: np.ndarray) -> bool:
    """Whether two rows of log-probabilities of one text are one model's, up to precision."""
    return fingerprint.shape == other.shape and bool(np.abs(fingerprint - other).mean() < SAME_MODEL)
