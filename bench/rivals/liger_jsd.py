"""Liger's fused linear JSD (`liger_kernel.transformers.LigerFusedLinearJSD`): one vocabulary, Triton only."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..cases import Case, Problem
from . import Method, missing


def prepare(problem: Problem) -> Callable[[], Tensor]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    inputs = (
        *(problem.student_hidden, problem.student_head.weight),
        *(problem.teacher_hidden, problem.teacher_head.weight),
    )
    return lambda: loss(*inputs, None)


def refuses(case: Case, device: str) -> str | None:
    if not case.one_vocabulary or case.form != "linear":
        return "one vocabulary only, from hidden states and heads"
    if case.student.softcap or case.teacher.softcap:
        return "knows no soft-cap"
    return missing("liger_kernel") or (None if device == "cuda" else "needs a GPU")


METHODS = [Method("Liger fused linear JSD", prepare, refuses, scale=lambda case: float(case.rows))]  # it averages
