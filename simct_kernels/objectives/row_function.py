"""A scalar of each prediction row's whole logits, differentiable by hidden states and head, a chunk of rows at a time.

What a row's scalar is, the caller says: a `RowFunction`. Its backward makes the logits again instead of keeping them, so that
neither pass holds more than a chunk of [rows, V].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from simct_kernels.inputs import LMHead
from simct_kernels.torch_backend.rows import LinearRows


class RowFunction(Protocol):
    """Both may overwrite `logits`, which is in the compute dtype. `part` is the chunk's place among all the rows."""

    def value(self, logits: Tensor, part: slice) -> Tensor: ...  # [r, V] -> [r]
    def gradient(self, logits: Tensor, part: slice) -> Tensor: ...  # [r, V] -> [r, V], of the values by the logits


def over_rows(
    function: RowFunction,
    hidden: Tensor,  # [N, H]
    head: LMHead,
    rows: Tensor,  # int64 [R], without repeats in a section
    *,
    step: int,
    dtype: torch.dtype,
    sections: Sequence[int] | None = None,
) -> Tensor:
    """[R] in `dtype`: the function of each of `rows`, with gradients to hidden and to the head's weight and bias.

    A row whose upstream gradient is 0 is not computed again: a caller may drop a non-finite value and train on. `sections`: the
    lengths of stretches of rows that the function treats differently; no chunk holds rows of two.
    """
    chunks = list(parts(len(rows), step) if sections is None else _section_parts(sections, step))
    return _OverRows.apply(function, rows, chunks, dtype, head, hidden, head.weight, head.bias)


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, rows, chunks, dtype, head, hidden, weight, bias):
        ctx.function, ctx.chunks, ctx.dtype = function, chunks, dtype
        ctx.head = dataclasses.replace(head, weight=weight.detach(), bias=None if bias is None else bias.detach())
        ctx.save_for_backward(rows, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            source = _source(ctx.head, hidden, dtype)
            values = torch.empty(len(rows), dtype=dtype, device=hidden.device)
            for part in chunks:
                values[part] = function.value(source.whole(rows[part]), part)
        return values

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("this loss cannot be differentiated twice: backward without create_graph=True")
        rows, hidden, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[-3:]
        with torch.autocast(hidden.device.type, enabled=False):
            source = _source(ctx.head, hidden, ctx.dtype, (needed[0], needed[1], bias is not None and needed[2]))
            for part in ctx.chunks:
                # A zero times a NaN would be a NaN in every row of the weight's gradient.
                asked = upstream[part] != 0
                logits = source.whole(rows[part])
                slope = source.slope(logits)
                gradient = ctx.function.gradient(logits, part).mul_(slope).mul_(upstream[part, None])
                keep = asked.nonzero().squeeze(1)
                source.add_whole(rows[part][keep], gradient[keep])
        made = zip(source.gradients(), (hidden, weight, bias), strict=True)
        return None, None, None, None, None, *(None if g is None else g.to(like.dtype) for g, like in made)


def parts(count: int, step: int, first: int = 0) -> Iterator[slice]:
    """The slices of `count` rows from row `first` on, in chunks of `step`."""
    stop = first + count
    return (slice(start, min(start + step, stop)) for start in range(first, stop, step))


def _section_parts(sections: Sequence[int], step: int) -> Iterator[slice]:
    first = 0
    for count in sections:
        yield from parts(count, step, first)
        first += count


def _source(head: LMHead, hidden: Tensor, dtype: torch.dtype, needs_grad=(False, False, False)) -> LinearRows:
    no_shared = torch.empty(0, dtype=torch.int64, device=hidden.device)
    return LinearRows(hidden, head, no_shared, dtype, needs_grad=needs_grad)
