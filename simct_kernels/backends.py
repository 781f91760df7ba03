"""The one list of backends, and the choice among them. Nothing is imported before it is asked for."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# A backend is a package with the three losses as in `reference`. All but that one also have `linear_job` and `topk_job`, which give
# the custom ops a job as in `torch_backend` to run.
BACKENDS = {
    "triton": "triton_backend",
    "torch": "torch_backend",
    "reference": "reference",
}


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
def choose(name: str, device_type: str) -> str:
    """The backend that `name` means for tensors on a device, of those that this machine has.

    "auto" is Triton on a GPU (ROCm's is called "cuda" too) and PyTorch elsewhere. Raises ValueError for a backend that
    is not there.
    """
    if isinstance(name, str) and name == "auto":
        return "triton" if device_type == "cuda" and _imports("triton") else "torch"
    if not isinstance(name, str) or name not in BACKENDS or not _imports(name):
        installed = ", ".join(repr(other) for other in ("auto", *BACKENDS) if other == "auto" or _imports(other))
        raise ValueError(f"backend {name!r} is not in this installation, which has {installed}")
    return name
