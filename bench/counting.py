"""What a call reads, writes and multiplies, operation by operation, on tensors without data: no memory and no GPU.

Torch's operations are seen by a dispatch mode, Triton's launches are recorded in place of being started and accounted by
their arguments. Of a device's caches one thing is modelled: what programs that run at the same time want of one row comes
from memory once (the rows that they read at once fit in the L2 cache). Where logits lie scattered, each moves a sector of
32 bytes from that cache, and memory is read in whole sectors too: those in which no wanted column lies are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SECTOR = 32  # bytes
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "resize_"}
_GATHERS = {"index", "index_select", "gather", "embedding"}
_SCATTERS = {"index_put_", "_index_put_impl_", "index_add_", "scatter_", "scatter_add_"}
_PRODUCTS = {"mm", "addmm", "bmm"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select"}


@dataclass(frozen=True)
class Operation:
    """One operation of torch, or one launch of a kernel."""

    name: str
    stage: str
    read: int = 0  # bytes, from memory
    written: int = 0  # bytes
    cached: int = 0  # bytes that move between the L2 cache and the multiprocessors, where they are more
    flops: int = 0  # of a product

    @property
    def moved(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Rows:
    """What a launch's arguments do not say of one side's rows: how many are read."""

    whole: int  # rows that are read whole
    whole_first: int  # of these, rows that a unit begins with


class Counter(TorchDispatchMode):
    """The operations of all calls made inside, and the most that was held at once besides the given tensors.

    Raises what a tensor without data raises where a call looks at one: it would have waited for the device.
    """

    def __init__(
        self, rows: int, widths: set[int], given: dict[int, Rows] | None = None, inputs: tuple[Tensor, ...] = ()
    ) -> None:
        """`rows`: of the student; `widths`: the heads'; `given`: by vocabulary, where logits are given."""
        super().__init__()
        self.operations: list[Operation] = []
        self.waits = self.peak = 0
        self._rows, self._widths, self._given = rows, widths, given
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._inputs = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs, out)) if _is(leaf)]
        if leaves and all(leaf.device.type == "cpu" for leaf in leaves):
            return out  # a plan is made on the CPU: the device has no part in it
        name = func.overloadpacket.__name__
        self._hold(out, (args, kwargs))
        self.waits += name in _WAITS
        if not (func.is_view or name in _FREE):
            self.operations.append(self._operation(func, name, args, kwargs, out))
        return out

    def _hold(self, out, inputs) -> None:
        for leaf in filter(_is, tree_leaves(out)):
            storage = leaf.untyped_storage()
            if storage._cdata not in self._inputs:
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        used = {leaf.untyped_storage()._cdata for leaf in tree_leaves(inputs) if _is(leaf)}
        self._live = {key: kept for key, kept in self._live.items() if key in used or not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))

    def _operation(self, func, name: str, args, kwargs, out) -> Operation:
        written = _bytes(out)
        inputs = [leaf for leaf in tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"})) if _is(leaf)]
        if name in _GATHERS:
            read = written + sum(map(_bytes, inputs[1:]))
        elif name in _SCATTERS:
            read = written = 2 * _bytes(inputs[-1])
        else:
            read = sum({id(leaf): _bytes(leaf) for leaf in inputs}.values())
            if name.endswith("_") and name in {"zero_", "fill_", "copy_", "normal_"}:
                read -= _bytes(inputs[0])
        flops = 0
        if name in _PRODUCTS:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return Operation(name, self._stage(name, args, out), read, written, flops=flops)

    def _stage(self, name: str, args, out) -> str:
        leaf = next((leaf for leaf in tree_leaves(out) if _is(leaf)), None)
        wide = leaf is not None and leaf.dim() == 2 and leaf.shape[1] in self._widths
        if name in _PRODUCTS:
            inner = args[name == "addmm"].shape[-1]
            if not wide or (inner in self._widths and leaf.shape[1] != inner and leaf.shape[0] <= self._rows):
                return "products: logits"
            return "products: gradient of the hidden states" if inner > self._rows else "products: gradient of the head"
        if wide and leaf.shape[0] > self._rows and name in _GATHERS | {"_to_copy"}:
            return "gathers of heads"
        if wide and leaf.shape[0] > 1:
            return "gathers of hidden states" if name in _GATHERS else "gradients put together and rounded"
        return "plan, and small tensors"

    def launch(self, kernel: str, values: dict[str, object]) -> None:
        account = {
            "candidate_kernel": self._candidates,
            "logsumexp_kernel": self._logsumexp,
            "gradient_kernel": self._gradient,
            "combine_kernel": self._combine,
        }
        if kernel in account:
            self.operations.append(account[kernel](values))
        else:  # a few numbers a unit, or entries that are few: what its tensors hold is the most that it moves
            most = sum(_bytes(values[name]) for name in ("partial", "state", "out", "losses") if _is(values.get(name)))
            self.operations.append(Operation(kernel, "tile passes: a few numbers a unit", most))

    def _candidates(self, v: dict) -> Operation:
        sides = [_shared_columns(v, side, v["count"], v["size"]) for side in ("student", "teacher")]
        read, cached = (sum(part) for part in zip(*sides, strict=True))
        return Operation("candidate_kernel", "tile passes: losses", read, _bytes(v["out"]), cached)

    def _logsumexp(self, v: dict) -> Operation:
        count, width, size = v["count"], v["width"], v["values"].element_size()
        rows = Rows(count, 0)
        if v["row_unit"] is not None:
            rows = Rows(count, len(v["first_rows"]))
            if self._given is not None:
                rows = self._given[width]
        read = rows.whole * width * size
        if v["rest"] is None:  # the shared columns come first, and those of a first row are left out
            read -= rows.whole_first * v["size"] * size
        return Operation("logsumexp_kernel", "tile passes: losses", read, _bytes(v["out"]))

    def _gradient(self, v: dict) -> Operation:
        count, units = v["count"], v["unit_count"]
        own = count * v["width"] * v["student"].element_size()
        teacher, cached = _shared_columns(v, "teacher", units, v["size"])
        return Operation("gradient_kernel", "tile passes: gradient", own + teacher, _bytes(v["out"]), own + cached)

    def _combine(self, v: dict) -> Operation:
        read = sum(_bytes(v[name]) for name in ("whole", "shared", "shared_index"))
        return Operation("combine_kernel", "gradients put together and rounded", read, _bytes(v["out"]))


def _shared_columns(v: dict, side: str, rows: int, shared: int) -> tuple[int, int]:
    """Bytes from memory, and from the L2 cache, of the shared columns of some rows."""
    values, ids = v[side], v[f"{side}_ids"] if f"{side}_ids" in v else v["table"]
    size, width = values.element_size(), values.shape[1]
    if ids is None:
        read = rows * min(v[f"{side}_bound"], width) * size
        return read, read
    a_sector = SECTOR // size
    touched = width / a_sector * (1 - (1 - shared / width) ** a_sector) * SECTOR
    # The student's ids ascend: neighbours in a sector are wanted at the same time. The teacher's are in any order.
    return int(rows * touched), int(rows * (touched if side == "student" else shared * SECTOR))


def _is(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _bytes(tree: object) -> int:
    """Of all tensors; an expanded one has no more than its storage."""
    return sum(
        min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())
        for leaf in tree_leaves(tree)
        if _is(leaf)
    )


@contextlib.contextmanager
def pretended_gpu(counter: Counter) -> Iterator[None]:
    """Meta tensors are taken for a GPU's, of 132 multiprocessors; launches go to `counter`."""
    from triton.runtime.jit import JITFunction

    from simct_kernels.torch_backend import rows
    from simct_kernels.triton_backend import tiles

    def record(kernel, *arguments, grid, warmup, **keywords):
        counter.launch(kernel.__name__, dict(zip(kernel.arg_names, arguments, strict=False)) | keywords)

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(tiles, "_multiprocessors", lambda device: 132),
        mock.patch.object(rows, "sums_in_float32", lambda device: True),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
    ):
        yield
