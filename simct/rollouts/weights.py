"""The student's current weights under the names that a checkpoint gives them: what an engine outside transformers loads."""

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

CHECKPOINTED = "_checkpoint_wrapped_module"


def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight and persistent buffer of a causal language model, tied ones once.

    `model`: a transformers model, also behind PEFT, DDP or torch.compile. PEFT: the merged weights, a copy of one layer at a time,
    with the base weights bit for bit as they were afterwards. FSDP2: each shard's whole tensor, a collective call, so that every
    process must exhaust the iterator. Tensors have the dtype and device of the model and are detached; they may be the model's own
    memory, so load or copy them before the next optimizer step.

    By hand because no library does it tensor by tensor: peft merges a whole model (and unmerging leaves rounding in the base
    weights), torch and accelerate gather the whole state dict of FSDP2, transformers' way to checkpoint names takes one.

    Raises ValueError for a model whose weights no plain checkpoint of its configuration can hold: quantised weights, adapters that
    act by extra prompt tokens, a head trained apart from the embedding that its configuration ties it to.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check(model, base)
    named = _distinct(base)
    if getattr(base, "_weight_conversions", None):
        # Fused or renamed when transformers loaded them (experts of a mixture, for one): the way back needs all of them at once.
        named = iter(revert_weight_conversion(base, dict(named)).items())
    return named


def _check(model: nn.Module, base: nn.Module) -> None:
    name = type(base).__name__
    if getattr(base, "is_quantized", False):
        raise ValueError(
            f"{name} has quantised weights, which are not those of its checkpoint: expected weights in a floating-point dtype; "
            "sample from a quantised student with the transformers engines"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{name} has a prompt-learning adapter, which cannot be merged into its weights: expected LoRA or like"
        )


def _distinct(base: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    config = getattr(base, "config", None)
    tied = config is not None and config.get_text_config(decoder=True).tie_word_embeddings
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())} if tied else set()
    head = next((n for n, m in base.named_modules() if m is base.get_output_embeddings()), None) if tied else None
    seen = set()
    for name, owner, value in _tensors(base, "", ends):
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        if name == f"{head}.weight":
            raise ValueError(
                f"{name} of {type(base).__name__} is not the embedding that tie_word_embeddings ties it to (trained apart, as "
                "modules_to_save does?): expected one shared weight, or tie_word_embeddings off in the student's configuration"
            )
        yield name, value


def _tensors(module: nn.Module, prefix: str, ends: set[int]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, the tensor that the module holds, its value in a checkpoint) of a module and all below it."""
    kind = _adapter_kind(module)
    if kind == "tuner":
        if id(module) in ends:
            raise ValueError(
                f"{prefix[:-1]} has an adapter of its own, but the configuration ties embedding and head: expected neither"
            )
        yield from _merged(module, prefix, ends)
        return
    if kind == "whole":  # modules_to_save: a trained copy beside the original
        chosen = (
            module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]
        )
        yield from _tensors(chosen, prefix, ends)
        return
    if kind == "tokens":
        yield from _merged(module.token_adapter, prefix, ends)
        return
    own = dict(module._parameters)
    own.update((n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set)
    for name, tensor in own.items():
        if tensor is not None:
            yield prefix + name, tensor, _whole(tensor.detach())
    for name, child in module.named_children():
        # A layer whose activations are computed again is wrapped under FSDP.
        yield from _tensors(child, prefix if name == CHECKPOINTED else f"{prefix}{name}.", ends)


def _adapter_kind(module: nn.Module) -> str | None:
    if not type(module).__module__.startswith("peft."):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import other

    if isinstance(module, BaseTunerLayer):
        return "tuner"
    if isinstance(module, other.ModulesToSaveWrapper):
        return "whole"
    return "tokens" if isinstance(module, getattr(other, "TrainableTokensWrapper", ())) else None


def _merged(layer: nn.Module, prefix: str, ends: set[int]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The weights under an adapter with its change added. Adding and subtracting again would leave rounding behind in the base
    weights, so that these are put back from a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in layer.modules() if isinstance(m, BaseTunerLayer) and not m.merged and not m.disable_adapters]
    base = layer.get_base_layer()
    with torch.no_grad():
        before = [(p, p.detach().clone()) for p in base.parameters()] if layers else []
        for each in layers:
            each.merge()
        try:
            values = [(name, owner, value.clone()) for name, owner, value in _tensors(base, prefix, ends)]
        finally:
            for each in layers:
                each.unmerge()
            for parameter, value in before:
                parameter.copy_(value)
    yield from values


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A shard of FSDP2 (DTensor) gathered; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
) -> dict[str, str]:
    """Files `weights-*.safetensors` in a folder that is made here, each of about `shard_bytes` (at least one tensor): no more than
    that is held in memory beside the model (the writers of huggingface_hub and transformers want all tensors first).

    `dtype`: what floating-point tensors are written in, by default their own. Returns which file each tensor is in."""
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


def write_model(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype | None = None
) -> None:
    """A folder that loads as a plain model: configuration, tokenizer and the current weights, those of adapters merged. `dtype`:
    that floating-point weights are written in; None: their own."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    index = {"metadata": {}, "weight_map": write_weights(checkpoint_weights(model), folder, dtype=dtype)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__.removeprefix("FSDP")]  # FSDP2 renames the class
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
