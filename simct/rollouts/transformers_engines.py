"""Samples from a transformers model in this process.

`ContinuousBatching` is the transformers scheduler with a paged cache: no padding, finished requests make room for waiting ones.
`StaticBatching` is plain `generate` on left-padded batches, for models or devices that the first does not serve.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.utils import is_flash_attn_2_available

from simct.rollouts.draws import UniformDraws, uniform_numbers
from simct.rollouts.protocol import IN_PROCESS, Response, RolloutEngine, Sampling, check_logprobs


class StaticBatching:
    """`model.generate` on left-padded batches of at most `batch_size` prompts of like length. With the model's tokenizer it also
    stops at stop strings (else responses run on, and are cut later)."""

    def __init__(self, model: PreTrainedModel, batch_size: int = 64, tokenizer=None) -> None:
        self.model, self.batch_size, self.tokenizer = model, batch_size, tokenizer
        attention_of_any_shape(model.device)

    def update_weights(self, model: PreTrainedModel) -> None:
        """The model is the student itself."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        responses: list[Response | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        uniform = uniform_numbers(seed, len(prompts), sampling.max_new_tokens)
        options: dict = {"generation_config": replace(sampling, temperature=0.0).generation_config()}
        if sampling.stop_strings and self.tokenizer is not None:
            options |= {"stop_strings": list(sampling.stop_strings), "tokenizer": self.tokenizer}
        with sampling_mode(self.model, seed), own_defaults_off(self.model), contiguous_head_input(self.model):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                width = max(len(prompts[i]) for i in chosen)
                ids = torch.full((len(chosen), width), sampling.pad_id)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(chosen):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                # Copied once, each way: a copy a token, or a response, would wait for the device as often.
                draws = UniformDraws(uniform[chosen].to(self.model.device), sampling.temperature, sampling.top_p)
                output = self.model.generate(
                    ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    logits_processor=LogitsProcessorList([draws]),
                    **options,
                )
                logprobs = torch.stack(draws.logprobs, dim=1).tolist()
                for row, (i, tokens) in enumerate(zip(chosen, output[:, width:].tolist(), strict=True)):
                    response = sampling.response(tokens)
                    responses[i] = replace(response, logprobs=logprobs[row][: len(response.token_ids)])
        return responses


class ContinuousBatching:
    """transformers' continuous batching.

    Args:
        page_size: tokens of a cache page.
        kv_cache_gb: 10^9 bytes for keys and values, kept with the manager from one call to the next; None: as much as one call can
            get (of the free device memory; on a CPU as much as it needs), given back after it.
    """

    def __init__(self, model: PreTrainedModel, page_size: int = 64, kv_cache_gb: float | None = None) -> None:
        self.model, self.page_size, self.kv_cache_gb = model, page_size, kv_cache_gb
        self._kept_for: Sampling | None = None

    def update_weights(self, model: PreTrainedModel) -> None:
        """The model is the student itself."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        if not prompts:
            return []
        keep = self.kv_cache_gb is not None
        if self._kept_for not in (None, sampling):  # a kept manager samples as it was made
            self.model.destroy_cached_continuous_batching_manager()
            self._kept_for = None
        with sampling_mode(self.model, seed), without_autocast(self.model), torch.no_grad():
            manager = self.model.init_continuous_batching(
                generation_config=sampling.generation_config(),
                continuous_batching_config=self._cache_config(prompts, sampling, seed),
            )
            try:
                request_ids = self._queue(manager, prompts)
                results = {}
                while len(results) < len(prompts):
                    result = manager.get_result(timeout=1)
                    if result is None and not manager.is_running():
                        break
                    if result is not None and result.is_finished():
                        results[result.request_id] = result
            finally:
                manager.stop(block=True, keep_for_next_session=keep)
        self._kept_for = sampling if keep else None
        failed = [
            f"prompt {i}: {results[r].error if r in results else 'no answer'}"
            for i, r in enumerate(request_ids)
            if r not in results or results[r].error is not None
        ]
        # What torch.multinomial says, on a CPU and on a GPU, whose context it leaves unusable.
        if any("probability tensor contains" in m or "device-side assert" in m for m in failed):
            raise FloatingPointError(
                f"{type(self.model).__name__} cannot be sampled from: its logits are no finite numbers, it seems ({failed[0]})"
            )
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(prompts)} rollouts failed, the first: {failed[0]}")
        responses = []
        plain = (
            sampling.temperature == 1.0 and sampling.top_p == 1.0
        )  # else the log-probabilities are of what it sampled from
        for r in request_ids:
            response = sampling.response(results[r].generated_tokens)
            logprobs = list(getattr(results[r], "logprobs", None) or [])[: len(response.token_ids)]
            check_logprobs(logprobs)
            if plain and len(logprobs) == len(response.token_ids):
                response = replace(response, logprobs=logprobs)
            responses.append(response)
        return responses

    @staticmethod
    def _queue(manager, prompts: list[list[int]]) -> list[str]:
        """Starts the manager with all prompts in its queue: its scheduler then sees the same queue, and samples the same tokens,
        every time."""
        manager.start()  # first: one that was stopped takes no prompts
        with manager.pause():
            return manager.add_requests(prompts)

    def _cache_config(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> ContinuousBatchingConfig:
        options = {}
        if self.kv_cache_gb is not None:
            # Kept pages hold keys of older weights: none may be found again by its prompt.
            options = {"num_blocks": self._pages(self.kv_cache_gb), "allow_block_sharing": False}
        if self.model.device.type != "cpu":
            # The cache is sized by the free device memory. Flash attention has no float32 kernels.
            flash = self.model.dtype != torch.float32
            return ContinuousBatchingConfig(
                seed=seed, page_size=self.page_size, auto_switch_to_flash=flash, return_logprobs=True, **options
            )
        pages = sum(-(-(len(p) + sampling.max_new_tokens) // self.page_size) + 1 for p in prompts)
        prompt_tokens = max(256, max(map(len, prompts)))
        return ContinuousBatchingConfig(
            seed=seed,
            page_size=self.page_size,
            max_batch_tokens=prompt_tokens,
            use_cuda_graph=False,
            return_logprobs=True,
            **{"num_blocks": pages, **options},
        )

    def _pages(self, gigabytes: float) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bytes_a_token = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        pages = int(gigabytes * 1e9 / (bytes_a_token * self.page_size))
        if pages < 2:
            raise ValueError(
                f"kv_cache_gb is {gigabytes}: expected room for two pages of {self.page_size} tokens, "
                f"{2 * bytes_a_token * self.page_size / 1e9:.3f}"
            )
        return pages


def attention_of_any_shape(device: torch.device) -> None:
    """For the rest of this process, keeps SDPA on a GPU from cuDNN's kernels, which PyTorch prefers on an H100 and newer: they
    build a plan for each new shape, for a tenth of a second or so, and here every batch and every sampled token has one."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def sampling_mode(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Evaluation mode and a seed of its own; the caller's mode and random state come back afterwards.

    transformers takes no generator: its continuous batching seeds the process's own, and draws from it."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(training)


