"""The student's samples from a vLLM server in another process (`ServedVLLM`), on GPUs of its own if it likes.

The server is vLLM's own (seen working: 0.32):

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --generation-config vllm --max-model-len 4096 --port 8000

Development mode opens the routes that change weights; it is for machines that only the training can reach.

Weights travel through files: written by the training into `sync_folder`, read by the server's `reload_weights`. So both must see
one file system under one path; a folder in memory (/dev/shm) is the fast choice on one machine.
"""

import os
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.vllm_engine import check_vocabulary_size
from simct.rollouts.vllm_requests import check_prompts, request_seed, request_settings, to_response
from simct.rollouts.weights import checkpoint_weights, write_weights

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
        sync_dtype: floating-point dtype of those files; default: the student's. Half the bytes if the student has float32 master
            weights and the server computes in bfloat16.
        api_key: the server's `--api-key`; default: `VLLM_API_KEY` in the environment.
        timeout: seconds that one answer may take.
        wait: seconds to wait for a server that is still starting.
        concurrency: most requests under way at a time.
    Raises:
        ImportError: requests is not installed.
        ConnectionError: nothing answers at `base_url`. TimeoutError: it does not answer in time.
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
        sync_dtype: torch.dtype | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        wait: float = 0.0,
        concurrency: int = 64,
    ) -> None:
        if not base_url.startswith(("http://", "https://")) or base_url.rstrip("/").endswith("/v1"):
            raise ValueError(f"base_url is {base_url!r}: expected 'http://HOST:PORT', without '/v1'")
        if concurrency < 1 or timeout <= 0:
            raise ValueError(
                f"concurrency is {concurrency} and timeout {timeout}: expected at least 1, and more than 0 seconds"
            )
        try:
            import requests
        except ImportError as error:
            raise ImportError("requests is not installed: pip install 'simct[vllm]', or take another engine") from error
        self._requests, self._session = requests, requests.Session()
        # A request that has not reached the server is sent again; one that has may still be running there.
        again = requests.adapters.Retry(connect=3, read=0, redirect=0, status=0, other=0, backoff_factor=0.3)
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=concurrency, max_retries=again)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        key = api_key if api_key is not None else os.environ.get("VLLM_API_KEY")
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"
        self.base_url, self.timeout, self.concurrency = base_url.rstrip("/"), timeout, concurrency
        self.sync_folder, self.sync_dtype, self._updates = sync_folder, sync_dtype, 0
        self.vocab_size = vocab_size
        self._await_start(wait)
        self.model_name, self.max_model_len = self._served_model(model_name, max_model_len)
        self._check_settings()
        if vocab_size is not None:
            self._check_vocabulary(vocab_size)

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        """ValueError for a prompt that is empty, has an id outside the vocabulary, or is too long for its budget. ConnectionError,
        TimeoutError or RuntimeError if the server fails a request."""
        check_prompts(prompts, sampling, self.max_model_len, self.vocab_size)
        if not prompts:
            return []
        with ThreadPoolExecutor(min(self.concurrency, len(prompts))) as pool:
            futures = [
                pool.submit(self._complete, prompt, sampling, request_seed(seed, i)) for i, prompt in enumerate(prompts)
            ]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # no waiting for what nobody will read
                raise

    def update_weights(self, model: PreTrainedModel) -> None:
        """Writes the current weights of `model` and has the server load them, between two requests. Every training process must
        call it; one of them writes.

        Raises ValueError for a model of another vocabulary or without plain weights (`checkpoint_weights`); ConnectionError,
        TimeoutError or RuntimeError if the server does not load them: its weights are then in no known state.
        """
        check_vocabulary_size(model, self.vocab_size)
        weights = checkpoint_weights(model)
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
            self._post("/pause", params={"mode": "wait"})
            try:
                self._post(
                    "/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                )
                if not self._post("/reset_prefix_cache").get("success", True):
                    raise RuntimeError(f"{self.base_url} did not empty its prefix cache, which old weights have filled")
            except BaseException:
                with suppress(
                    ConnectionError, TimeoutError, RuntimeError
                ):  # a failed load can end a server: say the first error
                    self._post("/resume")
                raise
            self._post("/resume")

    def _sync_root(self) -> Path | None:
        if self.sync_folder is None:
            return None
        root = Path(self.sync_folder).absolute()
        root.mkdir(parents=True, exist_ok=True)
        return root

    def _complete(self, prompt: list[int], sampling: Sampling, seed: int) -> Response:
        answer = self._post(
            "/v1/completions",
            json={
                "model": self.model_name,
                "prompt": list(prompt),
                **request_settings(sampling, seed),
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        )
        (choice,) = answer["choices"]
        if choice.get("token_ids") is None:
            raise RuntimeError(
                f"{self.base_url} returned text without token ids: expected a vLLM that knows return_token_ids"
            )
        logprobs = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else None
        return to_response(choice["token_ids"], choice["finish_reason"], choice.get("stop_reason"), logprobs, sampling)

    # What the server is, asked once.

    def _await_start(self, wait: float) -> None:
        deadline = time.monotonic() + wait
        while True:
            try:
                self._call("GET", "/health", timeout=min(self.timeout, 10))
                return
            except (ConnectionError, TimeoutError, RuntimeError):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(min(2.0, max(0.1, wait / 10)))

    def _served_model(self, name: str | None, needed: int | None) -> tuple[str, int]:
        listed = {entry["id"]: entry for entry in self._call("GET", "/v1/models").json()["data"]}
        if name is not None and name not in listed:
            raise ValueError(f"model_name is {name!r}: expected one that {self.base_url} serves, {', '.join(listed)}")
        name = name if name is not None else next(iter(listed))
        length = listed[name].get("max_model_len")
        if length is None:
            raise ValueError(f"{self.base_url} does not say its max_model_len: expected a vLLM server")
        if needed is not None and needed > length:
            raise ValueError(
                f"max_model_len of {self.base_url} is {length}, prompt and response may need {needed} tokens: "
                f"expected a server started with --max-model-len {needed} or more"
            )
        return name, length

    def _check_settings(self) -> None:
        try:
            answer = self._call("GET", "/server_info", params={"config_format": "json"})
        except RuntimeError as error:
            raise ValueError(
                f"{self.base_url} does not open vLLM's development routes ({error}): expected a server started with {COMMAND}"
            ) from error
        config = answer.json()["vllm_config"]["model_config"]
        wanted = {
            "logprobs_mode": ("raw_logprobs", "--logprobs-mode"),
            "generation_config": ("vllm", "--generation-config"),
        }
        for setting, (value, option) in wanted.items():
            if config.get(setting, value) != value:
                raise ValueError(
                    f"{setting} of {self.base_url} is {config[setting]!r}: expected a server started with {option} {value}"
                )
        if self._call("GET", "/is_paused").json().get("is_paused"):
            warnings.warn(
                f"{self.base_url} was left paused, by a run killed while it changed weights; going on", stacklevel=3
            )
            self._post("/resume")

    def _check_vocabulary(self, size: int) -> None:
        """The server tells no size, but refuses ids that its model has not."""
        ask = {"model": self.model_name, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        for token, known in ((size - 1, True), (size, False)):
            answer = self._call("POST", "/v1/completions", json={**ask, "prompt": [token]}, fine=(200, 400))
            if (answer.status_code == 200) != known:
                raise ValueError(
                    f"{self.base_url} serves a model that {'has not' if known else 'has'} token id {token}, the student has {size} "
                    f"token ids: expected a server of the same model ({answer.text[:200] if known else self.model_name})"
                )

    # The wire.

    def _post(self, route: str, **arguments) -> dict[str, Any]:
        answer = self._call("POST", route, **arguments)
        return answer.json() if answer.content else {}

    def _call(
        self, method: str, route: str, *, fine: tuple[int, ...] = (200,), timeout: float | None = None, **arguments
    ):
        errors, seconds = self._requests.exceptions, timeout if timeout is not None else self.timeout
        url = self.base_url + route
        try:
            answer = self._session.request(method, url, timeout=(min(seconds, 10), seconds), **arguments)
        except errors.Timeout as error:
            raise TimeoutError(
                f"{url} did not answer within {seconds:g} seconds: is the server overloaded or stuck?"
            ) from error
        except errors.RequestException as error:
            raise ConnectionError(f"no vLLM server answers at {url} ({error}): start one with {COMMAND}") from error
        if answer.status_code not in fine:
            raise RuntimeError(f"{method} {url} answered {answer.status_code}: {_message(answer)}")
        return answer


def _message(answer) -> str:
    """vLLM's own words, on one line: what a server says is data, and goes into logs."""
    try:
        text = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return " ".join(str(text).split())[:500]
