"""Each unit's two softmaxes over its candidates, and their divergence: Eq. 7 to 9 without a stored probability.

`divergence` launches what reads the logits, `candidate_kernel` for the shared columns and, where a score needs log-sum-exps,
`logsumexp_kernel` for the rest of the rows; then `finish_kernel`. Each logit is read once: the first row of a unit is read
over its unshared columns only, because the candidates' statistics hold the sum over the shared ones. The generalised JSD
takes a second pass over the candidates (see scores.MIXED). The gradient is a launch of its own and not a last pass of the
first: the chunk's rows are larger than the L2 cache, so nothing would be read sooner for it, and a grid over rows and
columns balances better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.classes import ClassScores
from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.finish import finish_kernel, mixture_kernel
from simct_kernels.triton_backend.forward import candidate_kernel
from simct_kernels.triton_backend.rows import unit_logsumexp
from simct_kernels.triton_backend.scores import FORWARD, MIXED, REVERSE, Side


@dataclass(frozen=True)
class UnitRows:
    """One side of G units: its logits, and the rows of them that each unit reads."""

    side: Side
    rows: Tensor  # int64 [G], the row of the unit's shared candidates
    start: Tensor  # int64 [G], the first of the unit's rows; equal to `rows` where `unit` is given
    length: Tensor  # int64 [G], their number
    tokens: Tensor | None  # int64 [N], the column of each row's own token, unless the targets are given
    targets: Tensor | None = None  # float32 [N], the logits of the rows' own tokens, where those are no columns
    unit: Tensor | None = None  # int64 [N], each row's unit, -1 for none; None: row g is unit g's, and never read whole
    rest: Tensor | None = None  # int32, see Columns.rest: the columns that are not shared; None: those from K on
    classes: ClassScores | None = None  # float32, on the scale of the logits


@dataclass(frozen=True)
class Candidates:
    """The candidates of G units on both sides."""

    student: UnitRows
    teacher: UnitRows
    size: int  # K
    continues: bool | Tensor  # whether all, none or which (bool or int64 [G]) of the units have a continuation
    left_out: Tensor | None = None  # bool [any, any >= K]; a width that 16 divides is read faster
    left_out_rows: Tensor | None = None  # int64 [G], -1 for none

    @property
    def has_continuation(self) -> Tensor | None:
        return self.continues if isinstance(self.continues, Tensor) else None


@dataclass(frozen=True)
class Units:
    """What is known of G units once their candidates are counted.

    The rows of `state` are the losses; the maximum m and log(sum of e^(score - m)) over the candidates by temperature,
    the student's and the teacher's; KL(q || m), what `score_gradient` needs of it; what the properties name; and the
    continuations' scores by temperature.
    """

    state: Tensor  # float32 [10, G]
    student_logsumexp: Tensor | None  # float32 [N_s], of the rows of longer units; None: no score reads it
    by_class: Tensor | None  # float32 [G, C], the loss's derivative by the student's scores of the classes

    @property
    def losses(self) -> Tensor:
        return self.state[0]

    @property
    def by_continuation(self) -> Tensor:  # [G], the loss's derivative by the student's continuation score
        return self.state[6]

    @property
    def kept(self) -> Tensor:  # [G], 0 where teacher_mass_floor drops the unit, else 1 (or NaN)
        return self.state[7]

    def by_members(self, weights: Tensor | None, classes: ClassScores) -> Tensor:
        """The gradient [G, M] by the logits of the classes' ids, with weights as of `weighted`."""
        return classes.by_members(self.weighted(weights, self.by_class.T).T)

    def weighted(self, weights: Tensor | None, values: Tensor) -> Tensor:
        """values [..., G] times weights [G] (None: 1) and `kept`, and 0 where either is 0, even of NaN."""
        factor = self.kept if weights is None else weights * self.kept
        dropped = self.kept == 0 if weights is None else (self.kept == 0) | (weights == 0)
        return torch.where(dropped, 0.0, factor * values)


def mode_of(beta: float) -> int:
    return {0: FORWARD, 1: REVERSE}.get(beta, MIXED).value


