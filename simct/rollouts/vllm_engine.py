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
from simct.rollouts.vllm_weights import GAP, NEW_TOKENS, PROMPT_TOKENS, check_weights, pack_heads
from simct.rollouts.weights import checkpoint_weights, write_model

SPARE = 2 << 30  # bytes of a device that neither models nor caches take: contexts, workspaces, fragments


class ColocatedVLLM:
    """vLLM in this process, beside the student: a second copy of its weights, and a KV cache.

    With several training processes each has an engine of its own, or `tensor_parallel_size` of them share one. A process makes one
    engine.

    Args:
        model: folder or hub name of the student, with its tokenizer.
        max_model_len: the longest prompt plus its response, in tokens; default: what the model's configuration allows.
        gpu_memory_utilization: share of the device's memory that vLLM takes, weights and KV cache together. Without a GPU:
            `VLLM_CPU_KVCACHE_SPACE` in the environment says the size of the cache in GiB (1 if it is not set).
        dtype: of weights and computation; "auto" is vLLM's choice (bfloat16 for a float32 checkpoint, on a GPU).
        max_num_seqs: most responses that are generated at a time; default: vLLM's.
        enforce_eager: no compilation and no CUDA graphs: starts sooner, samples slower. Default: without a GPU.
        sleep: give the device's memory back between calls of `generate`, weights and cache, so that the training has it. The
            weights come back from the student: `update_weights` must have been called before. Without a GPU it only pauses.
        tensor_parallel_size: neighbouring training processes that hold one engine together. All of them must call `generate` and
            `update_weights` together.
        seeded: each prompt has a seed of its own, so that its sample does not depend on its neighbours. On a GPU that keeps
            vLLM from its fastest sampler. False: one seed a call; the same call gives the same samples all the same.
        max_logprob_gap: nats that log-probabilities of a few tokens may be from the student's, on average, after a change of
            weights (a quarter of it where both sides compute in float32).
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
        sleep: bool = False,
        tensor_parallel_size: int = 1,
        seeded: bool = False,
        max_logprob_gap: float = GAP,
        **engine_arguments,
    ) -> None:
        if not 0 < gpu_memory_utilization < 1:
            raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}: expected a share between 0 and 1")
        if max_model_len is not None and max_model_len < 2:
            raise ValueError(f"max_model_len is {max_model_len}: expected at least 2, a prompt and a response")
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if tensor_parallel_size < 1 or processes % tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size is {tensor_parallel_size}: expected a divisor of {processes}, the training processes"
            )
        _environment()
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                f"vLLM is not installed ({error}): pip install 'simct[vllm]', or take another engine"
            ) from error
        if processes > 1:
            engine_arguments.setdefault("distributed_executor_backend", "external_launcher")
        if sleep and torch.cuda.is_available():
            engine_arguments.setdefault("enable_sleep_mode", True)
        optional = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
        with process_state():
            try:
                self.llm = LLM(
                    model=os.fspath(model),
                    dtype=dtype,
                    gpu_memory_utilization=gpu_memory_utilization,
                    enforce_eager=not torch.cuda.is_available() if enforce_eager is None else enforce_eager,
                    trust_remote_code=trust_remote_code,
                    tensor_parallel_size=tensor_parallel_size,
                    generation_config="vllm",  # nothing from the model's generation_config.json
                    logprobs_mode="raw_logprobs",  # of the model's own distribution, before temperature and top_p
                    **{name: value for name, value in optional.items() if value is not None},
                    **engine_arguments,
                )
            except (ValueError, RuntimeError, OSError) as error:
                hint = " (max_model_len is not given: the model's whole context is)" if max_model_len is None else ""
                raise ValueError(f"vLLM cannot serve {os.fspath(model)!r}{hint}: {error}") from error
        config = self.llm.llm_engine.model_config
        self.max_model_len, self.vocab_size = config.max_model_len, config.get_vocab_size()
        self.dtype, self.max_logprob_gap = str(config.dtype), max_logprob_gap
        self.group, self.seeded = PromptGroup(tensor_parallel_size), seeded
        # Asleep it has neither weights nor cache.
        self.sleeps, self.asleep = sleep, False
        self._student: PreTrainedModel | None = None

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        """ValueError for a prompt that is empty, has an id outside the vocabulary, or is too long for its budget; RuntimeError if
        it sleeps and no student is known to take the weights from."""
        check_prompts(prompts, sampling, self.max_model_len, self.vocab_size)
        prompts, seed = self.group.gather(prompts, seed)
        if not prompts:
            if self.sleeps and not self.asleep:  # woken by a change of weights
                self.sleep()
            return []
        if self.asleep:
            if self._student is None:
                raise RuntimeError("vLLM sleeps, and its weights are gone: expected update_weights first")
            self._load(self._student)
        responses = self._sampled(prompts, sampling, seed)
        if self.sleeps:
            self.sleep()
        return self.group.own(responses)

    def _sampled(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Response]:
        from vllm import SamplingParams

        # A prompt found in the cache is computed in other pieces than one that is not: the last bits, and so a sample, could depend
        # on what was asked before. The cache still serves the repeated prompts of one call.
        self.llm.reset_prefix_cache()
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        text = bool(sampling.stop_strings)  # nothing else needs it
        settings = [
            SamplingParams(
                **request_settings(sampling, request_seed(seed, i) if self.seeded else None), detokenize=text
            )
            for i in range(len(prompts))
        ]
        with process_state():
            # Without seeds of their own: vLLM, in this process, draws from this process's generators, always in one order.
            own = request_seed(seed, 0)
            torch.manual_seed(own), random.seed(own), numpy.random.seed(own)
            outputs = self.llm.generate(requests, settings, use_tqdm=False)
        responses = []
        for output in outputs:
            (sample,) = output.outputs
            logprobs = [at[token].logprob for token, at in zip(sample.token_ids, sample.logprobs, strict=True)]
            responses.append(
                to_response(sample.token_ids, sample.finish_reason, sample.stop_reason, logprobs, sampling)
            )
        return responses

    def sleep(self) -> None:
        """Gives the device's memory back until the next call. The weights are not kept: they come from the student again."""
        if not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def update_weights(self, model: PreTrainedModel) -> None:
        """Loads the current weights of `model`. With FSDP2 every process must call it.

        Raises ValueError for a model of another vocabulary or without plain weights (`checkpoint_weights`), RuntimeError if vLLM
        does not take them, or does not sample from them: its weights are then in no known state.
        """
        check_vocabulary_size(model, self.vocab_size)
        self._load(model)
        self._student = model

        # Not `generate`: the processes of a group ask for the same here.
        check_weights(self._sampled, model, self.dtype, self.max_logprob_gap, "vLLM")

    def _load(self, model: PreTrainedModel) -> None:
        weights = checkpoint_weights(model)
        if self.asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the training has freed, but keeps for itself
            self.llm.wake_up(tags=["weights"])
        try:
            with torch.no_grad():
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
                if not torch.cuda.is_available():
                    self.llm.apply_model(pack_heads)
        except Exception as error:  # each of its loaders fails in its own way
            raise RuntimeError(f"vLLM did not take the weights of {type(model).__name__}: {error}") from error
        if self.asleep:  # the cache after the weights: while they are loaded there is room for what is gathered
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Gives the memory back. The engine cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()


