"""Where the PyTorch backend reads one side's logits from, and where it writes their gradient.

Two sources with one face: `LogitRows` has the logits, `LinearRows` makes them from hidden states and a head. Neither
knows what a unit is. Reads come in the compute dtype (float32, or float64 for float64 inputs); a caller owns what it
reads and may overwrite it. `slope` is the derivative of the values read by the head's raw products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simct_kernels.host import on_host, to_device
from simct_kernels.inputs import LMHead
from simct_kernels.torch_backend.classes import Classes
from simct_kernels.torch_backend.plan import Part

# Products have rows of a multiple of this many elements (128 bytes at 16 bits): an odd K makes them seven times as slow on an
# H100, and denies the kernels their 16-byte accesses.
PAD = 64
_PADDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Pending(Protocol):
    """A gradient that is made when its scale is known."""

    def make(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """scale times the gradient, rounded once, to `dtype`; no scale is 1."""


class Rows(Protocol):
    """[N, V] logits, of which `shared_ids` [K] are the shared vocabulary's columns."""

    shared_ids: Tensor  # int64 [K]
    classes: Classes | None  # of this side, if the shared vocabulary has any: the job says so
    columns: int  # V
    pick_width: int  # elements that one row of `pick` with one column costs

    def shared(self, rows: Tensor) -> Tensor: ...  # [g] -> [g, K]
    def whole(self, rows: Tensor) -> Tensor: ...  # [R] -> [R, V]
    def pick(self, rows: Tensor, ids: Tensor) -> Tensor: ...  # [R], [R, k] -> [R, k]
    def pick_same(self, rows: Tensor, ids: Tensor) -> Tensor: ...  # [R], [k] -> [R, k], ids without repeats
    def slope(self, logits: Tensor) -> Tensor | float: ...  # any shape, of the same shape

    # Each adds a gradient by the logits of the same shape as the read; `rows` must not repeat a row.
    def add_shared(self, rows: Tensor, gradient: Tensor) -> None: ...
    def add_whole(self, rows: Tensor, gradient: Tensor) -> None: ...
    def add_pick(self, rows: Tensor, ids: Tensor, gradient: Tensor) -> None: ...
    def add_pick_same(self, rows: Tensor, ids: Tensor, gradient: Tensor) -> None: ...
    # What the chunks will read, in order. After it a read of `shared` or `whole` may write over the one before it.
    def expect(self, parts: list[Part]) -> None: ...


class LogitRows:
    """Rows of given logits. The gradient has the logits' shape and dtype."""

    pick_width = 1
    classes: Classes | None = None

    def __init__(
        self,
        logits: Tensor,  # [N, V]
        shared_ids: Tensor,  # int64 [K]
        dtype: torch.dtype,
        *,
        needs_grad: bool = False,
    ) -> None:
        self.logits, self.shared_ids, self.dtype = logits.detach(), shared_ids, dtype
        self.columns = logits.shape[1]
        self.gradient = torch.zeros_like(self.logits, memory_format=torch.contiguous_format) if needs_grad else None

    def expect(self, parts: list[Part]) -> None:
        pass

    def shared(self, rows: Tensor) -> Tensor:
        # Rows first, then columns: twice as fast on the CPU as one two-dimensional index.
        return self.logits[rows][:, self.shared_ids].to(self.dtype)

    def whole(self, rows: Tensor) -> Tensor:
        return self.logits[rows].to(self.dtype)

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        return self.logits[rows[:, None], ids].to(self.dtype)

    pick_same = pick

    def slope(self, logits: Tensor) -> float:
        return 1.0

    def add_shared(self, rows: Tensor, gradient: Tensor) -> None:
        selected = self.gradient[rows]
        selected[:, self.shared_ids] += gradient.to(selected.dtype)
        self.gradient[rows] = selected

    def add_whole(self, rows: Tensor, gradient: Tensor) -> None:
        self.gradient[rows] += gradient.to(self.gradient.dtype)

    def add_pick(self, rows: Tensor, ids: Tensor, gradient: Tensor) -> None:
        # A class stands for some shared id with a gradient of 0 (see `take_classes`), which may be among the others: added up.
        self.gradient.index_put_((rows[:, None], ids), gradient.to(self.gradient.dtype), accumulate=True)

    add_pick_same = add_pick


