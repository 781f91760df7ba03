"""The one list of backends, and the choice among them. Nothing is imported before it is asked for."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# A backend is a module with `simct_loss` and `linear_simct_loss` as in `reference`. One whose gradients are
# made in the forward pass also has `linear_job`, which gives the custom ops a job as in `torch_backend` to run.
BACKENDS = {
    "triton": "triton_backend",
    "triton_fused": "triton_backend.fused_backend",  # only for comparison: its gradients are not deterministic
    "torch": "torch_backend",
    "reference": "reference",
}
ALL = tuple(BACKENDS)


def load(name: str) -> ModuleType:
    return importlib.import_module(f".{BACKENDS[name]}", __package__)


@functools.cache
def _imports(name: str) -> bool:
    try:
        load(name)
    except ImportError:
        return False
    return True


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import
def choose(name: str, device_type: str, offered: tuple[str, ...] = ALL) -> str:
    """The backend that `name` means for tensors on a device, of those that a loss offers and this machine has.

    "auto" is Triton on a GPU (ROCm's is called "cuda" too) and PyTorch elsewhere. Raises ValueError for a backend that
    is not there.
    """
    if name == "auto":
        return "triton" if device_type == "cuda" and "triton" in offered and _imports("triton") else "torch"
    if name not in offered or not _imports(name):
        installed = ", ".join(repr(other) for other in ("auto", *offered) if other == "auto" or _imports(other))
        raise ValueError(f"backend {name!r} is not in this installation, which has {installed}")
    return name
