"""TRL's chunked divergence (`trl.kernels.chunked_divergence`, since TRL 1.16): one vocabulary, Triton or PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..cases import Case, Problem
from . import Method, missing


def prepare(problem: Problem) -> Callable[[], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = problem.student_head, problem.teacher_head
    inputs = (
        *(problem.student_hidden, student.weight, None, problem.teacher_hidden, teacher.weight, None),
        *(1.0, 1.0, student.scale, student.softcap, teacher.scale, teacher.softcap),
    )
    return lambda: ChunkedDivergenceFunction.apply(*inputs)[0].sum()


def refuses(case: Case, device: str) -> str | None:
    if not case.one_vocabulary or case.form != "linear":
        return "one vocabulary only, from hidden states and heads"
    return missing("trl", "trl.kernels.chunked_divergence")


METHODS = [Method("TRL chunked divergence", prepare, refuses)]