class PromptGroup:
    """Training processes that share one engine: all of them ask it for the prompts of all, and each keeps its own responses."""

    def __init__(self, size: int) -> None:
        """`size`: neighbouring processes in a group; every training process must make one."""
        self.size, self._group, self._mine = size, None, slice(None)
        if size > 1:
            self._group, _ = torch.distributed.new_subgroups(size)

    def gather(self, prompts: list[list[int]], seed: int) -> tuple[list[list[int]], int]:
        """The prompts of all, in the order of the processes, and the first one's seed."""
        if self.size == 1:
            return prompts, seed
        parts: list = [None] * self.size
        torch.distributed.all_gather_object(parts, (prompts, seed), group=self._group)
        place = torch.distributed.get_rank(self._group)
        start = sum(len(part[0]) for part in parts[:place])
        self._mine = slice(start, start + len(prompts))
        return [p for part in parts for p in part[0]], parts[0][1]

    def own(self, responses: list[Response]) -> list[Response]:
        """Of the responses to the gathered prompts those to this process's."""
        return responses[self._mine]


def colocated_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike | None = None,
    *,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    sleep: bool = True,
    shards: int = 1,
    **options,
) -> ColocatedVLLM:
    """An engine with the weights that the live `model` has now (PEFT: merged), for a student that no folder holds.

    They go through `folder` (new or empty, one a process), and stay there in `student`; without one, through a temporary folder
    that is gone when this returns. `gpu_memory_utilization`: by default what the training leaves (`memory_share`). `shards`: over
    how many devices the student's parameters will be spread. `sleep` and the other `options`: those of `ColocatedVLLM`.
    """
    if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"folder {os.fspath(folder)!r} is not empty: expected a new one")
    if gpu_memory_utilization is None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        coming = 0
        # DDP's buckets, which are the gradients, are there in all phases.
        whole = shards == 1 and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        for parameter in model.parameters():
            if parameter.device.type == "cpu":  # sharded, and put on the devices later
                coming += parameter.nbytes // shards
            if parameter.requires_grad:
                coming += 8 * parameter.numel() // shards  # two moments, of Adam
                coming += parameter.nbytes if whole else 0
        gpu_memory_utilization = memory_share(*torch.cuda.mem_get_info(), coming, sleep=sleep)
    if gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = gpu_memory_utilization
    with tempfile.TemporaryDirectory(prefix="simct-vllm-") as temporary:
        place = Path(folder if folder is not None else temporary) / "student"
        # In the precision that vLLM computes in: of a process for each device there are as many at once.
        name = options.get("dtype")
        write_model(model, tokenizer, place, dtype=getattr(torch, name) if name not in (None, "auto") else None)
        # What is compared after each change of weights must fit as well.
        length = None if max_model_len is None else max(max_model_len, PROMPT_TOKENS + NEW_TOKENS)
        engine = ColocatedVLLM(place, sleep=sleep, max_model_len=length, **options)
    engine._student = model
    return engine


def memory_share(free: int, total: int, coming: int, *, sleep: bool) -> float:
    """The share of a device's memory that a vLLM may take beside a training.

    Args:
        free, total: bytes of the device.
        coming: bytes of what the training holds in all its phases and has not put there yet: moments of the optimiser, a student
            that is still to be sharded.
        sleep: vLLM gives all of it back between its calls; else half of what is left is the training's, for activations and
            gradients.
    Raises:
        ValueError: nothing is left.
    """
    left = free - coming - SPARE
    share = min(0.9, left * (1.0 if sleep else 0.5) / total)
    if share < 0.05:
        raise ValueError(
            f"rollout_engine is 'vllm', but the training leaves {max(0, left) / 1e9:.1f} of {total / 1e9:.1f} GB for it: expected "
            "a vLLM server on another device (vllm-server), offload_teacher=True, or an adapter (peft_config)"
        )
    return share


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
