"""Counts what kernels read, write and multiply while Triton's interpreter runs them: their cost, exactly, without a GPU.

    with count_traffic() as traffic:
        simct_loss(..., backend="triton").backward()
    for launch in traffic.launches: ...

Needs TRITON_INTERPRET=1 from before the backend was imported. An element that is masked out is not counted. How often an
address is asked for is counted apart from how many different ones are: the former is what would cross to device memory
without caches, the latter what must. A GPU moves sectors of 32 bytes, so that an access to scattered elements moves more
than it asks for: what each single load or store touches of them is counted too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

_SECTOR = 32  # bytes


@dataclass
class Access:
    """What one launch does to one tensor."""

    bytes: int = 0  # of all accesses
    distinct: int = 0  # bytes of the different elements
    sectors: int = 0  # bytes of the sectors that each load or store touches


@dataclass
class Launch:
    """One launch: what it reads and writes by the kernel's parameters. An atomic update does both."""

    kernel: str
    programs: int
    read: dict[str, Access] = field(default_factory=dict)
    written: dict[str, Access] = field(default_factory=dict)
    products: int = 0  # multiply-adds of its dots


@dataclass
class Traffic:
    launches: list[Launch] = field(default_factory=list)

    def of(self, kernel: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.kernel == kernel]

    def read(self, *parameters: str) -> int:
        """Bytes of all reads of these parameters, in all launches; of all tensors if none is named."""
        return _total([launch.read for launch in self.launches], parameters)

    def written(self, *parameters: str) -> int:
        return _total([launch.written for launch in self.launches], parameters)


def _total(accesses: list[dict[str, Access]], parameters: tuple[str, ...]) -> int:
    return sum(
        access.bytes for by_name in accesses for name, access in by_name.items() if not parameters or name in parameters
    )


class _Open:
    """A launch that is under way: finds the tensor that an address lies in."""

    def __init__(self, launch: Launch, arguments: dict[str, object]) -> None:
        self.launch = launch
        self.spans = []  # (first address, last address + 1, name, bytes of an element)
        self.seen: dict[tuple[str, str], np.ndarray] = {}
        for name, tensor in arguments.items():
            if isinstance(tensor, Tensor) and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                size = tensor.element_size()
                self.spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size, name, size))

    def note(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        addresses = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].ravel()
        if not addresses.size:
            return
        span = next((span for span in self.spans if span[0] <= addresses[0] < span[1]), None)
        if span is None:
            raise RuntimeError(f"{self.launch.kernel}: an address outside all of its tensors is {kind}")
        begin, end, name, size = span
        if addresses.min() < begin or addresses.max() >= end:
            raise RuntimeError(f"{self.launch.kernel}: {name} is {kind} outside its elements")
        access = getattr(self.launch, kind).setdefault(name, Access())
        access.bytes += addresses.size * size
        access.sectors += len(np.unique(addresses // np.uint64(_SECTOR))) * _SECTOR
        seen = self.seen.setdefault((kind, name), np.zeros((end - begin) // size, dtype=bool))
        seen[(addresses - np.uint64(begin)) // np.uint64(size)] = True

    def close(self) -> None:
        sizes = {name: size for _, _, name, size in self.spans}
        for (kind, name), seen in self.seen.items():
            getattr(self.launch, kind)[name].distinct = int(seen.sum()) * sizes[name]


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts every launch made inside. Raises RuntimeError for an access outside the tensors of its launch."""
    traffic = Traffic()
    current: list[_Open] = []
    builder = interpreter.InterpreterBuilder
    originals = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot")
    }
    run = interpreter.GridExecutor.__call__

    def call(self, *arguments, **keywords):
        grid = (
            self.grid(keywords | dict(zip(self.arg_names, arguments, strict=False)))
            if callable(self.grid)
            else self.grid
        )
        launch = Launch(self.fn.__name__, int(np.prod(grid)))
        opened = _Open(launch, dict(zip(self.arg_names, arguments, strict=False)) | keywords)
        current.append(opened)
        try:
            return run(self, *arguments, **keywords)
        finally:
            current.pop().close()
            traffic.launches.append(launch)

    def load(self, pointers, mask, *rest):
        current[-1].note("read", pointers.data, mask.data)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        current[-1].note("written", pointers.data, mask.data)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        for kind in ("read", "written"):
            current[-1].note(kind, pointers.data, mask.data)
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def dot(self, a, b, *rest):
        current[-1].launch.products += a.data.size * b.data.shape[-1]
        return originals["create_dot"](self, a, b, *rest)

    with contextlib.ExitStack() as stack:
        for name, wrapper in zip(originals, (load, store, atomic, dot), strict=True):
            stack.enter_context(mock.patch.object(builder, name, wrapper))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", call))
        yield traffic
