"""ULD, the universal logit distillation loss (Boizard et al. 2024, arXiv 2402.12030): a baseline, on aligned units.

It compares sorted probabilities and so needs no shared vocabulary; which token a probability belongs to is lost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simct_kernels.checks import check_unit_loss
from simct_kernels.inputs import AlignedUnits, LMHead
from simct_kernels.objectives.row_function import over_rows
from simct_kernels.objectives.segments import reduce_units
from simct_kernels.torch_backend.job import compute_dtype
from simct_kernels.torch_backend.plan import auto_rows
from simct_kernels.torch_backend.rows import LinearRows


@torch.compiler.disable
def uld_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    *,
    temperature: float = 1.0,
    reduction: str = "sum",
    chunk_rows: int | str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The L1 distance of both sides' sorted next-token probabilities at each unit's first row.

    loss(unit) = sum over ranks r of |sort(p_S)[r] - sort(p_T)[r]|, in descending order, the shorter vocabulary padded with
    zeros (the authors derive it as a Wasserstein-1 distance in which all tokens are equally far apart). Gradients go to
    student_hidden and the student head's weight and bias. The original compares position i of one side with position i
    of the other, which are different texts from the first unequal token on; the first rows of byte-aligned units predict
    the same text, so that this is the fair version of the baseline.

    Args:
        student_hidden, teacher_hidden: one row for each of `units`' student_tokens and teacher_tokens.
        temperature: divides both sides' logits; the loss is not multiplied by it.
        reduction: "sum", "mean" over units, or "none" for [G].
        chunk_rows: how many rows of logits of either side exist at once. "auto": by memory.
        return_unit_losses: also return the units' losses [G], detached.

    Returns:
        The loss in float32 (float64 if any input is), or (loss, unit_losses). No unit gives a differentiable 0. A NaN that
        a unit reads makes that unit's loss NaN. Double backward is refused.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an option out of its range.
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    options = (temperature, reduction, chunk_rows, return_unit_losses)
    student_head, teacher_head = check_unit_loss(*sides, units, *options)
    dtype = compute_dtype(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    if not isinstance(chunk_rows, int):
        # Logits, probabilities, their sorted copy and its int64 order stand side by side.
        columns = 4 * max(student_head.weight.shape[0], teacher_head.weight.shape[0])
        chunk_rows = auto_rows(columns, student_hidden.device)
    no_shared = units.student_tokens.new_empty(0)
    teacher = LinearRows(teacher_hidden, teacher_head, no_shared, dtype)
    function = _SortedDistance(teacher, units.teacher_start, temperature)
    losses = over_rows(function, student_hidden, student_head, units.student_start, step=chunk_rows, dtype=dtype)
    return reduce_units(losses, reduction, return_unit_losses)


class _SortedDistance:
    """Of the student's rows from the teacher's rows `rows` [R], which stand in the same order."""

    def __init__(self, teacher: LinearRows, rows: Tensor, temperature: float) -> None:
        self.teacher, self.rows, self.temperature = teacher, rows, temperature

    def value(self, logits: Tensor, part: slice) -> Tensor:
        student = self._probabilities(logits).sort(dim=1, descending=True).values
        return self._difference(student, part).abs_().sum(dim=1)

    def gradient(self, logits: Tensor, part: slice) -> Tensor:
        probabilities = self._probabilities(logits)
        ranked, order = probabilities.sort(dim=1, descending=True)
        columns = ranked.shape[1]
        sign = self._difference(ranked, part)[:, :columns].sign_()
        by_probability = torch.empty_like(probabilities).scatter_(1, order, sign)
        centre = (probabilities * by_probability).sum(dim=1, keepdim=True)
        return by_probability.sub_(centre).mul_(probabilities).div_(self.temperature)

    def _difference(self, student: Tensor, part: slice) -> Tensor:  # [r, max(V_s, V_t)]
        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            teacher = self._probabilities(self.teacher.whole(self.rows[part])).sort(dim=1, descending=True).values
        missing = student.shape[1] - teacher.shape[1]
        return F.pad(student, (0, max(0, -missing))) - F.pad(teacher, (0, max(0, missing)))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.div_(self.temperature).softmax(dim=1)
