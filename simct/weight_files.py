"""A model's current weights written as safetensors, in shards, for a process that reads checkpoints."""

import copy
import json
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
) -> dict[str, str]:
    """Files `weights-*.safetensors` in a folder that is made here, each of about `shard_bytes` (at least one tensor): no more than
    that is held in memory beside the model. `dtype`: what floating-point tensors are written in, by default their own. Returns
    which file each tensor is in."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = files = 0
    file = "weights-00000.safetensors"
    for name, tensor in weights:
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        shard[name] = tensor.to(
            "cpu", target, copy=True
        ).contiguous()  # copied: safetensors refuses memory that two names share
        places[name] = file
        size += shard[name].nbytes
        if size >= shard_bytes:
            save_file(shard, folder / file, metadata={"format": "pt"})
            shard, size = {}, 0
            files += 1
            file = f"weights-{files:05}.safetensors"
    if shard:
        save_file(shard, folder / file, metadata={"format": "pt"})
    return places


def write_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that loads as a plain model: configuration, tokenizer and the current weights, those of adapters merged."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    index = {"metadata": {}, "weight_map": write_weights(checkpoint_weights(model), folder)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__.removeprefix("FSDP")]  # FSDP2 renames the class
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
