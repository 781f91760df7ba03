"""The package's own losses, in the backends and with the options that are measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from simct_kernels import linear_simct_loss, simct_loss, topk_simct_loss
from simct_kernels.options import LossOptions

from ..cases import Case, Problem
from . import Method


def prepare(problem: Problem, **keywords) -> Callable[[], Tensor]:
    case = problem.case
    if case.form == "logits":
        inputs = (problem.student_logits, problem.teacher_logits)
        return lambda: simct_loss(*inputs, problem.units, problem.shared, **keywords).sum()
    student = (problem.student_hidden, problem.student_head)
    if case.form == "served":
        served = (problem.teacher_topk_ids, problem.teacher_topk_logprobs, problem.teacher_token_logprobs)
        return lambda: topk_simct_loss(*student, *served, problem.units, problem.shared, **keywords).sum()
    inputs = (*student, problem.teacher_hidden, problem.teacher_head)
    return lambda: linear_simct_loss(*inputs, problem.units, problem.shared, **keywords).sum()


def prepare_aligned(problem: Problem) -> Callable[[], Tensor]:
    """The alignment of the text is in the call, as it is in GOLD's."""
    text = problem.text
    inputs = (problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head)

    def call() -> Tensor:
        units = text.pair.align_batch([text.student_ids], [text.teacher_ids]).to(problem.device)
        return linear_simct_loss(*inputs, units, problem.shared)

    return call


def only_text(case: Case, device: str) -> str | None:
    return None if case.form == "text" else "aligns a text, of which this case has none"


METHODS = [
    Method("ours", prepare),
    # Where "auto" is the PyTorch backend already, this is the same again.
    Method(
        "ours, torch backend",
        partial(prepare, backend="torch"),
        lambda case, device: "the same as ours: auto is the torch backend here" if device == "cpu" else None,
    ),
    Method("ours, reduction=none", partial(prepare, reduction="none")),
    Method("ours, beta=0.5", partial(prepare, beta=0.5), options=LossOptions(beta=0.5)),
    Method("ours, top_k=16", partial(prepare, top_k=16), options=LossOptions(top_k=16)),
    Method("ours with alignment", prepare_aligned, only_text),
]
