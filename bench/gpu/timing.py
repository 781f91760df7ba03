"""Milliseconds and peak bytes of a call: by device events on a GPU, by the clock in a rehearsal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

L2_BYTES = 1 << 28  # more than any second-level cache: written between two calls, so that each starts cold


@dataclass(frozen=True)
class Times:
    ms: tuple[float, ...]

    def row(self) -> dict[str, float]:
        return {"median_ms": self.median, "min_ms": min(self.ms), "max_ms": max(self.ms), "repeats": len(self.ms)}

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def times(call: Callable[[], object], device: str, *, seconds: float, most: int = 20, warm: int = 2) -> Times:
    """At least two timed calls, and as many of `most` as fit into `seconds`."""
    for _ in range(warm):
        call()
    if device != "cuda":
        return Times(tuple(_by_clock(call) for _ in range(2)))
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    spans: list[float] = []
    while len(spans) < 2 or (len(spans) < most and sum(spans) < 1e3 * seconds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end))
    return Times(tuple(spans))


def _by_clock(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """The most that a call had allocated above what was there before it."""
    if device != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
