"""Which units are compared, and with which loss."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from simct.console import console
from simct.models.out_of_memory import is_out_of_memory, release_memory
from simct.pairing.ablations import mask_longer, merge_randomly
from simct.pairing.coverage import digits_differ
from simct.pairing.pair import Alignment, TokenizerPair
from simct.teachers.local import Rows, ServedRows
from simct.teachers.served import ServedTeacher
from simct.training.collector import Scorer
from simct.training.config import SimCTConfig
from simct_kernels import AlignedUnits, alm_loss, bpm_loss, escd_loss, linear_simct_loss, topk_simct_loss, uld_loss
from simct_kernels.torch_backend.plan import auto_rows

DIGITS = (
    "the student writes digits one by one and the teacher in groups, on which SimCT's loss collapsed in small models"
)
# Objectives that read whole rows of logits. Their automatic chunk's matrices, and those that were counted at once on demo sizes.
WHOLE_ROWS = {"uld": (4, 11), "alm": (2, 3), "bpm": (7, 7), "escd": (7, 7)}


def settle_objective(args: SimCTConfig, pairs: Iterable[tuple[TokenizerPair, bool]]) -> str:
    """Puts what "auto" becomes into `args`, where it is the same for all teachers. Returns a line to begin the run with; empty
    where nothing is to be said.

    `pairs`: each teacher's, and whether it is served.
    """
    pairs = list(pairs)
    found = {args.objective_for(pair, served=served) for pair, served in pairs}
    chosen = args.objective == "auto"
    if chosen and len(found) == 1:
        (args.objective,) = found
    if not any(digits_differ(pair) for pair, _ in pairs):
        return ""
    if chosen and "escd" in found:
        return f"Objective: escd, as {DIGITS} (docs/evidence.md); --objective simct is the paper's."
    if "simct" in found:
        other = "" if any(served for _, served in pairs) else ", and --objective auto takes escd"
        return f"Note: {DIGITS} (docs/evidence.md): forward_kl_per_byte and accuracy would tell{other}."
    return ""


def say_objective(args: SimCTConfig, scorers: Mapping[str, Scorer]) -> None:
    """`settle_objective` for a run; its first process prints the line."""
    pairs = [(scorer.pair, isinstance(scorer.teacher, ServedTeacher)) for scorer in scorers.values()]
    line = settle_objective(args, pairs)
    if line and args.process_index == 0:
        console.print(line, highlight=False, soft_wrap=True)


def supervised_units(
    alignment: Alignment, args: SimCTConfig, lengths: list[int], end_ids: Sequence[int], generator: torch.Generator
) -> Alignment:
    """The units that the run supervises, of all that were found.

    `lengths`: student tokens of each response; `end_ids`: the student's ends of turn; `generator`: what is random is drawn from it,
    a number for each unit, in order.
    """
    if args.units == "single":
        alignment = alignment.single()
    elif args.units == "merged":
        options = dict(response_lengths=lengths, end_ids=end_ids)
        alignment = merge_randomly(alignment, args.merge_ratio, generator, **options)
    return mask_longer(alignment, args.mask_longer, generator) if args.mask_longer else alignment


def unit_loss(
    student: Rows,
    teacher: Rows | ServedRows,
    units: AlignedUnits,
    lengths: list[int],
    scorer: Scorer,
    args: SimCTConfig,
) -> tuple[Tensor, Tensor]:
    """The summed loss of the run's objective, and the units' losses [G], detached.

    `lengths`: student tokens of each response. Out of memory, it is tried once more with half the rows of logits at a time;
    RuntimeError says what would fit if that fails too.
    """
    try:
        return _compute(student, teacher, units, lengths, scorer, args, args.chunk_rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the error holds on to what was allocated.
    rows = args.chunk_rows or _auto_rows(student, teacher, scorer.objective)
    half = max(1, rows // 2)
    warnings.warn(f"out of memory in the loss with chunk_rows={rows}: once more with {half}", stacklevel=2)
    release_memory(student[0].device)
    try:
        return _compute(student, teacher, units, lengths, scorer, args, half)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"out of memory in the loss for {len(units.student_start)} units, with chunk_rows {rows} and {half}: set "
            f"chunk_rows to {max(1, half // 2)} or less, or max_tokens_per_batch"
        ) from error


def _auto_rows(student: Rows, teacher: Rows | ServedRows, objective: str) -> int:
    """What chunk_rows="auto" meant: of more matrices at once, fewer rows."""
    columns = student[1].weight.shape[0]
    if objective in WHOLE_ROWS:
        columns = WHOLE_ROWS[objective][0] * max(columns, teacher[1].weight.shape[0])
    return auto_rows(columns, student[0].device)


def _compute(student: Rows, teacher, units, lengths, scorer: Scorer, args: SimCTConfig, chunk_rows: int | None):
    rows = "auto" if chunk_rows is None else chunk_rows
    if scorer.objective == "simct":
        options = {**args.loss_options(), "chunk_rows": rows, "return_unit_losses": True}
        if isinstance(teacher, ServedRows):
            served = (teacher.topk_ids, teacher.topk_logprobs, teacher.token_logprobs)
            return topk_simct_loss(*student, *served, units, scorer.shared, **options)
        return linear_simct_loss(*student, *teacher, units, scorer.shared, **options)
    given = (*student, *teacher, units)
    options = dict(temperature=args.loss_temperature, chunk_rows=rows, return_unit_losses=True)
    if scorer.objective == "bpm":
        return bpm_loss(*given, scorer.tables, **options)
    if scorer.objective == "escd":
        return escd_loss(*given, scorer.tables, lengths, **options)
    return {"uld": uld_loss, "alm": alm_loss}[scorer.objective](*given, **options)
