"""Which units the PyTorch backend computes together, and which rows of either side they read.

Units that read the same way go together, so that a chunk is uniform: with a continuation or without, and for each side
either the K shared columns only or whole rows. A chunk holds no more elements of a side than its limit allows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels.inputs import AlignedUnits, SharedVocabulary
from simct_kernels.options import LossOptions

# Elements of one chunk's matrix of scores: 67 MB on the CPU, where a head's rows are gathered anew for every chunk. The figure for
# other devices (0.5 GB) has not been measured.
_AUTO_ELEMENTS = {"cpu": 1 << 24}
_AUTO_ELEMENTS_ELSEWHERE = 1 << 27

# Elements of a chunk that one pass after the other goes over: on the CPU, as many as stay in its cache.
_BLOCK_ELEMENTS = {"cpu": 1 << 20}


@dataclass(frozen=True)
class Part:
    """The R rows of one side that a chunk of g units covers, unit after unit."""

    rows: Tensor  # int64 [R]
    tokens: Tensor  # int64 [R], what the rows predict
    first: Tensor  # int64 [g], where in `rows` each unit begins
    unit: Tensor  # int64 [R], the unit of each row, counted in the chunk
    length: Tensor  # int64 [g], rows of each unit
    whole: bool  # whether it reads the rows' whole vocabulary

    @property
    def first_rows(self) -> Tensor:  # int64 [g]
        return self.rows[self.first]


@dataclass(frozen=True)
class Chunk:
    units: Tensor  # int64 [g]
    has_continuation: bool
    student: Part
    teacher: Part
    left_out: Tensor | None  # int64 [e, 2], rows (unit counted in the chunk, shared index)


def auto_rows(columns: int, device: torch.device) -> int:
    """The number of rows of `columns` elements that chunk_rows="auto" takes at once: at least 1."""
    return max(1, _AUTO_ELEMENTS.get(device.type, _AUTO_ELEMENTS_ELSEWHERE) // columns)


def row_blocks(count: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Cuts `count` rows of `columns` elements into blocks for passes that need temporaries of their size."""
    limit = max(1, _BLOCK_ELEMENTS.get(device.type, count * columns) // columns)
    for start in range(0, count, limit):
        yield slice(start, min(start + limit, count))


def unit_blocks(part: Part, columns: int) -> Iterator[tuple[slice, slice]]:
    """As `row_blocks` for the rows of a chunk's units, none of them split: the units of a block, and their rows."""
    if part.rows.device.type not in _BLOCK_ELEMENTS:  # one block, without waiting for the device
        yield slice(0, len(part.first)), slice(0, len(part.rows))
        return
    first = [*part.first.tolist(), len(part.rows)]
    begin = 0
    for unit in range(1, len(first)):
        last = unit == len(first) - 1
        if last or (first[unit + 1] - first[begin]) * columns > _BLOCK_ELEMENTS[part.rows.device.type]:
            yield slice(begin, unit), slice(first[begin], first[unit])
            begin = unit


def plan_chunks(
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    shared_width: int,  # elements that a row costs where only shared columns are read
    student_columns: int,  # V_s
    teacher_columns: int,  # V_t
    chunk_rows: int | str,
    student_always_whole: bool = False,  # whether every unit's rows are read whole, also where a score needs less
    teacher_always_whole: bool = False,
) -> list[Chunk]:
    """Sorts the units by the way they read and cuts each kind into chunks. Waits for the device once."""
    if len(units) == 0:
        return []
    device = units.student_start.device
    has_continuation = units.has_continuation(shared)
    # A side whose realisation is one token scores its continuation on the row of its shared candidates: the row's
    # log-sum-exp is then one constant for all candidates and cancels, as it does in a single unit.
    student_whole = has_continuation & (units.student_length > 1) & options.normalises | student_always_whole
    teacher_whole = has_continuation & (units.teacher_length > 1) & options.normalises | teacher_always_whole
    kind = has_continuation * 4 + student_whole * 2 + teacher_whole
    order = kind.argsort(stable=True)
    kinds, student_lengths, teacher_lengths = torch.stack(
        [kind[order], units.student_length[order], units.teacher_length[order]]
    ).tolist()

    def limit(width: int) -> int:
        return auto_rows(width, device) if chunk_rows == "auto" else chunk_rows

    student_limit, teacher_limit = limit(student_columns), limit(teacher_columns)
    # As few chunks as the limit allows, of units as many each: a last chunk of few rows would be as slow as a full one.
    shared_limit = limit(shared_width)
    even = {code: math.ceil(count / math.ceil(count / shared_limit)) for code, count in Counter(kinds).items()}
    cuts, student_rows, teacher_rows = [0], 0, 0
    for place, code in enumerate(kinds):
        more_student = student_lengths[place] if code & 2 else 0
        more_teacher = teacher_lengths[place] if code & 1 else 0
        full = (
            place - cuts[-1] >= even[code]
            or student_rows + more_student > student_limit
            or teacher_rows + more_teacher > teacher_limit
        )
        if place > cuts[-1] and (full or code != kinds[place - 1]):
            cuts.append(place)
            student_rows = teacher_rows = 0
        student_rows += more_student
        teacher_rows += more_teacher
    cuts.append(len(kinds))

    student = (units.student_start, units.student_length, units.student_tokens)
    teacher = (units.teacher_start, units.teacher_length, units.teacher_tokens)
    left_out = _split_left_out(units, options, order, cuts)
    chunks = []
    for number, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        members, code = order[begin:end], kinds[begin]
        chunks.append(
            Chunk(
                units=members,
                has_continuation=bool(code & 4),
                student=_part(*student, members, sum(student_lengths[begin:end]), bool(code & 2)),
                teacher=_part(*teacher, members, sum(teacher_lengths[begin:end]), bool(code & 1)),
                left_out=left_out[number] if code & 4 else None,
            )
        )
    return chunks


def _part(start: Tensor, length: Tensor, tokens: Tensor, members: Tensor, size: int, whole: bool) -> Part:
    start, length = start[members], length[members]
    first = length.cumsum(0) - length
    # The size is known here: without it repeat_interleave would wait for the device.
    unit = torch.repeat_interleave(torch.arange(len(members), device=start.device), length, output_size=size)
    rows = (start - first)[unit] + torch.arange(size, device=start.device)
    return Part(rows=rows, tokens=tokens[rows], first=first, unit=unit, length=length, whole=whole)


def _split_left_out(
    units: AlignedUnits, options: LossOptions, order: Tensor, cuts: list[int]
) -> list[Tensor] | list[None]:
    """Each chunk's share of `units.left_out`, its units counted in the chunk."""
    if options.candidates != "disjoint" or units.left_out is None:
        return [None] * (len(cuts) - 1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    unit, by_unit = place[units.left_out[:, 0]].sort(stable=True)
    index = units.left_out[by_unit, 1]
    bounds = torch.searchsorted(unit, torch.tensor(cuts, device=unit.device)).tolist()
    return [
        torch.stack(
            [unit[bounds[number] : bounds[number + 1]] - cut, index[bounds[number] : bounds[number + 1]]], dim=1
        )
        for number, cut in enumerate(cuts[:-1])
    ]
