"""Each unit's two softmaxes over its candidates, and their divergence: Eq. 7 to 9 without a stored probability.

`divergence` launches `forward_kernel`, which reads the logits, and `finish_kernel`; the generalised JSD takes a second such
pair (see scores.MIXED). The gradient is a launch of its own and not a last pass of the first: the rows that the programs of
a GPU hold at once are larger than its L2 cache, so nothing would be read sooner for it, and a grid over rows and columns
balances better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from simct_kernels.options import LossOptions
from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.finish import finish_kernel, mixture_kernel
from simct_kernels.triton_backend.forward import forward_kernel
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
    rest: Tensor | None = None  # int32 [W - K], the columns that are not shared; None: those from K on


@dataclass(frozen=True)
class Candidates:
    """The candidates of G units on both sides."""

    student: UnitRows
    teacher: UnitRows
    size: int  # K
    continues: bool | Tensor  # whether all, none or which [G] of the units have a continuation
    left_out: Tensor | None = None  # bool [any, K]
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

    @property
    def losses(self) -> Tensor:
        return self.state[0]

    @property
    def by_continuation(self) -> Tensor:  # [G], the loss's derivative by the student's continuation score
        return self.state[6]

    @property
    def kept(self) -> Tensor:  # [G], 0 where teacher_mass_floor drops the unit, else 1 (or NaN)
        return self.state[7]

    def weighted(self, weights: Tensor | None, values: Tensor) -> Tensor:
        """values [G] times weights [G] (None: 1) and `kept`, and 0 where either is 0, even of NaN."""
        factor = self.kept if weights is None else weights * self.kept
        dropped = self.kept == 0 if weights is None else (self.kept == 0) | (weights == 0)
        return torch.where(dropped, 0.0, factor * values)


def mode_of(beta: float) -> int:
    return {0: FORWARD, 1: REVERSE}.get(beta, MIXED).value


def divergence(candidates: Candidates, options: LossOptions) -> Units:
    """The losses of all units, and what their gradient is made from."""
    student, teacher = candidates.student, candidates.teacher
    count, device = len(student.rows), student.rows.device
    shape, row_shape = tiles.tile("forward", device), tiles.tile("logsumexp", device)
    splits, each = tiles.splits(count, candidates.size, shape, device)
    mode, temperature, beta = mode_of(options.beta), 1 / options.temperature, float(options.beta)
    drops, continues = options.teacher_mass_floor is not None, candidates.continues is not False
    sums = options.temperature != 1 or candidates.left_out is not None
    student_whole = _Whole.plan(student, options.normalises, row_shape)
    teacher_whole = _Whole.plan(teacher, options.normalises or drops, row_shape)
    partial = torch.empty(10 if sums else 5, splits, count, dtype=torch.float32, device=device)
    units = Units(
        torch.zeros(10, count, dtype=torch.float32, device=device),
        None if student_whole.partial is None else torch.empty_like(student_whole.partial[0]),
    )

    def read(student_whole: _Whole, teacher_whole: _Whole, second: bool) -> None:
        programs = student_whole.programs + teacher_whole.programs + triton.cdiv(count, shape.rows) * splits
        forward_kernel[(programs,)](
            partial,
            student_whole.partial,
            teacher_whole.partial,
            *_forward_arguments(student, student_whole),
            *_forward_arguments(teacher, teacher_whole),
            candidates.left_out,
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
            LONGER=options.normalises,
            FIRST=drops,
            ROWS=shape.rows,
            BLOCK=shape.block,
            ROW_BLOCK=row_shape.block,
            num_warps=shape.warps,
        )

    read(student_whole, teacher_whole, second=False)
    finish_kernel[(triton.cdiv(count, tiles.UNITS),)](
        units.state,
        partial,
        *_finish_arguments(student, student_whole),
        units.student_logsumexp,
        *_finish_arguments(teacher, teacher_whole),
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
        num_warps=2,
    )
    if mode == MIXED:
        read(_Whole(), _Whole(), second=True)
        mixture_kernel[(triton.cdiv(count, tiles.UNITS),)](
            units.state,
            partial,
            count,
            splits,
            temperature,
            beta,
            MODE=mode,
            CONTINUES=continues,
            UNITS=tiles.UNITS,
            num_warps=2,
        )
    return units


@dataclass(frozen=True)
class _Whole:
    """The reading of one side's whole rows: where their log-sum-exps go, and how each is split over programs."""

    partial: Tensor | None = None  # float32 [splits, N]; None: no row is read whole
    splits: int = 0
    tiles: int = 1  # of a split

    @classmethod
    def plan(cls, rows: UnitRows, wanted: bool, shape: tiles.Tile) -> _Whole:
        values = rows.side.values
        if not wanted or rows.unit is None:
            return cls()
        splits, each = tiles.splits(*values.shape, shape, values.device)
        return cls(torch.empty(splits, len(values), dtype=torch.float32, device=values.device), splits, each)

    @property
    def programs(self) -> int:
        return 0 if self.partial is None else self.partial.numel()


def _forward_arguments(rows: UnitRows, whole: _Whole) -> tuple:
    read = whole.partial is not None
    return (
        *rows.side.arguments(),
        rows.side.ids,
        rows.rest if read else None,
        rows.rows,
        rows.unit if read else None,
        rows.length,
        *rows.side.values.shape,
        whole.splits,
        whole.tiles,
    )


def _finish_arguments(rows: UnitRows, whole: _Whole) -> tuple:
    own = rows.tokens if rows.targets is None else None
    return (
        *rows.side.arguments(),
        rows.start,
        rows.length,
        own,
        rows.targets,
        whole.partial,
        len(rows.side.values),
        whole.splits,
    )