@contextmanager
def own_defaults_off(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what a configuration leaves open from the model's own (a repetition penalty, say): samples would then not be
    the student's distribution. No argument keeps it from that: what is None counts as open, and not all can be given a value."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def contiguous_head_input(model: PreTrainedModel) -> Iterator[None]:
    """After the prompts a model applies its head to their last hidden states, a strided view. Where the head needs no gradient (a
    copy to sample from, a frozen head under LoRA) PyTorch then multiplies prompt by prompt, on a CPU with a copy of the head for
    each: longer than all that follows. The view is made inside the model's own forward, which only a hook
    on the head reaches."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """Takes off the autocast that accelerate wraps around a prepared model's forward: a paged cache has one dtype, the weights'.

    The wrapper turns autocast on inside of any that is off around it, and accelerate's own way takes the wrapper off for good."""
    wrapped = model.__dict__.get("forward")
    original = getattr(model, "_original_forward", None)
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def make_engine(
    model: PreTrainedModel, engine: str = "auto", *, tokenizer=None, kv_cache_gb: float | None = None
) -> RolloutEngine:
    """The engine of that name, inside this process and with the model's own weights. "auto": on an accelerator continuous batching
    if it computes this model's attention whole and takes a two-token test of it, else static batches; on a CPU static batches, the
    faster of the two there.

    Raises ValueError for an unknown name, or for "continuous" with a model that transformers cannot serve so.
    """
    if engine not in IN_PROCESS:
        raise ValueError(f"rollout_engine is {engine!r}: expected one of {', '.join(IN_PROCESS)}")
    if hasattr(model, "get_base_model"):  # PEFT: the adapters are inside the base model's layers
        model = model.get_base_model()
    if engine == "static" or (engine == "auto" and model.device.type == "cpu"):
        return StaticBatching(model, tokenizer=tokenizer)
    cap = lost_softcap(model)
    without = f"{type(model).__name__} without its attention soft cap ({cap or 0:g})"
    if cap is not None and engine == "auto":
        warnings.warn(
            f"continuous batching would sample {without}: using static batches (flash-attn and 16-bit rollouts keep the cap, and "
            "so does rollout_engine='vllm')",
            stacklevel=2,
        )
        return StaticBatching(model, tokenizer=tokenizer)
    try:
        if not hasattr(ContinuousBatchingManager, "pause"):
            raise ImportError("transformers 5.18 or newer is needed for it")
        ContinuousBatching(model).generate([[0, 1]], Sampling(end_ids=(0,), pad_id=0, max_new_tokens=2), seed=0)
    except Exception as error:  # each architecture fails in its own way
        problem = str(error)
    else:
        if model.device.type == "cuda" and not _flash(model):
            warnings.warn(
                "continuous batching computes attention behind a mask here, without CUDA graphs, for several times the time: "
                "flash-attn (simct[flash]) and 16-bit rollouts, or rollout_engine='vllm', need none",
                stacklevel=2,
            )
        if cap is not None:
            warnings.warn(
                f"continuous batching samples {without}, a little off its own distribution (rollout/logprob_gap says how far): "
                "rollout_engine='static', or flash-attn and 16-bit rollouts, keep it",
                stacklevel=2,
            )
        return ContinuousBatching(model, kv_cache_gb=kv_cache_gb)
    message = f"{type(model).__name__} cannot be sampled from by continuous batching ({problem})"
    if engine == "continuous":
        raise ValueError(f"rollout_engine is 'continuous', but {message}: expected 'static'")
    warnings.warn(f"{message}; using static batches", stacklevel=2)
    return StaticBatching(model, tokenizer=tokenizer)


def lost_softcap(model: PreTrainedModel) -> float | None:
    """The cap on attention scores (Gemma-2) that continuous batching would leave out: transformers' paged attention computes none,
    unless flash attention does it. None: nothing is lost."""
    return None if _flash(model) else getattr(model.config.get_text_config(), "attn_logit_softcapping", None)


def _flash(model: PreTrainedModel) -> bool:
    """Whether transformers' continuous batching has flash attention for it."""
    return model.device.type != "cpu" and model.dtype != torch.float32 and is_flash_attn_2_available()