def divergence(candidates: Candidates, options: LossOptions) -> Units:
    """The losses of all units, and what their gradient is made from."""
    student, teacher = candidates.student, candidates.teacher
    count, device = len(student.rows), student.rows.device
    scattered = teacher.side.ids is not None
    shape = tiles.tile("forward_scattered" if scattered else "forward", device)
    splits, each = tiles.splits(count, candidates.size, shape, device)
    mode, temperature, beta = mode_of(options.beta), 1 / options.temperature, float(options.beta)
    drops, continues = options.teacher_mass_floor is not None, candidates.continues is not False
    sums = options.temperature != 1 or candidates.left_out is not None
    student_rest = _rest_of_rows(student, candidates.size, options.normalises, False)
    teacher_rest = _rest_of_rows(teacher, candidates.size, options.normalises, drops)
    partial = torch.empty(10 if sums else 5, splits, count, dtype=torch.float32, device=device)
    units = Units(
        torch.zeros(10, count, dtype=torch.float32, device=device),
        None if student_rest is None else torch.empty_like(student_rest[0]),
        None if student.classes is None else torch.empty_like(student.classes.scores),
    )
    classes = (None,) * 4  # a number in the last's place, though nothing reads it, and ptxas spills for sm_100
    if student.classes is not None:
        classes = student.classes.scores, teacher.classes.scores, units.by_class, units.by_class.shape[1]

    def read(second: bool) -> None:
        candidate_kernel[(triton.cdiv(count, shape.rows) * splits,)](
            partial,
            *_read_arguments(student),
            *_read_arguments(teacher),
            candidates.left_out,
            0 if candidates.left_out is None else candidates.left_out.shape[1],
            candidates.left_out_rows,
            units.state if second else None,
            count,
            candidates.size,
            splits,
            each,
            temperature,
            beta,
            MODE=mode,
            SUMS=sums and not second,
            ROWS=shape.rows,
            BLOCK=shape.block,
            LANES=tiles.threads(shape, device),
            VECTOR=16 // max(student.side.values.element_size(), teacher.side.values.element_size()),
            num_warps=shape.warps,
        )

    read(second=False)
    finish_kernel[(triton.cdiv(count, tiles.UNITS),)](
        units.state,
        partial,
        *_finish_arguments(student, student_rest),
        units.student_logsumexp,
        classes[0],
        *_finish_arguments(teacher, teacher_rest),
        *classes[1:],
        candidates.has_continuation,
        options.teacher_mass_floor,
        count,
        splits,
        temperature,
        beta,
        MODE=mode,
        SUMS=sums,
        LONGER=options.normalises,
        CONTINUES=continues,
        SUM=options.score == "sum_logprob",
        UNITS=tiles.UNITS,
        SPLITS=tiles.SPLITS,
        num_warps=1,  # with two, ptxas spills
    )
    if mode == MIXED:
        read(second=True)
        mixture_kernel[(triton.cdiv(count, tiles.UNITS),)](
            units.state,
            partial,
            *classes,
            count,
            splits,
            temperature,
            beta,
            MODE=mode,
            CONTINUES=continues,
            UNITS=tiles.UNITS,
            SPLITS=tiles.SPLITS,
            num_warps=2,
        )
    return units


def _rest_of_rows(rows: UnitRows, size: int, longer: bool, firsts: bool) -> Tensor | None:
    """float32 [splits, N], see `unit_logsumexp`; None where no row is read whole."""
    if rows.unit is None or not (longer or firsts):
        return None
    return unit_logsumexp(rows.side, rows.unit, rows.length, rows.rows, rows.rest, size, longer=longer, firsts=firsts)


def _read_arguments(rows: UnitRows) -> tuple:
    return *rows.side.arguments(), rows.side.ids, rows.side.bound, rows.rows


def _finish_arguments(rows: UnitRows, rest: Tensor | None) -> tuple:
    own = rows.tokens if rows.targets is None else None
    return (
        *rows.side.arguments(),
        rows.start,
        rows.length,
        own,
        rows.targets,
        rest,
        len(rows.side.values),
        0 if rest is None else len(rest),
    )
