"""Which units are compared, and with which loss."""

import torch
from torch import Tensor

from simct.config import SimCTConfig
from simct.pair import Alignment
from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss

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
    """The summed loss of the run's objective, and the units' losses [G], detached."""
    return linear_simct_loss(*student, *teacher, units, shared, **args.loss_options(), return_unit_losses=True)
