"""Which rollout engine a run uses, and with which weights."""

import importlib.util
import inspect

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.rollouts.copied import CopiedStudent
from simct.rollouts.protocol import RolloutEngine
from simct.rollouts.transformers_engines import make_engine
from simct.rollouts.vllm_weights import GAP

ALONE = 0.9  # share of a device's memory for a vLLM with nothing beside it


def build_engine(
    name: str,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    sharded: bool = False,
    device: torch.device | None = None,
    kv_cache_gb: float | None = None,
    max_model_len: int | None = None,
    max_logprob_gap: float = GAP,
    vllm_options: dict | None = None,
    server_url: str | None = None,
    sync_folder: str | None = None,
) -> RolloutEngine:
    """The engine of that name (one of `ENGINES`), for a student on its device.

    Args:
        dtype: precision of a copy to sample from; None: the student's own weights.
        sharded: the student's parameters will be spread over processes (FSDP), so that samples come from a whole copy.
        device: where that copy is; the student itself may still wait in main memory. None: the student's.
        kv_cache_gb: 10^9 bytes for keys and values, kept between calls.
        max_model_len: tokens that the longest prompt and its response need together; None: as many as the student allows.
        max_logprob_gap: nats that a vLLM's log-probabilities may be from the student's after its weights have changed.
        vllm_options: more keyword arguments of `ColocatedVLLM` or `ServedVLLM`.
        server_url, sync_folder: of "vllm-server".

    Raises ValueError for an engine that is not installed, or that cannot serve this student.
    """
    options = {"max_model_len": max_model_len, "max_logprob_gap": max_logprob_gap, **(vllm_options or {})}
    if name == "vllm":
        if sharded and torch.distributed.is_initialized():
            options["shards"] = torch.distributed.get_world_size()
        return _colocated_vllm(student, tokenizer, dtype or student.dtype, options)
    if name == "vllm-server":
        from simct.rollouts.vllm_server import ServedVLLM

        vocabulary = student.config.get_text_config(decoder=True).vocab_size
        known = [o for o in inspect.signature(ServedVLLM).parameters if o not in ("base_url", "vocab_size", "api_key")]
        for option in options:
            if option not in known:
                raise ValueError(f"vllm_kwargs names {option!r}: expected some of {', '.join(known)}")
        return ServedVLLM(server_url, **{"vocab_size": vocabulary, "sync_folder": sync_folder, **options})

    def make(model: PreTrainedModel) -> RolloutEngine:
        return make_engine(model, name, tokenizer=tokenizer, kv_cache_gb=kv_cache_gb)

    if dtype is None and sharded:
        dtype = student.dtype
    return make(student) if dtype is None else CopiedStudent(student, dtype, make, device)


def vllm_of_folder(
    name: str, model: str, *, max_model_len: int, dtype: str, server_url: str | None = None
) -> RolloutEngine:
    """A vLLM ("vllm", "vllm-server") of a model that does not change, by its folder or hub name: nothing is trained beside it, so
    that it gets the device. `max_model_len`: tokens of the longest prompt and its response together.

    Raises ValueError for an engine that is not installed, or that cannot serve this model so.
    """
    if name == "vllm":
        return _vllm_engine().ColocatedVLLM(
            model, max_model_len=max_model_len, dtype=dtype, gpu_memory_utilization=ALONE
        )
    from simct.rollouts.vllm_server import ServedVLLM

    return ServedVLLM(server_url, max_model_len=max_model_len)


def _colocated_vllm(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, options: dict
) -> RolloutEngine:
    name = str(dtype).removeprefix("torch.")
    return _vllm_engine().colocated_from_model(student, tokenizer, dtype=name, **options)


def _vllm_engine():
    """The module of vLLM in this process. ValueError where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("rollout_engine is 'vllm', but vLLM is not installed: pip install 'simct[vllm]'")
    from simct.rollouts import vllm_engine

    return vllm_engine
