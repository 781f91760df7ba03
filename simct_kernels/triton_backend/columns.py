"""Where the shared tokens lie among one side's columns, in the forms that the kernels read.

Made once for a side's ids and kept as long as they live, on the CPU: see `simct_kernels.host`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simct_kernels.host import on_host, to_device
from simct_kernels.torch_backend.rows import PAD, padded_ids

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Columns:
    ids: Tensor | None  # int32 [K'], as `padded`; None where shared token k is column k
    padded: Tensor  # int64 [K'], the ids, the last one repeated: see padded_ids
    first: int | None  # the first of ids that are consecutive
    host_ids: np.ndarray  # int64 [K], on the CPU
    _index: dict[int, Tensor] = field(default_factory=dict)
    _rest: dict[int, Tensor] = field(default_factory=dict)

    def index(self, width: int) -> Tensor | None:
        """int32 [width], which shared token a column is, -1 for none; None where column k is token k for all K."""
        if self.ids is None:
            return None
        if width not in self._index:
            self._index[width] = to_device(torch.from_numpy(self._host_index(width)), self.ids.device)
        return self._index[width]

    def rest(self, width: int) -> Tensor | None:
        """The columns that are not shared, ascending; None where they are those from K on.

        int32 [width - K] with the last one repeated to a multiple of PAD, as in `padded`.
        """
        if self.ids is None:
            return None
        if width not in self._rest:
            rest = _padded(np.flatnonzero(self._host_index(width) < 0).astype(np.int32))
            self._rest[width] = to_device(torch.from_numpy(rest), self.ids.device)
        return self._rest[width]

    def _host_index(self, width: int) -> np.ndarray:
        index = np.full(width, -1, np.int32)
        index[self.host_ids] = np.arange(len(self.host_ids))
        return index


def columns_of(
    ids: Tensor,  # int64 [K], one side of a SharedVocabulary
) -> Columns:
    if ids not in _kept:
        host = on_host(ids)
        first = int(host[0]) if (np.diff(host) == 1).all() else None
        columns = to_device(torch.from_numpy(_padded(host.astype(np.int32))), ids.device)
        _kept[ids] = Columns(None if first == 0 else columns, padded_ids(ids), first, host)
    return _kept[ids]


def _padded(ids: np.ndarray) -> np.ndarray:
    return np.pad(ids, (0, -len(ids) % PAD), mode="edge") if len(ids) else ids
