"""SimCT's losses in Triton, for CUDA and ROCm devices (and Triton's interpreter): the protocol of `torch_backend`.

Importing it needs triton. What the kernels do not cover goes to the PyTorch backend: float64, and calls without a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simct_kernels import torch_backend
from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions
from simct_kernels.triton_backend.linear import LinearJob
from simct_kernels.triton_backend.logits import LogitsLoss
from simct_kernels.triton_backend.sparse import ServedJob, TopKJob


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
    dtype = torch_backend.compute_dtype(student_logits, teacher_logits)
    if not _covers(dtype, units):
        return torch_backend.simct_loss(*arguments, summed=summed)
    if _chooses(options, shared):
        job = TopKJob(units, shared, options, None, None, "auto", dtype)
        return torch_backend.apply_job(job, summed, student_logits, None, None, teacher_logits)
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
    make = torch_backend.LossJob
    if _covers(dtype, units):
        make = TopKJob if _chooses(options, shared) else LinearJob
    return make(units, shared, options, student_head, teacher_head, chunk_rows, dtype)


def topk_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_topk_ids: Tensor,  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor,  # [N_t, k]
    teacher_token_logprobs: Tensor,  # [N_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,
) -> tuple[Tensor, Tensor]:
    """As `simct_loss`, for a served teacher."""
    dtype = torch_backend.compute_dtype(student_hidden, student_head.weight)
    job = topk_job(units, shared, options, student_head, teacher_topk_ids, teacher_topk_logprobs, chunk_rows, dtype)
    head = student_head.weight, student_head.bias
    return torch_backend.apply_job(job, summed, student_hidden, *head, teacher_token_logprobs)


def topk_job(
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    student_head: LMHead,
    teacher_topk_ids: Tensor,  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor,  # [N_t, k]
    chunk_rows: int | str,
    dtype: torch.dtype,
) -> torch_backend.topk_job:
    """What `topk_simct_loss` runs below autograd."""
    make = ServedJob if _covers(dtype, units) else torch_backend.topk_job
    served = teacher_topk_ids, teacher_topk_logprobs
    return make(units, shared, options, student_head, *served, chunk_rows, dtype)


def _covers(dtype: torch.dtype, units: AlignedUnits) -> bool:
    return dtype == torch.float32 and len(units) > 0


def _chooses(options: LossOptions, shared: SharedVocabulary) -> bool:
    return options.top_k is not None and options.top_k < len(shared) + shared.class_count
