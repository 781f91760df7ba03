"""The losses that users call: they check their arguments, choose a backend and reduce. No mathematics here."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import reference, torch_backend
from .checks import check_chunk_rows, check_hidden, check_ids, check_matrix, check_rows, check_units
from .inputs import AlignedUnits, LMHead, SharedVocabulary
from .options import REDUCTIONS, LossOptions, check_choice

# The one list of backends. Each is a module with `simct_loss` and `linear_simct_loss` as in `reference`.
BACKENDS: dict[str, ModuleType] = {"torch": torch_backend, "reference": reference}


def simct_loss(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    score: str = "mean_logprob",
    candidates: str = "paper",
    top_k: int | None = None,
    teacher_mass_floor: float | None = None,
    reduction: str = "sum",
    backend: str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SimCT's loss (arXiv 2605.07711, Eq. 7 to 9) from both models' logits; the gradient goes to student_logits only.

    As `linear_simct_loss`, which see for the options and errors, for logits after any soft-cap and scale
    (bf16, fp16, fp32 or fp64, each side its own).
    """
    options = LossOptions(beta, temperature, score, candidates, top_k, teacher_mass_floor)
    chosen = _choose_backend(backend)
    check_choice("reduction", reduction, REDUCTIONS)
    check_units(units, shared, options)
    for side, logits in (("student", student_logits), ("teacher", teacher_logits)):
        check_matrix(f"{side}_logits", logits, units)
        check_rows(f"{side}_logits", logits, side, units)
        check_ids(f"{side}_logits", logits.shape[1], side, units, shared)
    summed = reduction != "none"
    loss, unit_losses = chosen.simct_loss(student_logits, teacher_logits, units, shared, options, summed=summed)
    return _reduce(loss, unit_losses, reduction, return_unit_losses)


def linear_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    score: str = "mean_logprob",
    candidates: str = "paper",
    top_k: int | None = None,
    teacher_mass_floor: float | None = None,
    reduction: str = "sum",
    backend: str = "auto",
    chunk_rows: int | str = "auto",
    return_unit_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SimCT's loss (arXiv 2605.07711, Eq. 7 to 9) from last hidden states and output heads, without whole logits.

    Gradients go to student_hidden and to the student head's weight and bias. Hidden states and heads are bf16, fp16,
    fp32 or fp64, each side its own; sums are kept in float32 (float64 if any input is). Double backward is refused.

    Args:
        student_hidden, teacher_hidden: one row for each of `units`' student_tokens and teacher_tokens.
        beta: 0 forward KL(teacher || student), 1 reverse KL, between them the generalised Jensen-Shannon divergence
            beta KL(q_t || m) + (1 - beta) KL(q_s || m) with m = beta q_t + (1 - beta) q_s.
        temperature: divides the scores; the loss is not multiplied by its square.
        score: a continuation's score. "mean_logprob" is the paper's, "sum_logprob" its log-probability; "mean_logit"
            takes raw logits, for it and for the shared candidates, and equals the first only if normalisers agree.
        candidates: "paper", or "disjoint" to leave `units.left_out` out of the units with a continuation.
        top_k: keep of a unit's shared candidates only the student's k most probable, without gradient through the
            choice; the continuation always stays.
        teacher_mass_floor: a unit where the teacher's probability of all candidates is below it has no loss and no
            gradient.
        reduction: "sum", "mean" over units, or "none" for [G].
        backend: "auto", "torch", or "reference" (the slow oracle).
        chunk_rows: how many rows of logits of either side exist at once; a unit is never split. "auto": by memory.
        return_unit_losses: also return the units' losses [G], detached. With "sum" and "mean", whose gradients are made
            in the forward pass, this is cheaper than reduction="none".

    Returns:
        The loss in float32 (float64 if any input is), or (loss, unit_losses). No unit gives a differentiable 0. A NaN
        that a unit reads makes that unit's loss NaN, a candidate that only the other side excludes makes it infinite.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids outside a head's vocabulary, an option out of its
            range, a backend that is not installed.
    """
    options = LossOptions(beta, temperature, score, candidates, top_k, teacher_mass_floor)
    chosen = _choose_backend(backend)
    check_choice("reduction", reduction, REDUCTIONS)
    check_chunk_rows(chunk_rows)
    check_units(units, shared, options)
    sides = (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head))
    for side, hidden, head in sides:
        check_hidden(f"{side}_hidden", hidden, f"{side}_head", head, units)
        check_rows(f"{side}_hidden", hidden, side, units)
        check_ids(f"{side}_head", head.weight.shape[0], side, units, shared)
    loss, unit_losses = chosen.linear_simct_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        units,
        shared,
        options,
        summed=reduction != "none",
        chunk_rows=chunk_rows,
    )
    return _reduce(loss, unit_losses, reduction, return_unit_losses)


def _choose_backend(name: str) -> ModuleType:
    name = "torch" if name == "auto" else name
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not in this installation, which has 'auto', {str(list(BACKENDS))[1:-1]}")
    return BACKENDS[name]


def _reduce(
    loss: Tensor, unit_losses: Tensor, reduction: str, return_unit_losses: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if reduction == "mean":
        loss = loss / max(1, len(unit_losses))
    return (loss, unit_losses) if return_unit_losses else loss
