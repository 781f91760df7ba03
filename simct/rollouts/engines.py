"""Which rollout engine a run uses, and with which weights."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.rollouts.copied import CopiedStudent
from simct.rollouts.protocol import RolloutEngine
from simct.rollouts.transformers_engines import make_engine


def build_engine(
    name: str,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    sharded: bool = False,
    device: torch.device | None = None,
    kv_cache_gb: float | None = None,
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
        vllm_options: keyword arguments of a vLLM in this process.
        server_url, sync_folder: of "vllm-server".

    Raises ValueError for an engine that is not installed, or that cannot serve this student.
    """
    if name == "vllm":
        return _colocated_vllm(student, tokenizer, dtype or student.dtype, vllm_options or {})
    if name == "vllm-server":
        from simct.rollouts.vllm_server import ServedVLLM

        vocabulary = student.config.get_text_config(decoder=True).vocab_size
        return ServedVLLM(server_url, vocab_size=vocabulary, sync_folder=sync_folder)

    def make(model: PreTrainedModel) -> RolloutEngine:
        return make_engine(model, name, tokenizer=tokenizer, kv_cache_gb=kv_cache_gb)

    if dtype is None and sharded:
        dtype = student.dtype
    return make(student) if dtype is None else CopiedStudent(student, dtype, make, device)


def _colocated_vllm(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, options: dict
) -> RolloutEngine:
    """vLLM in this process. ValueError where it is not installed."""
    try:
        from simct.rollouts.vllm_engine import colocated_from_model
    except ImportError as error:
        raise ValueError(
            f"rollout_engine is 'vllm', but vLLM cannot be imported ({error}): pip install 'simct[vllm]'"
        ) from error
    return colocated_from_model(student, tokenizer, dtype=str(dtype).removeprefix("torch."), **options)
