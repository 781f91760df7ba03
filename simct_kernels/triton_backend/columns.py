"""Where the shared tokens lie among one side's columns, in the forms that the kernels read.

Made once for a side's ids and kept as long as they live: making them waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# A product of rows and shared columns has rows of a multiple of this many elements (128 bytes at 16 bits): an odd K would
# deny the products and the kernels their 16-byte accesses.
_PAD = 64
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Columns:
    ids: Tensor | None  # int32 [K]; None where shared token k is column k
    padded: Tensor  # int64 [K'], the ids, the last one repeated to a multiple of _PAD
    _index: dict[int, Tensor] = field(default_factory=dict)
    _rest: dict[int, Tensor] = field(default_factory=dict)

    def index(self, width: int) -> Tensor | None:
        """int32 [width], which shared token a column is, -1 for none; None where column k is token k for all K."""
        if self.ids is None:
            return None
        if width not in self._index:
            index = torch.full((width,), -1, dtype=torch.int32, device=self.ids.device)
            index[self.ids.long()] = torch.arange(len(self.ids), dtype=torch.int32, device=self.ids.device)
            self._index[width] = index
        return self._index[width]

    def rest(self, width: int) -> Tensor | None:
        """int32 [width - K], the columns that are not shared, ascending; None where they are those from K on."""
        if self.ids is None:
            return None
        if width not in self._rest:
            self._rest[width] = (self.index(width) < 0).nonzero().squeeze(1).int()
        return self._rest[width]


def columns_of(
    ids: Tensor,  # int64 [K], one side of a SharedVocabulary
) -> Columns:
    if ids not in _kept:
        in_order = ids.equal(torch.arange(len(ids), device=ids.device))
        padded = F.pad(ids[None], (0, -len(ids) % _PAD), mode="replicate")[0]
        _kept[ids] = Columns(None if in_order else ids.int(), padded)
    return _kept[ids]
