"""Where the shared tokens lie among one side's columns, in the forms that the kernels read.

Made once for a side's ids and kept as long as they live, on the CPU: see `simct_kernels.host`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simct_kernels.host import on_host, to_device
from simct_kernels.torch_backend.rows import padded_ids, repeat_last

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Tables:
    """Of a student's columns: where the gradient finds what belongs to each."""

    teacher: Tensor | None  # int32 [any], the teacher's column of a column's shared token, -1 for none; None: the same
    shared: Tensor | None  # int32 [W], which shared token a column is, -1 for none; None: column k is token k


@dataclass(frozen=True, eq=False)
class Columns:
    ids: Tensor | None  # int32 [K'], as `padded`; None where shared token k is column k
    padded: Tensor  # int64 [K'], the ids, the last one repeated: see padded_ids
    first: int | None  # the first of ids that are consecutive
    host_ids: Tensor  # int64 [K], on the CPU
    _index: dict[int, Tensor] = field(default_factory=dict)
    _rest: dict[int, Tensor] = field(default_factory=dict)
    _teachers: WeakKeyDictionary[Columns, dict[int | None, Tensor]] = field(default_factory=WeakKeyDictionary)

    def index(self, width: int) -> Tensor | None:
        """int32 [width], which shared token a column is, -1 for none; None where column k is token k for all K."""
        if self.ids is None:
            return None
        if width not in self._index:
            self._index[width] = to_device(self._host_index(width), self.ids.device)
        return self._index[width]

    def rest(self, width: int) -> Tensor | None:
        """The columns that are not shared, ascending; None where they are those from K on.

        int32 [width - K] with the last one repeated to a multiple of PAD, as in `padded`.
        """
        if self.ids is None:
            return None
        if width not in self._rest:
            rest = torch.arange(width, dtype=torch.int32, device="cpu")[self._host_index(width) < 0]
            self._rest[width] = to_device(repeat_last(rest), self.ids.device)
        return self._rest[width]

    def toward(self, teacher: Columns, width: int | None) -> Tensor:
        """int32, the teacher's column of a column's shared token, -1 for none: [width], or (None) of the shared tokens [K']."""
        found = self._teachers.setdefault(teacher, {})
        if width not in found:
            ids = teacher.host_ids.int()
            if width is None:
                table = torch.full((len(self.padded),), -1, dtype=torch.int32, device="cpu")
                table[: len(ids)] = ids
            else:
                index = self._host_index(width)
                table = torch.where(index < 0, index, ids[index.clamp(min=0)])
            found[width] = to_device(table, self.padded.device)
        return found[width]

    def _host_index(self, width: int) -> Tensor:
        options = {"dtype": torch.int32, "device": "cpu"}
        index = torch.full((width,), -1, **options)
        index[self.host_ids] = torch.arange(len(self.host_ids), **options)
        return index


def columns_of(
    ids: Tensor,  # int64 [K], one side of a SharedVocabulary
) -> Columns:
    if ids not in _kept:
        host = on_host(ids)
        first = host[0].tolist() if (host.diff() == 1).all().tolist() else None
        columns = to_device(repeat_last(host.int()), ids.device)
        # Not the ids themselves: an entry that held its own key would never go.
        held = padded_ids(ids).detach(), first, host.detach()
        _kept[ids] = Columns(None if first == 0 else columns, *held)
    return _kept[ids]


def tables(
    student: Columns,
    teacher: Columns | None,  # None: its shared columns, in their order, are what is read
    width: int | None,  # of the student's rows; None: likewise
) -> Tables:
    shared = None if width is None else student.index(width)
    if teacher is None or teacher.ids is None:
        return Tables(shared, shared)
    return Tables(student.toward(teacher, None if shared is None else width), shared)
