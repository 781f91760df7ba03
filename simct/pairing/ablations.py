"""The paper's ablations of the units (arXiv 2605.07711): neighbours merged at random, longer units masked.

Both draw one number for each unit, in order, so that a batch cut in any way draws the same for the same unit, given one generator.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from simct.pairing.pair import Alignment

MASKED = "masked_longer_unit"  # a reason in `Alignment.dropped`


def merge_randomly(
    units: Alignment,
    ratio: float,
    generator: torch.Generator | int,
    *,
    response_lengths: Sequence[int],
    end_ids: Sequence[int] = (),
) -> Alignment:
    """Coarser units: each unit is merged with the one before it with the probability `ratio`.

    Only neighbours are merged: of one response, with no row between them on either side. Merges may chain; ratio 1 leaves
    one unit for each unbroken stretch. `dropped` stays as it is, for the rows in units stay the same.

    Args:
        units: as `TokenizerPair.align_batch` returns them, in the order of the text, on the CPU.
        generator: a CPU generator, or a seed.
        response_lengths: the student's tokens of each response of the batch; units do not say where a response starts.
        end_ids: the student's end-of-turn tokens: their units stay apart, or no student would learn to stop.

    Raises:
        ValueError: `ratio` outside [0, 1], lengths that do not add up to the student's rows, units that are not in the order of the
            text, or units with `left_out` (what overlaps with a merged unit is not known here).
    """
    _check_share("ratio", ratio)
    if units.left_out is not None:
        raise ValueError('units.left_out is given: merged units need candidates="paper"')
    lengths = torch.as_tensor(list(response_lengths), dtype=torch.int64)
    if (lengths < 0).any() or int(lengths.sum()) != len(units.student_tokens):
        raise ValueError(
            f"response_lengths add up to {int(lengths.sum())}: expected one length of each response, "
            f"{len(units.student_tokens)} student tokens together"
        )
    for side in "student", "teacher":
        backwards = getattr(units, f"{side}_start").diff() < 0
        if backwards.any():
            raise ValueError(
                f"units.{side}_start must ascend with the text, it falls after unit {int(backwards.nonzero()[0])}"
            )
    drawn = torch.rand(len(units), generator=_generator(generator)) < ratio
    if len(units) == 0:
        return units
    start, stop = units.student_start, units.student_start + units.student_length
    teacher_start, teacher_stop = units.teacher_start, units.teacher_start + units.teacher_length
    response = torch.searchsorted(lengths.cumsum(0), start, right=True)
    ends = torch.isin(units.student_tokens[start], torch.tensor(list(end_ids), dtype=torch.int64))
    mergeable = (start[1:] == stop[:-1]) & (teacher_start[1:] == teacher_stop[:-1]) & (response[1:] == response[:-1])
    mergeable &= ~(ends[1:] | ends[:-1])
    opens = torch.ones(len(units), dtype=torch.bool)
    opens[1:] = ~(drawn[1:] & mergeable)
    closes = torch.ones_like(opens)
    closes[:-1] = opens[1:]
    return replace(
        units,
        student_start=start[opens],
        student_length=stop[closes] - start[opens],
        teacher_start=teacher_start[opens],
        teacher_length=teacher_stop[closes] - teacher_start[opens],
    )


def mask_longer(units: Alignment, share: float, generator: torch.Generator | int) -> Alignment:
    """Leaves out each unit that is not one token on each side with the probability `share`.

    The student's tokens in them are counted in `dropped["masked_longer_unit"]`. `generator`: a CPU generator, or a seed.

    Raises ValueError for a `share` outside [0, 1].
    """
    _check_share("share", share)
    drawn = torch.rand(len(units), generator=_generator(generator)) < share
    longer = (units.student_length > 1) | (units.teacher_length > 1)
    masked = longer & drawn
    if not masked.any():
        return units
    dropped = Counter(units.dropped)
    dropped[MASKED] += int(units.student_length[masked].sum())
    return replace(units.select(~masked), dropped=dict(dropped))


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: expected a number in [0, 1]")


def _generator(generator: torch.Generator | int) -> torch.Generator:
    return generator if isinstance(generator, torch.Generator) else torch.Generator().manual_seed(generator)
