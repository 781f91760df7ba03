"""A model's current weights written as safetensors, in shards, for a process that reads checkpoints."""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.checkpoint_weights import checkpoint_weights


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
) -> None:
    """Files `weights-*.safetensors` in a folder that is made here, each of about `shard_bytes` (at least one tensor): no more than
    that is held in memory beside the model. `dtype`: what floating-point tensors are written in, by default their own."""
    folder.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    size = count = 0
    for name, tensor in weights:
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        shard[name] = tensor.to("cpu", target, copy=True).contiguous()  # copied: safetensors refuses memory that two names share
        size += shard[name].nbytes
        if size >= shard_bytes:
            save_file(shard, folder / f"weights-{count:05}.safetensors", metadata={"format": "pt"})
            shard, size, count = {}, 0, count + 1
    if shard:
        save_file(shard, folder / f"weights-{count:05}.safetensors", metadata={"format": "pt"})


def write_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that loads as a plain model: configuration, tokenizer and the current weights, those of adapters merged."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    write_weights(checkpoint_weights(model), folder)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__.removeprefix("FSDP")]  # FSDP2 renames the class
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
