"""The student's samples from a vLLM server in another process (`ServedVLLM`), on GPUs of its own if it likes.

The server is vLLM's own (seen working: 0.32):

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --generation-config vllm --max-model-len 4096 --port 8000

Development mode opens the routes that change weights; it is for machines that only the training can reach.

How weights travel is what the server was started with:

    --weight-transfer-config '{"backend": "nccl"}'         from GPU to GPU (`vllm_nccl`): the fast way, where both sides have one
    --weight-transfer-config '{"backend": "simct-files"}'  through files, where this package is installed beside the server
    neither                                                through files, by vLLM's `reload_weights`

Files are written by the training into `sync_folder`: both must see one file system under one path; a folder in memory (/dev/shm) is
the fast choice on one machine. After every change a few tokens' log-probabilities are compared with the student's.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from simct.client import Refused, Request, RetryingClient, words
from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.vllm_engine import check_vocabulary_size
from simct.rollouts.vllm_nccl import NCCLTransfer
from simct.rollouts.vllm_plugin import BACKEND
from simct.rollouts.vllm_requests import check_prompts, request_seed, request_settings, to_response
from simct.rollouts.vllm_weights import GAP, check_weights
from simct.rollouts.weights import checkpoint_weights, write_weights
from simct.secrets import read_key

KEY = "VLLM_API_KEY"
CONNECTING = 3.0  # seconds for which a request that did not reach the server is sent again
TOKEN = 2048  # bytes of JSON that one token of an answer takes at most, on average
STARTING = 10.0  # seconds that a server may take to say that it is there
COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --generation-config vllm"


class ServedVLLM:
    """Client of one server. Each prompt is a request of its own with a seed of its own, token ids both ways.

    The same seed gives the same samples as far as the server computes the same logits whatever else is in its batch: in float32 it
    practically does; in bfloat16 set `VLLM_BATCH_INVARIANT=1` for the server, where its GPU offers that.

    Args:
        base_url: "http://HOST:PORT", without "/v1".
        model_name: one of the names under which the server serves; default: the first.
        vocab_size: of the student; the server is asked whether its model has as many token ids.
        max_model_len: tokens that the longest prompt and its response may need together; the server must allow as many.
        sync_folder: where weights are written for the server to read; made if need be. Default: a temporary folder, for a server
            on this machine.
        sync_dtype: floating-point dtype of the weights that travel; default: what the server computes in (of float32 master weights
            then half the bytes).
        max_logprob_gap: nats that log-probabilities of a few tokens may be from the student's, on average, after a change of
            weights (a quarter of it where both sides compute in float32).
        api_key: the server's `--api-key`; default: `VLLM_API_KEY` in the environment.
        timeout: seconds that one answer may take in all.
        wait: seconds to wait for a server that is still starting.
        concurrency: most requests under way at a time.
        seeded: each request has a seed. That keeps the server from its fastest sampler (FlashInfer's, on a GPU); False lets it have
            that, and gives other samples each time.
    Raises:
        ImportError: httpx is not installed.
        ConnectionError: nothing answers at `base_url`. TimeoutError: it does not answer in time. PermissionError: it wants another
            key.
        ValueError: what answers is no vLLM server that can be used here: another model, too short a context, settings under which
            samples or log-probabilities would not be the student's own.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model_name: str | None = None,
        vocab_size: int | None = None,
        max_model_len: int | None = None,
        sync_folder: str | os.PathLike | None = None,
        sync_dtype: torch.dtype | str | None = None,
        max_logprob_gap: float = GAP,
        api_key: str | None = None,
        timeout: float = 600.0,
        wait: float = 0.0,
        concurrency: int = 64,
        seeded: bool = True,
    ) -> None:
        # A request that has not reached the server is sent again; one that has may still be running there.
        self._client = RetryingClient(
            base_url,
            api_key=read_key("api_key", api_key, KEY),
            timeout=timeout,
            patience=CONNECTING,
            connections=concurrency,
            again=False,
        )
        self.base_url, self.timeout = self._client.base_url, timeout
        self.sync_folder, self.max_logprob_gap, self._updates = sync_folder, max_logprob_gap, 0
        self.vocab_size, self.seeded = vocab_size, seeded
        self._ask([Request("GET", "/health", empty=True)], again=True, patience=wait, timeout=min(timeout, STARTING))
        self.model_name, self.max_model_len = self._served_model(model_name, max_model_len)
        self.dtype, self.transfer = self._check_settings()
        name = sync_dtype if sync_dtype is not None else self.dtype
        self.sync_dtype = name if isinstance(name, torch.dtype) else getattr(torch, name.removeprefix("torch."), None)
        if sync_dtype is not None and not isinstance(self.sync_dtype, torch.dtype):
            raise ValueError(
                f"sync_dtype is {sync_dtype!r}: expected the name of a floating-point dtype, such as bfloat16"
            )
        self._nccl: NCCLTransfer | None = None
        if vocab_size is not None:
            self._check_vocabulary(vocab_size)

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        """ValueError for a prompt that is empty, has an id outside the vocabulary, or is too long for its budget. ConnectionError,
        TimeoutError or RuntimeError if the server fails a request."""
        check_prompts(prompts, sampling, self.max_model_len, self.vocab_size)
        if not prompts:
            return []
        return self._ask([self._request(p, sampling, request_seed(seed, i)) for i, p in enumerate(prompts)])

    def update_weights(self, model: PreTrainedModel) -> None:
        """Has the server load the current weights of `model`, between two requests. Every training process must call it; one of
        them writes or sends.

        Raises ValueError for a model of another vocabulary or without plain weights (`checkpoint_weights`); ConnectionError,
        TimeoutError or RuntimeError if the server does not load them, or does not sample from them: its weights are then in no
        known state.
        """
        check_vocabulary_size(model, self.vocab_size)
        if self.transfer == "nccl":
            if self._nccl is None:
                self._nccl = NCCLTransfer(self, self.sync_dtype)
            self._nccl.send(model)
        else:
            self._through_files(checkpoint_weights(model))
        check_weights(self.generate, model, self.dtype, self.max_logprob_gap, self.base_url)

    def _through_files(self, weights) -> None:
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if not several:
            self._write_and_load(weights)
            return
        failure: list[Exception | None] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                self._write_and_load(weights)
            except Exception as error:  # told to all: the others would wait for this process until their own timeout
                failure[0] = error
                for _ in weights:  # what they are still gathering
                    pass
        else:
            for _ in weights:  # shards are gathered by all
                pass
        torch.distributed.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]

    def _write_and_load(self, weights) -> None:
        self._updates += 1
        with tempfile.TemporaryDirectory(prefix="simct-vllm-", dir=self._sync_root()) as temporary:
            folder = Path(temporary) / f"update-{self._updates}"
            os.chmod(temporary, 0o755)  # the server may run as another user
            write_weights(weights, folder, dtype=self.sync_dtype)
            with self.paused():
                self._load(str(folder))

    def _load(self, folder: str) -> None:
        if self.transfer is None:
            self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            return
        if self._updates == 1:
            self.post("/init_weight_transfer_engine", {"init_info": {}})
        self.post("/start_weight_update")
        self.post("/update_weights", {"update_info": {"folder": folder}})
        self.post("/finish_weight_update")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Between two requests; afterwards nothing of the old weights is left in the server's caches."""
        self.post("/pause?mode=wait")
        try:
            yield
            if not (self.post("/reset_prefix_cache") or {}).get("success", True):
                raise RuntimeError(f"{self.base_url} did not empty its prefix cache, which old weights have filled")
        except BaseException:
            with suppress(OSError, RuntimeError):  # a failed load can end a server: say the first error
                self.post("/resume")
            raise
        self.post("/resume")

    def _sync_root(self) -> Path | None:
        if self.sync_folder is None:
            return None
        root = Path(self.sync_folder).absolute()
        root.mkdir(parents=True, exist_ok=True)
        return root

    def _request(self, prompt: list[int], sampling: Sampling, seed: int) -> Request:
        body = {
            "model": self.model_name,
            "prompt": list(prompt),
            **request_settings(sampling, seed if self.seeded else None),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

        def read(answer: Any) -> Response:
            try:
                (choice,) = answer["choices"]
                ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
                logprobs = logprobs["token_logprobs"] if logprobs else None
                reasons = choice["finish_reason"], choice.get("stop_reason")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RuntimeError(f"the answer of {self.base_url} is no response ({words(repr(error))})") from None
            if ids is None:
                raise RuntimeError(
                    f"{self.base_url} returned text without token ids: expected a vLLM that knows return_token_ids"
                )
            return to_response(ids, *reasons, logprobs, sampling, self.vocab_size)

        return Request("POST", "/v1/completions", body, read, (1 << 20) + TOKEN * sampling.max_new_tokens)

    def world_size(self) -> int:
        """The server's workers."""
        return self.get("/get_world_size")["world_size"]

    # What the server is, asked once.

    def _served_model(self, name: str | None, needed: int | None) -> tuple[str, int]:
        try:
            listed = {str(entry["id"]): entry for entry in self.get("/v1/models")["data"]}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.base_url} does not list its models ({words(repr(error))}): expected a vLLM server"
            ) from None
        if not listed or name is not None and name not in listed:
            known = words(", ".join(listed)) or "none"
            raise ValueError(f"model_name is {name!r}: expected one that {self.base_url} serves, {known}")
        name = name if name is not None else next(iter(listed))
        length = listed[name].get("max_model_len")
        if type(length) is not int:
            raise ValueError(f"{self.base_url} does not say its max_model_len: expected a vLLM server")
        if needed is not None and needed > length:
            raise ValueError(
                f"max_model_len of {self.base_url} is {length}, prompt and response may need {needed} tokens: "
                f"expected a server started with --max-model-len {needed} or more"
            )
        return name, length

    def _check_settings(self) -> tuple[str, str | None]:
        """What it computes in, and the backend of its `--weight-transfer-config`."""
        try:
            found = self.get("/server_info?config_format=json")["vllm_config"]
            config, transfer = found["model_config"], (found.get("weight_transfer_config") or {}).get("backend")
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.base_url} does not open vLLM's development routes ({words(error)}): "
                f"expected a server started with {COMMAND}"
            ) from None
        wanted = {
            "logprobs_mode": ("raw_logprobs", "--logprobs-mode"),
            "generation_config": ("vllm", "--generation-config"),
        }
        for setting, (value, option) in wanted.items():
            if config.get(setting, value) != value:
                raise ValueError(
                    f"{setting} of {self.base_url} is {words(repr(config[setting]))}: "
                    f"expected a server started with {option} {value}"
                )
        if transfer not in (None, "nccl", BACKEND):
            raise ValueError(
                f"{self.base_url} takes weights by {words(repr(transfer))}: expected a server started with "
                f"--weight-transfer-config of the backend nccl or {BACKEND}, or without one"
            )
        if (self.get("/is_paused") or {}).get("is_paused"):
            warnings.warn(
                f"{self.base_url} was left paused, by a run killed while it changed weights; going on", stacklevel=3
            )
            self.post("/resume")
        return str(config.get("dtype", "")), transfer

    def _check_vocabulary(self, size: int) -> None:
        """The server tells no size, but refuses ids that its model has not."""
        ask = {"model": self.model_name, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        for token, known in ((size - 1, True), (size, False)):
            refusal = None
            try:
                self._client.call(Request("POST", "/v1/completions", {**ask, "prompt": [token]}))
            except Refused as error:
                if error.status != 400:
                    raise RuntimeError(str(error)) from None
                refusal = error.words
            if (refusal is None) != known:
                raise ValueError(
                    f"{self.base_url} serves a model that {'has not' if known else 'has'} token id {token}, the student has {size} "
                    f"token ids: expected a server of the same model ({refusal or self.model_name})"
                )

    # The wire.

    def get(self, route: str) -> Any:
        """What the server answers. RuntimeError for an error, ConnectionError or TimeoutError without an answer."""
        return self._ask([Request("GET", route, empty=True)])[0]

    def post(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """As `get`; sent once."""
        return self._ask([Request("POST", route, body, empty=True)])[0]

    def _ask(self, requests: list[Request], **options) -> list[Any]:
        try:
            return self._client.call_all(requests, **options)
        except Refused as error:
            raise RuntimeError(str(error)) from None
        except PermissionError as error:
            raise PermissionError(f"{error}: expected a key that the server takes, in {KEY} or as api_key") from None
        except ConnectionError as error:
            url = self.base_url + requests[0].route
            raise ConnectionError(f"no vLLM server answers at {url} ({error}): start one with {COMMAND}") from None
