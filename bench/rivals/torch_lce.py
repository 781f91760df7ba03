"""PyTorch's own chunked cross entropy of the student's head alone (2.13): a yardstick for what one head's products cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Case, Problem
from . import Method


def prepare(problem: Problem) -> Callable[[], Tensor]:
    hidden, weight, tokens = problem.student_hidden, problem.student_head.weight, problem.units.student_tokens
    chunked = torch.nn.LinearCrossEntropyOptions()
    return lambda: torch.nn.functional.linear_cross_entropy(hidden, weight, tokens, reduction="sum", options=chunked)


def refuses(case: Case, device: str) -> str | None:
    if case.form != "linear" or case.student.softcap is not None:
        return "works from hidden states and a head without a soft-cap"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no linear_cross_entropy in chunks"
    return None


METHODS = [Method("torch's linear cross-entropy, student's head only", prepare, refuses, same_loss=False)]
