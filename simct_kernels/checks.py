"""Checks of a call's arguments against one another.

None of them reads a tensor's data, so that a call never waits for a GPU on their account: what must be read was read
when SharedVocabulary and AlignedUnits were built.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.objectives.prefix_tables import PrefixTables
from simct_kernels.options import LossOptions, check_chunk_rows, check_reduction, check_temperature
from simct_kernels.values import check_float, check_type, describe, is_dense


def check_units(units: AlignedUnits, shared: SharedVocabulary) -> None:
    check_type("units", units, AlignedUnits, "AlignedUnits")
    check_type("shared", shared, SharedVocabulary, "a SharedVocabulary")
    if shared.student_ids.device != units.student_start.device:
        raise ValueError(f"shared is on {shared.student_ids.device}, but units are on {units.student_start.device}")
    if units.max_left_out >= len(shared):
        raise ValueError(f"units.left_out names shared index {units.max_left_out}, but shared has {len(shared)} pairs")


def check_unit_loss(
    student_hidden: Tensor,
    student_head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    units: AlignedUnits,
    temperature: float,
    reduction: str,
    chunk_rows: int | str,
    return_unit_losses: bool,
) -> tuple[LMHead, LMHead]:
    """What a loss without a shared vocabulary reads. Returns both heads, gathered if they are sharded: see `whole_head`."""
    check_reduction(reduction, return_unit_losses)
    check_temperature(temperature)
    check_chunk_rows(chunk_rows)
    check_type("units", units, AlignedUnits, "AlignedUnits")
    heads = whole_head("student_head", student_head), whole_head("teacher_head", teacher_head)
    for side, hidden, head in zip(("student", "teacher"), (student_hidden, teacher_hidden), heads, strict=True):
        check_hidden(f"{side}_hidden", hidden, f"{side}_head", head, units)
        check_rows(f"{side}_hidden", hidden, side, units)
    return heads


def check_tokens(name: str, head: LMHead, side: str, units: AlignedUnits) -> None:
    """Refuses units whose tokens the head has no row for."""
    vocabulary, largest = head.weight.shape[0], getattr(units, f"max_{side}_token")
    if largest >= vocabulary:
        raise ValueError(f"units.{side}_tokens holds id {largest}, outside the {vocabulary} ids of {name}")


def check_tables(tables: PrefixTables, student_head: LMHead, teacher_head: LMHead, units: AlignedUnits) -> None:
    """Refuses tables of other vocabularies than the heads'."""
    check_type("tables", tables, PrefixTables, "PrefixTables", ": see PrefixTables.build")
    if tables.home.device != units.student_start.device:
        raise ValueError(f"tables is on {tables.home.device}, but units are on {units.student_start.device}")
    for side, head in (("student", student_head), ("teacher", teacher_head)):
        size, rows = getattr(tables, f"{side}_size"), head.weight.shape[0]
        if size != rows:
            raise ValueError(
                f"tables was built of {size} {side} tokens, but {side}_head.weight has {rows} rows: "
                f"expected {side}_bytes with one entry a row, None where no token stands"
            )


def check_left_out(units: AlignedUnits, shared: SharedVocabulary, options: LossOptions) -> None:
    """The one check that may wait for a GPU, and cannot be traced: in the misuse that it looks for only."""
    if options.candidates == "disjoint" and units.left_out is None and units.has_continuation(shared).any():
        raise ValueError('units.left_out is None, but candidates="disjoint" needs it where a unit has a continuation')


def check_hidden(name: str, hidden: Tensor, head_name: str, head: LMHead, units: AlignedUnits | None = None) -> None:
    """Refuses hidden states that are not [N, H] floating point beside the head, on the device of `units`."""
    check_type(head_name, head, LMHead, "an LMHead", ": see LMHead.from_model")
    check_matrix(name, hidden, units)
    if hidden.device != head.weight.device:
        raise ValueError(f"{name} is on {hidden.device}, but {head_name}.weight is on {head.weight.device}")
    if hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} has {hidden.shape[1]} columns, but {head_name}.weight is {list(head.weight.shape)}: "
            f"expected {head.weight.shape[1]}"
        )


