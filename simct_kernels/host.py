"""The CPU's copies of tensors that lie on a GPU, so that a plan can read indices without waiting for one.

A tensor that comes from the CPU keeps its origin, one that was made on the GPU is fetched once. A copy lives as long as its
tensor, which must not be changed in place: units and shared vocabularies are not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def on_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU. Waits for a GPU once, where the tensor was made there."""
    if tensor.device.type == "cpu":
        return tensor
    copy = _COPIES.get(tensor)
    if copy is None:
        _COPIES[tensor] = copy = tensor.detach().cpu()
    return copy


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, with its copy on the CPU kept, if there is one. From the CPU to a GPU it never waits."""
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        moved = tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait
    else:
        moved = tensor.to(device)
    if moved is not tensor and device.type != "cpu":
        copy = tensor if tensor.device.type == "cpu" else _COPIES.get(tensor)
        if copy is not None:
            _COPIES[moved] = copy
    return moved
