"""The materialised algorithm under torch.compile: products, softmaxes and gathers, fused as far as the compiler goes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Problem
from . import Method, materialised, only


def prepare(problem: Problem) -> Callable[[], Tensor]:
    return torch.compile(materialised.prepare(problem), dynamic=False)


METHODS = [Method("materialised, compiled", prepare, only("linear", "logits", "text"), compiles=True)]
