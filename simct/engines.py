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

    def make(model: PreTrainedModel) -> RolloutEngine:
        return make_engine(model, args.rollout_engine, tokenizer=tokenizer, kv_cache_gb=args.kv_cache_gb)

    dtype = rollout_dtype(args, student)
    if dtype is None and sharded:
        dtype = student.dtype
    return make(student) if dtype is None else CopiedStudent(student, dtype, make)


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
