"""Which units the PyTorch backend computes together, and which rows of either side they read.

Units that read the same way go together, so that a chunk is uniform: with a continuation or without, and for each side
either the K shared columns only or whole rows. A chunk holds no more elements of a side than its limit allows.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simct_kernels.host import on_host, to_device
from simct_kernels.inputs import AlignedUnits, SharedVocabulary
from simct_kernels.options import LossOptions
from simct_kernels.shared import is_candidate

# Elements of one chunk's matrix of scores: 100 MB on the CPU, where a head's rows are gathered and packed anew for every chunk
# (67 MB took 8 % longer, 134 MB and more gained nothing). The figure for other devices (0.5 GB) has not been measured.
_AUTO_ELEMENTS = {"cpu": 3 << 23}
_AUTO_ELEMENTS_ELSEWHERE = 1 << 27

# Rows of the tiles that matrix products on a GPU are made of: a chunk of one row more pays for the whole tile.
ROW_TILE = 128
# Kinds of unit with a continuation that would read fewer rows than this by themselves are read whole on both sides, with the
# others: student rows of units with one student token, teacher rows of units with one teacher token. A head's shared rows are
# read from memory in the time that a product of some 250 rows with them takes; what whole rows cost in vain is three
# products of the student, but one of the teacher.
MERGE_ROWS = {"cpu": (64, 64)}
MERGE_ROWS_ELSEWHERE = (256, 1024)

# Elements of a chunk that one pass after the other goes over: on the CPU, as many as stay in its cache.
_BLOCK_ELEMENTS = {"cpu": 1 << 17}


@dataclass(frozen=True)
class Part:
    """The R rows of one side that a chunk of g units covers, unit after unit."""

    rows: Tensor  # int64 [R]
    tokens: Tensor  # int64 [R], what the rows predict
    first: Tensor  # int64 [g], where in `rows` each unit begins
    first_rows: Tensor  # int64 [g], rows[first]
    unit: Tensor  # int64 [R], the unit of each row, counted in the chunk
    length: Tensor  # int64 [g], rows of each unit
    whole: bool  # whether it reads the rows' whole vocabulary


@dataclass(frozen=True)
class Chunk:
    units: Tensor  # int64 [g]
    has_continuation: bool
    student: Part
    teacher: Part
    left_out: Tensor | None  # int64 [e, 2], rows (unit counted in the chunk, shared index)


def auto_rows(columns: int, device: torch.device) -> int:
    """The number of rows of `columns` elements that chunk_rows="auto" takes at once: at least 1."""
    return max(1, _elements(device) // columns)


def _elements(device: torch.device) -> int:
    return _AUTO_ELEMENTS.get(device.type, _AUTO_ELEMENTS_ELSEWHERE)


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


def without_dropped(
    hidden: Tensor,  # [N_s, H]
    units: AlignedUnits,
    weights: Tensor,  # [G]
) -> Tensor:
    """The student's hidden states with zeros in the rows of units of weight 0. Never waits for the device.

    Their gradients are zeros, and zero times a NaN there would be a NaN in every row of the head's gradient.
    """
    dropped = (weights == 0).long()
    edges = dropped.new_zeros(len(hidden) + 1).index_add_(0, units.student_start, dropped)
    edges.index_add_(0, units.student_start + units.student_length, -dropped)
    return hidden.masked_fill(edges.cumsum(0)[:-1, None] > 0, 0)


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
    merges: bool = False,  # whether a kind of few rows joins the one that reads whole rows on both sides
) -> list[Chunk]:
    """Sorts the units by the way they read and cuts each kind into chunks, on the CPU, and copies the result once.

    Never waits for a device, but for units or a vocabulary that were made on it. The last plan of some units is kept.
    """
    if len(units) == 0:
        return []
    device = units.student_start.device
    sizes = (shared_width, student_columns, teacher_columns)
    key = (options, *sizes, chunk_rows, student_always_whole, teacher_always_whole, merges, _elements(device))
    candidates = shared.student_ids, shared.teacher_ids, shared.student_classes, shared.teacher_classes
    sources = sources_of(units, *(getattr(units, name) for name in _UNIT_FIELDS), *candidates)
    kept = _KEPT.get(units.student_start)
    if kept is not None and kept[0] == key and all(a is b for a, b in zip(kept[1], sources, strict=True)):
        return kept[2]

    host = {name: on_host(getattr(units, name)) for name in ("student_start", *_UNIT_FIELDS[:-1])}
    continued = has_continuation(host, *(None if ids is None else on_host(ids) for ids in candidates))
    # A side whose realisation is one token scores its continuation on the row of its shared candidates: the row's
    # log-sum-exp is then one constant for all candidates and cancels, as it does in a single unit.
    lengthy = continued & options.normalises
    student_whole = lengthy & (host["student_length"] > 1) | student_always_whole
    teacher_whole = lengthy & (host["teacher_length"] > 1) | teacher_always_whole
    kind = continued * 4 + student_whole * 2 + teacher_whole
    if merges and options.normalises:
        kind = _merge(kind, host["teacher_length"], device)
    order = kind.argsort(stable=True)
    codes, counts = (found.tolist() for found in kind[order].unique_consecutive(return_counts=True))

    cuts = [0]
    for code, count in zip(codes, counts, strict=True):
        begin = cuts[-1]
        members = order[begin : begin + count]
        widths = student_columns if code & 2 else shared_width, teacher_columns if code & 1 else shared_width
        costs = [(torch.ones_like(members), _limit(shared_width, widths, chunk_rows, device))]
        if code & 2:
            costs.append((host["student_length"][members], _limit(student_columns, widths, chunk_rows, device)))
        if code & 1:
            costs.append((host["teacher_length"][members], _limit(teacher_columns, widths, chunk_rows, device)))
        tile = 1 if device.type == "cpu" else ROW_TILE
        cuts += [begin + cut for cut in _cut(costs, tile, chunk_rows == "auto")]
    cuts = torch.tensor(cuts, dtype=torch.int64, device="cpu")

    packed = Packed()
    sides = [_split_side(packed, *(host[f"{side}_{name}"] for name in _SIDE_FIELDS), order, cuts) for side in _SIDES]
    members = [packed.add(part) for part in order.split(cuts.diff().tolist())]
    left_out = _split_left_out(packed, units, options, order, cuts)
    read = packed.read(device)
    chunks = []
    for number, code in enumerate(kind[order[cuts[:-1]]].tolist()):
        student, teacher = (
            Part(*(read(place) for place in side[number]), whole=bool(code & bit))
            for side, bit in zip(sides, (2, 1), strict=True)
        )
        listed = read(left_out[number]).view(-1, 2) if code & 4 and left_out is not None else None
        chunks.append(Chunk(read(members[number]), bool(code & 4), student, teacher, listed))
    _KEPT[units.student_start] = key, sources, chunks
    return chunks


def sources_of(units: AlignedUnits, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What is kept besides under `units.student_start`, to be compared. None for that tensor itself: an entry that held its own key
    would never go."""
    return tuple(None if tensor is units.student_start else tensor for tensor in tensors)


