"""The student's samples from a vLLM inside the training process (`ColocatedVLLM`). `vllm_server` has the one outside.

Both go through vLLM's own interfaces. TRL's `trl.generation` classes do not serve here: they move weights to a server by NCCL
alone, which needs CUDA, and know no seed for each prompt, where the same weights and seed must give the same samples.
"""

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.vllm_requests import check_prompts, request_seed, request_settings, to_response
from simct.rollouts.weights import checkpoint_weights, write_model


class ColocatedVLLM:
    """vLLM in this process, beside the student: a second copy of its weights, and a KV cache.

    With several training processes each has an engine of its own (no tensor parallelism). A process makes one engine.

    Args:
        model: folder or hub name of the student, with its tokenizer.
        max_model_len: the longest prompt plus its response, in tokens; default: what the model's configuration allows.
        gpu_memory_utilization: share of the device's memory that vLLM takes, weights and KV cache together. Without a GPU:
            `VLLM_CPU_KVCACHE_SPACE` in the environment says the size of the cache in GiB (1 if it is not set).
        dtype: of weights and computation; "auto" is vLLM's choice (bfloat16 for a float32 checkpoint, on a GPU).
        max_num_seqs: most responses that are generated at a time; default: vLLM's.
        enforce_eager: no compilation and no CUDA graphs: starts sooner, samples slower. Default: without a GPU.
        engine_arguments: any other argument of `vllm.LLM`.
    Raises:
        ImportError: vllm is not installed.
        ValueError: vLLM cannot serve the model with these arguments; its own message says why.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        dtype: str | torch.dtype = "auto",
        max_num_seqs: int | None = None,
        enforce_eager: bool | None = None,
        trust_remote_code: bool = False,
        **engine_arguments,
    ) -> None:
        if not 0 < gpu_memory_utilization < 1:
            raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}: expected a share between 0 and 1")
        if max_model_len is not None and max_model_len < 2:
            raise ValueError(f"max_model_len is {max_model_len}: expected at least 2, a prompt and a response")
        _environment()
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                f"vLLM is not installed ({error}): pip install 'simct[vllm]', or take another engine"
            ) from error
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            engine_arguments.setdefault("distributed_executor_backend", "external_launcher")
        optional = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
        with process_state():
            try:
                self.llm = LLM(
                    model=os.fspath(model),
                    dtype=dtype,
                    gpu_memory_utilization=gpu_memory_utilization,
                    enforce_eager=not torch.cuda.is_available() if enforce_eager is None else enforce_eager,
                    trust_remote_code=trust_remote_code,
                    generation_config="vllm",  # nothing from the model's generation_config.json
                    logprobs_mode="raw_logprobs",  # of the model's own distribution, before temperature and top_p
                    **{name: value for name, value in optional.items() if value is not None},
                    **engine_arguments,
                )
            except (ValueError, RuntimeError, OSError) as error:
                raise ValueError(f"vLLM cannot serve {os.fspath(model)!r}: {error}") from error
        config = self.llm.llm_engine.model_config
        self.max_model_len, self.vocab_size = config.max_model_len, config.get_vocab_size()

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        """ValueError for a prompt that is empty, has an id outside the vocabulary, or is too long for its budget."""
        from vllm import SamplingParams

        check_prompts(prompts, sampling, self.max_model_len, self.vocab_size)
        if not prompts:
            return []
        # A prompt found in the cache is computed in other pieces than one that is not: the last bits, and so a sample, could depend
        # on what was asked before. The cache still serves the repeated prompts of one call.
        self.llm.reset_prefix_cache()
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        text = bool(sampling.stop_strings)  # nothing else needs it
        settings = [
            SamplingParams(**request_settings(sampling, request_seed(seed, i)), detokenize=text)
            for i in range(len(prompts))
        ]
        with process_state():
            outputs = self.llm.generate(requests, settings, use_tqdm=False)
        responses = []
        for output in outputs:
            (sample,) = output.outputs
            logprobs = [at[token].logprob for token, at in zip(sample.token_ids, sample.logprobs, strict=True)]
            responses.append(
                to_response(sample.token_ids, sample.finish_reason, sample.stop_reason, logprobs, sampling)
            )
        return responses

    def update_weights(self, model: PreTrainedModel) -> None:
        """Loads the current weights of `model`. With FSDP2 every process must call it.

        Raises ValueError for a model of another vocabulary or without plain weights (`checkpoint_weights`), RuntimeError if vLLM
        does not take them: its weights are then in no known state.
        """
        check_vocabulary_size(model, self.vocab_size)
        weights = checkpoint_weights(model)
        try:
            with torch.no_grad():
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except Exception as error:  # each of its loaders fails in its own way
            raise RuntimeError(f"vLLM did not take the weights of {type(model).__name__}: {error}") from error
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Gives the memory back. The engine cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()


def colocated_from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike | None = None, **options
) -> ColocatedVLLM:
    """An engine with the weights that the live `model` has now (PEFT: merged), for a student that no folder holds.

    They go through `folder` (new or empty, one a process), and stay there in `student`; without one, through a temporary folder
    that is gone when this returns. `options`: those of `ColocatedVLLM`.
    """
    if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"folder {os.fspath(folder)!r} is not empty: expected a new one")
    with tempfile.TemporaryDirectory(prefix="simct-vllm-") as temporary:
        place = Path(folder if folder is not None else temporary) / "student"
        write_model(model, tokenizer, place)
        return ColocatedVLLM(place, **options)


def check_vocabulary_size(model: PreTrainedModel, served: int | None) -> None:
    """ValueError if the student has not as many token ids as vLLM serves (None: unknown)."""
    size = model.config.get_text_config(decoder=True).vocab_size
    if served is not None and size != served:
        raise ValueError(f"vLLM serves a model of {served} token ids, the student has {size}: expected the same model")


def _environment() -> None:
    # Weights are handed over as tensors, which another process would not see.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the threads are also those of the training


@contextmanager
def process_state() -> Iterator[None]:
    """vLLM seeds and uses the process's random generators and, on a CPU, takes `torch.set_num_threads` away: both come back."""
    threads, python, array = torch.set_num_threads, random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        torch.set_num_threads = threads
        random.setstate(python)
        numpy.random.set_state(array)
