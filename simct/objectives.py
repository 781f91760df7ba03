"""Which units are compared, and with which loss."""

import warnings

import torch
from torch import Tensor

from simct.config import SimCTConfig
from simct.faults import is_out_of_memory, release_memory
from simct.pair import Alignment
from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss
from simct_kernels.torch_plan import auto_rows

Rows = tuple[Tensor, LMHead]  # hidden rows [N, H] and the head that they belong to


def supervised_units(
    alignment: Alignment, args: SimCTConfig, lengths: list[int], generator: torch.Generator
) -> Alignment:
    """The units that the run supervises, of all that were found. `lengths`: student tokens of each response."""
    if args.units == "single":
        alignment = alignment.single()
    return alignment


def unit_loss(
    student: Rows, teacher: Rows, units: AlignedUnits, shared: SharedVocabulary, args: SimCTConfig
) -> tuple[Tensor, Tensor]:
    """The summed loss of the run's objective, and the units' losses [G], detached.

    Out of memory, it is tried once more with half the rows of logits at a time; RuntimeError says what would fit if that fails too.
    """
    try:
        return _compute(student, teacher, units, shared, args, args.chunk_rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the error holds on to what was allocated.
    rows = args.chunk_rows or auto_rows(student[1].weight.shape[0], student[0].device)
    half = max(1, rows // 2)
    warnings.warn(f"out of memory in the loss with chunk_rows={rows}: once more with {half}", stacklevel=2)
    release_memory(student[0].device)
    try:
        return _compute(student, teacher, units, shared, args, half)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"out of memory in the loss for {len(units.student_start)} units, with chunk_rows {rows} and {half}: set "
            f"chunk_rows to {max(1, half // 2)} or less, or max_tokens_per_batch"
        ) from error


def _compute(student: Rows, teacher: Rows, units, shared, args: SimCTConfig, chunk_rows: int | None):
    rows = "auto" if chunk_rows is None else chunk_rows
    options = {**args.loss_options(), "chunk_rows": rows}
    return linear_simct_loss(*student, *teacher, units, shared, **options, return_unit_losses=True)