_SIDES, _SIDE_FIELDS = ("student", "teacher"), ("start", "length", "tokens")
# What a plan is made of besides student_start, by which it is kept.
_UNIT_FIELDS = ("student_length", "teacher_start", "teacher_length", "student_tokens", "teacher_tokens", "left_out")
_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def has_continuation(host: dict[str, Tensor], *candidates: Tensor | None) -> Tensor:
    """As `AlignedUnits.has_continuation`."""
    student_token = host["student_tokens"][host["student_start"]]
    teacher_token = host["teacher_tokens"][host["teacher_start"]]
    is_shared = is_candidate(student_token, teacher_token, *candidates)
    return ~(is_shared & (host["student_length"] == 1) & (host["teacher_length"] == 1))


def _merge(kind: Tensor, teacher_length: Tensor, device: torch.device) -> Tensor:
    """Kinds with a continuation and too few rows to be worth a pass over both heads read whole rows on both sides."""
    student_least, teacher_least = MERGE_ROWS.get(device.type, MERGE_ROWS_ELSEWHERE)
    counts = kind.bincount(minlength=8).tolist()
    if sum(count > 0 for count in counts[4:]) < 2:
        return kind
    read_as = list(range(8))
    for code in (4, 5):
        if counts[code] < student_least:
            read_as[code] = 7
    if teacher_length[kind == 6].sum().tolist() < teacher_least:
        read_as[6] = 7
    return torch.tensor(read_as, dtype=torch.int64, device="cpu")[kind]