class LinearRows:
    """Rows of head(hidden), made when they are read. Gradients of hidden, weight and bias, in the compute dtype."""

    classes: Classes | None = None

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        head: LMHead,
        shared_ids: Tensor,  # int64 [K]
        dtype: torch.dtype,
        *,
        needs_grad: tuple[bool, bool, bool] = (False, False, False),  # hidden, weight, bias
    ) -> None:
        self.hidden, self.head, self.shared_ids, self.dtype = hidden.detach(), head, shared_ids, dtype
        self.columns, self.width = head.weight.shape
        self.pick_width = self.width
        self._needs_weight = needs_grad[1]
        native = sums_in_float32(hidden.device) and hidden.dtype == head.weight.dtype
        self.operand_dtype = hidden.dtype if native and dtype == torch.float32 else dtype
        self._shared_weight: Tensor | None = None
        self._whole_weight: Tensor | None = None
        self._bias = None if head.bias is None else head.bias.detach().to(dtype)

        zeros = [
            torch.zeros(tensor.shape, dtype=dtype, device=hidden.device) if needed else None
            for tensor, needed in zip((hidden, head.weight, head.bias), needs_grad, strict=True)
        ]
        self.hidden_gradient, self.weight_gradient, self.bias_gradient = zeros
        # The shared rows' gradient is added up apart, in the order of the products, and moved to its place at the end.
        self._shared_weight_gradient: Tensor | None = None

    def shared(self, rows: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias[padded_ids(self.shared_ids)]
        return self._logits(rows, self._shared_head(), bias)[:, : len(self.shared_ids)]

    def whole(self, rows: Tensor) -> Tensor:
        return self._logits(rows, self._whole_head(), self._bias)

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        weight = self.head.weight.detach()[ids].to(self.dtype)  # [R, k, H]
        raw = torch.bmm(weight, self.hidden[rows].to(self.dtype).unsqueeze(2)).squeeze(2)
        return self._finish(raw, None if self._bias is None else self._bias[ids])

    def pick_same(self, rows: Tensor, ids: Tensor) -> Tensor:
        raw = self.hidden[rows].to(self.dtype) @ self.head.weight.detach()[ids].to(self.dtype).T
        return self._finish(raw, None if self._bias is None else self._bias[ids])

    def slope(self, logits: Tensor) -> Tensor | float:
        cap, scale = self.head.softcap, self.head.scale
        if cap is None:
            return scale
        # A candidate left out reads -inf, below what the soft-cap can give; its gradient is 0 and must stay 0.
        return (logits.clamp(min=-cap) / cap).square_().neg_().add_(1).mul_(scale)

    def add_shared(self, rows: Tensor, gradient: Tensor) -> None:
        extra = -len(self.shared_ids) % PAD
        if self._needs_weight and self._shared_weight_gradient is None:
            shape = (len(self.shared_ids) + extra, self.width)
            self._shared_weight_gradient = torch.zeros(shape, dtype=self.dtype, device=gradient.device)
        self._add_products(rows, gradient, self._shared_head, self._shared_weight_gradient, extra)
        if self.bias_gradient is not None:
            self.bias_gradient[self.shared_ids] += gradient.sum(0)

    def add_whole(self, rows: Tensor, gradient: Tensor) -> None:
        self._add_products(rows, gradient, self._whole_head, self.weight_gradient)
        if self.bias_gradient is not None:
            self.bias_gradient += gradient.sum(0)

    def add_pick(self, rows: Tensor, ids: Tensor, gradient: Tensor) -> None:
        if self.hidden_gradient is not None:
            weight = self.head.weight.detach()[ids].to(self.dtype)  # [R, k, H]
            self.hidden_gradient[rows] += torch.bmm(gradient.unsqueeze(1), weight).squeeze(1)
        if self.weight_gradient is not None:
            hidden = self.hidden[rows].to(self.dtype)
            products = gradient.unsqueeze(2) * hidden.unsqueeze(1)  # [R, k, H]
            add_repeated(self.weight_gradient, ids.flatten(), products.flatten(0, 1))
        if self.bias_gradient is not None:
            add_repeated(self.bias_gradient, ids.flatten(), gradient.flatten())

    def add_pick_same(self, rows: Tensor, ids: Tensor, gradient: Tensor) -> None:
        if self.hidden_gradient is not None:
            self.hidden_gradient[rows] += gradient @ self.head.weight.detach()[ids].to(self.dtype)
        if self.weight_gradient is not None:
            self.weight_gradient[ids] += gradient.T @ self.hidden[rows].to(self.dtype)
        if self.bias_gradient is not None:
            self.bias_gradient[ids] += gradient.sum(0)

    def expect(self, parts: list[Part]) -> None:
        """What the chunks will read of this side, in order: a hook for sources that prepare."""

    def gradients(self) -> tuple[Tensor | None, Tensor | Pending | None, Tensor | None]:
        """Of hidden [N, H], weight [V, H] and bias [V]: None where not asked for."""
        if self._shared_weight_gradient is not None:
            self.weight_gradient[self.shared_ids] += self._shared_weight_gradient[: len(self.shared_ids)]
            self._shared_weight_gradient = None
        return self.hidden_gradient, self.weight_gradient, self.bias_gradient

    def _shared_head(self) -> Tensor:  # [K', H]
        if self._shared_weight is None:
            self._shared_weight = self.head.rows(padded_ids(self.shared_ids), self.operand_dtype)
        return self._shared_weight

    def _whole_head(self) -> Tensor:  # [V, H]
        if self._whole_weight is None:
            self._whole_weight = self.head.weight.detach().to(self.operand_dtype)
        return self._whole_weight

    def _logits(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._finish(product(self.hidden[rows].to(self.operand_dtype), weight.T), bias)

    def _finish(self, raw: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            raw += bias
        if self.head.scale != 1:
            raw *= self.head.scale
        if self.head.softcap is not None:
            raw = raw.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return raw

    def _add_products(
        self,
        rows: Tensor,
        gradient: Tensor,
        weight: Callable[[], Tensor],
        weight_gradient: Tensor | None,
        extra: int = 0,  # columns that the gradient is to be padded by
    ) -> None:
        gradient, unit = as_operand(gradient, self.operand_dtype)
        gradient = F.pad(gradient, (0, extra)) if extra else gradient
        if self.hidden_gradient is not None:
            made = product(gradient, weight())
            self.hidden_gradient[rows] += made if unit is None else made * unit
        if weight_gradient is not None:
            hidden = self.hidden[rows].to(self.operand_dtype)
            if self.operand_dtype == self.dtype:
                torch.addmm(weight_gradient, gradient.T, hidden, out=weight_gradient)
            else:
                made = product(gradient.T, hidden)
                weight_gradient += made if unit is None else made.mul_(unit)


def as_operand(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A gradient as a product's operand, and the power of two that the product is to be multiplied by, if any.

    float16 underflows below 6e-8, where the gradient of a student near its teacher lies: the largest element is brought
    to 2^13 or more.
    """
    if dtype != torch.float16:
        return gradient.to(dtype), None
    exponent = torch.frexp(gradient.abs().amax()).exponent - 14
    return torch.ldexp(gradient, -exponent).to(dtype), torch.ldexp(gradient.new_ones(()), exponent)


def padded_ids(ids: Tensor) -> Tensor:
    """int64 [K'], the ids [K], the last one repeated to a multiple of PAD. The same tensor as long as the ids live."""
    if len(ids) % PAD == 0:
        return ids
    if ids not in _PADDED:
        _PADDED[ids] = to_device(repeat_last(on_host(ids)), ids.device)
    return _PADDED[ids]


def repeat_last(ids: Tensor) -> Tensor:
    """[K'], the ids [K], the last one repeated to a multiple of PAD."""
    return torch.cat([ids, ids[-1:].expand(-len(ids) % PAD)])


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Empty [rows, columns], whose rows begin at multiples of PAD elements."""
    return torch.empty(rows, row_size(columns), dtype=dtype, device=device)[:, :columns]


def row_size(columns: int) -> int:
    return -(-columns // PAD) * PAD


def sums_in_float32(device: torch.device) -> bool:
    """Whether 16-bit operands are multiplied into a 32-bit result; where it would be rounded to 16 bits, they are widened."""
    return device.type == "cuda" and torch.version.hip is None


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, in float32 also where the operands are 16-bit (CUDA only: see LinearRows.operand_dtype)."""
    if left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left, right, out=out)


def add_repeated(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """total[index] += values, where an index may come many times: always added in the same order."""
    if total.is_cuda:
        return total.index_put_((index,), values, accumulate=True)  # sorts, where CUDA's index_add_ uses atomics
    return total.index_add_(0, index, values)  # serial, where the CPU's index_put_ uses atomics
