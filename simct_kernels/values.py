"""Checks of one argument by itself: its type, its shape, its values.

A message names the argument, what was expected and what was given. What reads a tensor's data makes a GPU wait, so that only
constructors and what is made once may call it: `check_least` and `refuse_any`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def describe(value: object) -> str:
    """What was given, in a few words, whatever it is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return f"a nested tensor of {value.dtype}"
    return f"{value.dtype} {list(value.shape)}" + ("" if value.layout == torch.strided else f" of {value.layout}")


def is_dense(value: object) -> bool:
    """Whether it is a tensor with one shape and strides: neither sparse nor nested."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_type(name: str, value: object, kind: type, expected: str, hint: str = "") -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {expected}, got {type(value).__name__}{hint}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_float(name: str, tensor: Tensor, hint: str = "") -> None:
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}{hint}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {other_name} is on {other.device}")


def check_vector(
    name: str,
    tensor: object,
    *,
    like: tuple[str, Tensor] | None = None,
    device_of: tuple[str, Tensor] | None = None,
) -> None:
    """Refuses what is not int64 [any], as long as `like` and on its device, or on that of `device_of`."""
    if not is_dense(tensor):
        dense = "dense " if isinstance(tensor, Tensor) else ""
        raise ValueError(f"{name} must be a {dense}tensor, got {describe(tensor)}")
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(tensor.shape)}")
    if like is not None and tensor.shape != like[1].shape:
        raise ValueError(f"{name} must be as long as {like[0]} ({len(like[1])}), got {len(tensor)}")
    if like or device_of:
        check_device(name, tensor, *(like or device_of))


def check_least(name: str, tensor: Tensor, least: int) -> None:
    refuse_any(name, tensor, tensor < least, f"must be at least {least}")


def refuse_any(name: str, values: Tensor, bad: Tensor, expected: str) -> None:
    """Raises ValueError with the first value where `bad` is true."""
    if values.is_meta:
        raise ValueError(f"{name} is on the meta device: its values must be known")
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} {expected}, got {values[where].item()}")
