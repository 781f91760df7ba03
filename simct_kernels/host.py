"""What tensors on a GPU hold, kept on the CPU, so that a plan can read indices without waiting for the device.

A tensor that comes from the CPU keeps what it held there, one that was made on the GPU is fetched once. That lives as long as
the tensor, which must not be changed in place: units and shared vocabularies are not.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def on_host(tensor: Tensor) -> Tensor:
    """The tensor's elements, on the CPU. Waits for a GPU once, where the tensor was made there."""
    if tensor.device.type == "cpu":
        return tensor
    if tensor not in _KEPT:
        keep_on_host(tensor, tensor.cpu())
    return _KEPT[tensor]


def keep_on_host(tensor: Tensor, elements: Tensor) -> Tensor:
    """The tensor, of which `on_host` will give `elements`, which are on the CPU."""
    _KEPT[tensor] = elements
    return tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, with what it holds kept, if that is known. From the CPU to a GPU it never waits."""
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        moved = tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait
    else:
        moved = tensor.to(device)
    if moved is not tensor and device.type != "cpu" and not tensor.is_floating_point():
        if tensor.device.type == "cpu":
            keep_on_host(moved, tensor)
        elif tensor in _KEPT:
            keep_on_host(moved, _KEPT[tensor])
    return moved


def moved(checked, device: torch.device | str):
    """A copy with its tensors on `device`, not checked again: that would wait for the device."""
    try:
        device = torch.device(device)
    except (TypeError, RuntimeError) as error:  # a dtype, say, which Tensor.to would take
        raise ValueError(f"device must be a torch.device or its name, got {device!r}") from error
    copied = copy.copy(checked)
    for name, value in vars(checked).items():
        if isinstance(value, Tensor):
            object.__setattr__(copied, name, to_device(value, device))
    return copied
