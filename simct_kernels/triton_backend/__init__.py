"""SimCT's losses in Triton, for CUDA and ROCm devices (and Triton's interpreter): the protocol of `torch_backend`.

Importing it needs triton. What the kernels do not cover goes to the PyTorch backend: float64, and `top_k`, where what
remains after the choice of columns, a sort, is k columns a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch_backend
from ..inputs import AlignedUnits, LMHead, SharedVocabulary
from ..options import LossOptions
from .linear import LinearJob
from .logits import LogitsLoss


def simct_loss(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, one number if `summed` or else [G], and the units' losses [G] without gradient."""
    arguments = (student_logits, teacher_logits, units, shared, options)
    if not _covers(torch_backend.compute_dtype(student_logits, teacher_logits), units, shared, options):
        return torch_backend.simct_loss(*arguments, summed=summed)
    result = LogitsLoss.apply(*arguments, summed)
    return result if summed else (result, result.detach())


def linear_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,
) -> tuple[Tensor, Tensor]:
    """As `simct_loss`, with the logits of each side made from its hidden states chunk by chunk."""
    dtype = torch_backend.compute_dtype(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)
    job = linear_job(units, shared, options, student_head, teacher_head, chunk_rows, dtype)
    return torch_backend.apply_job(job, summed, student_hidden, student_head.weight, student_head.bias, teacher_hidden)


def linear_job(
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    student_head: LMHead,
    teacher_head: LMHead,
    chunk_rows: int | str,
    dtype: torch.dtype,
) -> torch_backend.LossJob:
    """What `linear_simct_loss` runs below autograd."""
    make = LinearJob if _covers(dtype, units, shared, options) else torch_backend.LossJob
    return make(units, shared, options, student_head, teacher_head, chunk_rows, dtype)


def _covers(dtype: torch.dtype, units: AlignedUnits, shared: SharedVocabulary, options: LossOptions) -> bool:
    chooses = options.top_k is not None and options.top_k < len(shared)
    return dtype == torch.float32 and len(units) > 0 and not chooses
