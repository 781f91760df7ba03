"""Apple's cut cross-entropy of the student's head alone: no distillation, a reference for what one head's products cost."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..cases import Case, Problem
from . import Method, missing


def prepare(problem: Problem) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    head, hidden = problem.student_head, problem.student_hidden
    implementation = "cce" if hidden.is_cuda else "torch_compile"  # the latter has whole logits
    return lambda: linear_cross_entropy(
        hidden,
        head.weight,
        problem.units.student_tokens,
        softcap=head.softcap,
        reduction="sum",
        impl=implementation,
    )


def refuses(case: Case, device: str) -> str | None:
    if case.form != "linear":
        return "works from hidden states and a head"
    return missing("cut_cross_entropy", "triton")


METHODS = [Method("cut cross-entropy, student's head only", prepare, refuses, same_loss=False, compiles=True)]
