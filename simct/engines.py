"""Which rollout engine a run uses, and with which weights."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.config import SimCTConfig
from simct.rollout import CopiedStudent, RolloutEngine, make_engine


def build_engine(
    args: SimCTConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, sharded: bool = False
) -> RolloutEngine:
    """The engine that `args.rollout_engine` names, for a student on its device. `sharded`: its parameters will be spread over
    processes (FSDP), so that samples come from a whole copy.

    Raises ValueError for an engine that is not installed, or that cannot serve this student.
    """

    if args.rollout_engine == "vllm":
        return colocated_vllm(args, student, tokenizer)
    if args.rollout_engine == "vllm-server":
        from simct.vllm_server import ServedVLLM

        vocabulary = student.config.get_text_config(decoder=True).vocab_size
        return ServedVLLM(args.vllm_server_url, vocab_size=vocabulary, sync_folder=args.vllm_sync_dir)

    def make(model: PreTrainedModel) -> RolloutEngine:
        return make_engine(model, args.rollout_engine, tokenizer=tokenizer, kv_cache_gb=args.kv_cache_gb)

    dtype = rollout_dtype(args, student)
    if dtype is None and sharded:
        dtype = student.dtype
    return make(student) if dtype is None else CopiedStudent(student, dtype, make)


def colocated_vllm(args: SimCTConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """vLLM in this process. ValueError where it is not installed."""
    try:
        from simct.vllm_engine import colocated_from_model
    except ImportError as error:
        raise ValueError(
            f"rollout_engine is 'vllm', but vLLM cannot be imported ({error}): pip install 'simct[vllm]'"
        ) from error
    dtype = args.rollout_dtype or ("bfloat16" if args.bf16 else str(student.dtype).removeprefix("torch."))
    options = (
        {} if args.vllm_gpu_memory_utilization is None else {"gpu_memory_utilization": args.vllm_gpu_memory_utilization}
    )
    return colocated_from_model(student, tokenizer, dtype=dtype, **options)


def rollout_dtype(args: SimCTConfig, student: PreTrainedModel) -> torch.dtype | None:
    """The precision of a copy to sample from; None: from the student itself.

    float32 master weights under --bf16 would be sampled from in float32 (a paged cache has one precision, the weights'), at half
    the speed or less on a GPU: two bytes a parameter buy a copy.
    """
    if args.rollout_dtype is not None:
        return getattr(torch, args.rollout_dtype)
    if args.bf16 and student.device.type != "cpu" and student.dtype == torch.float32:
        return torch.bfloat16
    return None