def _limit(width: int, widths: tuple[int, int], chunk_rows: int | str, device: torch.device) -> int:
    """The number of rows of either side in a chunk whose sides' rows have `widths` elements."""
    if chunk_rows != "auto":
        return chunk_rows
    if device.type == "cpu":
        return auto_rows(width, device)
    rows = max(1, 2 * _elements(device) // sum(widths))
    return rows // ROW_TILE * ROW_TILE or rows


def _cut(costs: list[tuple[Tensor, int]], tile: int, soft: bool) -> list[int]:
    """Where chunks of units end, for costs [g] of a unit and the limit that a chunk's sum of each keeps (but for one unit).

    As few chunks as the limits allow, as even as tiles allow: a last chunk of few rows would be as slow as a full one.
    `soft` limits are passed by less than a tile where that spares a chunk.
    """
    sums = [[0, *cost.cumsum(0).tolist()] for cost, _ in costs]
    number = max(math.ceil(total[-1] / limit) for total, (_, limit) in zip(sums, costs, strict=True))
    heights = [
        min(limit, math.ceil(math.ceil(total[-1] / number) / tile) * tile)
        for total, (_, limit) in zip(sums, costs, strict=True)
    ]
    cuts = _fill(sums, heights)
    if soft and len(cuts) > number:
        fewer = _fill(sums, [height + max(1, min(tile // 2, height // 8)) for height in heights])
        cuts = min(cuts, fewer, key=len)
    return cuts


def _fill(sums: list[list[int]], heights: list[int]) -> list[int]:
    cuts, begin, count = [], 0, len(sums[0]) - 1
    while begin < count:
        ends = (bisect.bisect_right(s, s[begin] + h) - 1 for s, h in zip(sums, heights, strict=True))
        begin = max(begin + 1, min(ends))
        cuts.append(begin)
    return cuts


class Packed:
    """Many int64 vectors on the CPU that travel to a device as one."""

    # Elements: so that each vector begins at a multiple of 256 bytes, as tensors of their own would.
    _ALIGNMENT = 32

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._padding = torch.zeros(self._ALIGNMENT, dtype=torch.int64, device="cpu")
        self._end = 0

    def add(self, part: Tensor) -> slice:
        place = slice(self._end, self._end + len(part))
        padding = -len(part) % self._ALIGNMENT
        self._parts += [part, self._padding[:padding]]
        self._end = place.stop + padding
        return place

    def read(self, device: torch.device) -> Callable[[slice], Tensor]:
        """What gives the vector at a place that `add` returned, on the device."""
        return to_device(torch.cat(self._parts), device).__getitem__


def _split_side(
    packed: Packed, start: Tensor, length: Tensor, tokens: Tensor, order: Tensor, cuts: Tensor
) -> list[list[slice]]:
    """Each chunk's fields of Part on one side."""
    start, length = start[order], length[order]
    end = length.cumsum(0)
    first = end - length
    unit = torch.arange(len(order), dtype=torch.int64, device="cpu").repeat_interleave(length)
    rows = (start - first)[unit] + torch.arange(len(unit), dtype=torch.int64, device="cpu")
    begin, units = _chunk_begins(cuts), cuts.diff().tolist()
    inside = (end[cuts[1:] - 1] - first[cuts[:-1]]).tolist()
    fields = (
        rows.split(inside),
        tokens[rows].split(inside),
        (first - first[begin]).split(units),
        start.split(units),
        (unit - begin[unit]).split(inside),
        length.split(units),
    )
    return [[packed.add(field) for field in part] for part in zip(*fields, strict=True)]


def _chunk_begins(cuts: Tensor) -> Tensor:
    """int64 [G], the place in the order at which each unit's chunk begins."""
    return cuts[:-1].repeat_interleave(cuts.diff())


def _split_left_out(
    packed: Packed, units: AlignedUnits, options: LossOptions, order: Tensor, cuts: Tensor
) -> list[slice] | None:
    """Each chunk's share of `units.left_out`, its units counted in the chunk."""
    if options.candidates != "disjoint" or units.left_out is None:
        return None
    left_out = on_host(units.left_out)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), dtype=torch.int64, device="cpu")
    unit, by_unit = place[left_out[:, 0]].sort(stable=True)
    listed = torch.stack([unit - _chunk_begins(cuts)[unit], left_out[by_unit, 1]], dim=1)
    sizes = torch.searchsorted(unit, cuts).diff().tolist()
    return [packed.add(part.reshape(-1)) for part in listed.split(sizes)]