def whole_head(name: str, head: LMHead) -> LMHead:
    """The head, gathered if it is sharded and frozen. Raises ValueError for a sharded head that is trained.

    How the gradient of a gathered weight is to be summed over the ranks depends on what the ranks are to each other,
    which only the caller knows.
    """
    check_type(name, head, LMHead, "an LMHead", ": see LMHead.from_model")
    tensors = {"weight": head.weight, "bias": head.bias}
    sharded = {part: tensor for part, tensor in tensors.items() if hasattr(tensor, "full_tensor")}
    if not sharded:
        return head
    for part, tensor in sharded.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}.{part} is a DTensor that needs a gradient: compute the loss where FSDP holds the head unsharded "
                "(inside the wrapped module's forward, or between its unshard() and reshard()), or pass "
                f"{part}.full_tensor(grad_placements=...) with the placement of your ranks' gradients"
            )
    return dataclasses.replace(head, **{part: tensor.full_tensor() for part, tensor in sharded.items()})


def check_served(ids: Tensor, logprobs: Tensor, units: AlignedUnits) -> None:
    """Refuses what is not [N_t, k] ids and log-probabilities."""
    if not is_dense(ids) or ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"teacher_topk_ids must be int64 [N_t, k] with k >= 1, got {describe(ids)}")
    if ids.device != units.student_start.device:
        raise ValueError(f"teacher_topk_ids is on {ids.device}, but units are on {units.student_start.device}")
    check_rows("teacher_topk_ids", ids, "teacher", units)
    check_matrix("teacher_topk_logprobs", logprobs, units)
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"teacher_topk_logprobs must be {list(ids.shape)} as teacher_topk_ids, got {list(logprobs.shape)}"
        )


def check_token_logprobs(logprobs: Tensor, units: AlignedUnits) -> None:
    """Refuses what is not the [N_t] log-probabilities of the teacher's tokens."""
    name = "teacher_token_logprobs"
    if not is_dense(logprobs) or logprobs.dim() != 1:
        raise ValueError(f"{name} must be [N_t] = [{len(units.teacher_tokens)}], got {describe(logprobs)}")
    check_matrix(name, logprobs[:, None], units)
    check_rows(name, logprobs, "teacher", units)


def check_matrix(name: str, matrix: Tensor, units: AlignedUnits | None) -> None:
    if not is_dense(matrix) or not matrix.is_floating_point() or matrix.dim() != 2:
        raise ValueError(f"{name} must be a floating point tensor of two dimensions, got {describe(matrix)}")
    if hasattr(matrix, "full_tensor"):
        raise ValueError(f"{name} is a DTensor: pass this rank's rows, {name}.to_local(), or {name}.full_tensor()")
    check_float(name, matrix)
    if units is not None and matrix.device != units.student_start.device:
        raise ValueError(f"{name} is on {matrix.device}, but units are on {units.student_start.device}")


def check_rows(name: str, matrix: Tensor, side: str, units: AlignedUnits) -> None:
    rows = len(getattr(units, f"{side}_tokens"))
    if matrix.shape[0] != rows:
        raise ValueError(
            f"{name} has {matrix.shape[0]} rows, but units.{side}_tokens has {rows}: expected one row each"
        )


def check_ids(name: str, vocabulary: int, side: str, units: AlignedUnits, shared: SharedVocabulary) -> None:
    for owner, largest in (
        (f"shared.{side}_ids", getattr(shared, f"max_{side}_id")),
        (f"shared.{side}_classes", getattr(shared, f"max_{side}_class_id")),
        (f"units.{side}_tokens", getattr(units, f"max_{side}_token")),
    ):
        if largest >= vocabulary:
            raise ValueError(f"{owner} holds id {largest}, outside the {vocabulary} ids of {name}")
