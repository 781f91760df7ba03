"""Where teacher scores come from when the teacher is a server (`ServedTeacher`): the k best log-probabilities of every row, and the
response's own tokens', in place of hidden rows.

    vllm serve TEACHER --max-logprobs 64 --port 8000

vLLM and SGLang can be asked. llama.cpp's server cannot: it has log-probabilities of tokens that it generates and none of those that
it reads. Token ids travel, never text.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from simct.client import RetryingClient
from simct.secrets import read_key
from simct.teachers.formats import Scores
from simct.teachers.local import ServedRows
from simct.teachers.server import KEY, ServedModel


class ServedTeacher:
    """Scores responses through a server. A client of one model, for `SimCTTrainer` and for `topk_simct_loss`.

    A request that fails in a way that may pass (no connection, a broken or late answer, 429, 500, 502, 503, 504) is sent again, at
    longer and longer intervals, for `patience` seconds: a run outlives a server's restart. After any of them but 429 the server's
    model is looked at again. What cannot be scored is an error; nothing is left out.

    Args:
        base_url: "http://HOST:PORT", without "/v1".
        tokenizer: the teacher's, on this machine; the server's must be the same.
        top_k: log-probabilities of each row; at most what the server allows (vLLM: `--max-logprobs`, 20 unless it is given).
        model_name: one of those that the server lists; needed if there are several.
        server: "vllm", "sglang", or "auto": what the server says that it is.
        generation_config: of the teacher, if it is there: says what ends its turns.
        api_key: default: `SIMCT_TEACHER_API_KEY` in the environment.
        timeout: seconds that one answer may take in all.
        patience: seconds for which a request is sent again, from its first failure on.
        wait: seconds to wait for a server that is still starting, when it is first met.
        concurrency: most requests under way at a time.
        readers: processes that read long answers, JSON of megabytes each: by the machine's cores if not given; 0: none.
        vocab_size: ids that the model has, if its head is padded to more than the tokenizer has; what is among the best of a row
            must be one of them.
    Raises:
        ImportError: httpx is not installed. ConnectionError, TimeoutError, RuntimeError: no server answers. PermissionError: it
            wants another key.
        ValueError: it cannot be used here: no such model, too small a limit for `top_k`, another tokenizer or a smaller vocabulary,
            a kind of server that has no log-probabilities of prompts.
    """

    sharded = False

    def __init__(
        self,
        base_url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_k: int = 64,
        model_name: str | None = None,
        server: str = "auto",
        generation_config: GenerationConfig | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: float = 600.0,
        wait: float = 0.0,
        concurrency: int = 16,
        vocab_size: int | None = None,
        readers: int | None = None,
    ) -> None:
        self.tokenizer, self.generation_config = tokenizer, generation_config
        self.top_k, self.concurrency, self.device = top_k, concurrency, torch.device("cpu")
        if readers is not None and readers < 0:
            raise ValueError(f"readers is {readers}: expected 0 (none) or more processes")
        key = read_key("api_key", api_key, KEY)
        client = RetryingClient(base_url, api_key=key, timeout=timeout, patience=patience, connections=concurrency)
        self.served = ServedModel(
            client,
            tokenizer,
            top_k=top_k,
            name=model_name,
            server=server,
            wait=wait,
            vocab_size=vocab_size,
            readers=readers,
        )

    @property
    def context_length(self) -> float:
        """As a local model's: prompt and response without its last token, which a server reads as well and wants room behind it."""
        return self.served.max_model_len - 2

    def place(self, device: torch.device, *, packing: str = "auto", offload: bool = False) -> None:
        """Scores come to this device. There is nothing to pack or to offload."""
        self.device = device

    @contextmanager
    def on_device(self) -> Iterator[None]:
        yield

    def rows(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> ServedRows:
        """What `topk_simct_loss` reads of the teacher, [N_t, k], response by response. `prompts`, `responses`: teacher token ids.

        Raises ValueError for an id that is not in the vocabulary, an empty prompt, a response too long for the server's context, or
        a server that has become another; PermissionError, ConnectionError, TimeoutError or RuntimeError if one of them could not be
        scored.
        """
        scores = self.score(prompts, responses, self.top_k)
        return ServedRows(
            self._packed([s.topk_ids for s in scores], (0, self.top_k), np.int64),
            self._packed([s.topk_logprobs for s in scores], (0, self.top_k), np.float32),
            self._packed([s.token_logprobs for s in scores], (0,), np.float32),
        )

    def token_logprobs(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities [N_t] of the responses' own tokens. Errors as `rows`."""
        return self._packed([s.token_logprobs for s in self.score(prompts, responses, 0)], (0,), np.float32)

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], k: int) -> list[Scores]:
        """One for each response, in order, with its k best. Errors as `rows`."""
        self._check_ids(prompts, responses)
        asked = [i for i, response in enumerate(responses) if len(response)]
        nothing = Scores(np.empty((0, k), np.int32), np.empty((0, k), np.float32), np.empty(0, np.float32))
        scores = dict.fromkeys(range(len(responses)), nothing)
        if asked:
            pairs = [(prompts[i], responses[i]) for i in asked]
            scores.update(zip(asked, self.served.scores(pairs, k), strict=True))
            self.served.check_same()
        return list(scores.values())

    def _packed(self, parts: list[np.ndarray], empty: tuple[int, ...], dtype) -> Tensor:
        packed = np.concatenate([np.empty(empty, dtype), *parts], axis=0)
        return torch.from_numpy(packed.astype(dtype, copy=False)).to(self.device)

    def _check_ids(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not len(prompt):
                raise ValueError(
                    f"prompts[{i}] is empty: expected at least one token id, which predicts the response's first"
                )
            wrong = [token for ids in (prompt, response) for token in ids if not 0 <= token < self.served.size]
            if wrong:
                raise ValueError(f"sample {i} has token id {wrong[0]}: expected ids from 0 to {self.served.size - 1}")
            if len(prompt) + len(response) > self.served.max_model_len - 1:
                raise ValueError(
                    f"sample {i} has {len(prompt)} prompt and {len(response)} response tokens: expected at most "
                    f"{self.served.max_model_len - 1} together, the context of {self.served.base_url} less one"
                )


def check_objective(args) -> None:
    """ValueError for options of a `SimCTConfig` that need more of a teacher than a server says."""
    if args.objective not in ("auto", "simct"):
        raise ValueError(
            f"objective is {args.objective!r}, which reads the teacher's hidden states: expected 'simct' with a served teacher"
        )
    if args.score == "mean_logit":
        raise ValueError(
            "score is 'mean_logit', and a served teacher has no logits: expected 'mean_logprob' or 'sum_logprob'"
        )


def check_server_options(given: dict[str, Any]) -> None:
    """ValueError for keyword arguments that `ServedTeacher` does not have, and for those that come from elsewhere."""
    if "api_key" in given:
        raise ValueError(f"teacher_server_kwargs names api_key, which checkpoints would keep: expected it in {KEY}")
    elsewhere = ("base_url", "tokenizer", "top_k", "generation_config", "api_key")
    own = [name for name in inspect.signature(ServedTeacher).parameters if name not in elsewhere]
    for name in given:
        if name not in own:
            raise ValueError(f"teacher_server_kwargs names {name!r}: expected some of {', '.join(own)}")
