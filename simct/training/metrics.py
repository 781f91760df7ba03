"""Numbers for the log: ratios over a logging window, time by phase, and the sequence reverse KL with its standard error."""

import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class Ratios:
    """Named ratios over a logging window and over processes: totals, each divided by a count that several may share."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def count(self, unit: str, amount: float) -> None:
        """So many more tokens, responses, steps ... were seen."""
        self._counts[unit] += float(amount)

    def add(self, name: str, total: float, per: str) -> None:
        """Adds to the numerator of `name`, which is divided by the count of `per`."""
        self._totals[name, per] += float(total)

    def flush(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The ratios since the last flush; one over a count of zero is left out. Every process must call it."""
        parts = [(dict(self._totals), dict(self._counts))]
        if accelerator is not None and accelerator.num_processes > 1:
            parts = gather_object(parts)
        self._totals.clear()
        self._counts.clear()
        totals, counts = defaultdict(float), defaultdict(float)
        for part_totals, part_counts in parts:
            for key, value in part_totals.items():
                totals[key] += value
            for unit, value in part_counts.items():
                counts[unit] += value
        return {name: total / counts[per] for (name, per), total in totals.items() if counts[per] > 0}


class PhaseTimer:
    """Seconds spent in named phases. A phase inside another is taken out of the outer one, so that phases add up.

    On a GPU they are the device's own seconds: a phase ends when the device has done what was asked of it, and the host goes on
    meanwhile. Only `flush` waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._last: torch.cuda.Event | float | None = None  # of the last switch
        # Spans whose end the device may not have reached: phase, begin, end.
        self._spans: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = self._now()
        if self._open:
            if self.device.type == "cuda":
                self._spans.append((self._open[-1], self._last, now))
            else:
                self._seconds[self._open[-1]] += now - self._last
        self._last = now
        while self._spans and self._spans[0][2].query():
            self._close_first()

    def _now(self) -> "torch.cuda.Event | float":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _close_first(self) -> None:
        name, begin, end = self._spans.popleft()
        self._seconds[name] += begin.elapsed_time(end) / 1e3

    def flush(self) -> dict[str, float]:
        """Seconds by phase since the last flush. A GPU has then done all that it was asked for till now."""
        self._switch()
        if self.device.type == "cuda":
            self._last.synchronize()
        while self._spans:
            self._close_first()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 10^9 bytes: allocated on the device, or resident in main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def ratio_with_standard_error(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """sum(numerators) / sum(denominators) over independent samples, and its standard error (delta method).

    With numerators log p_student - log p_teacher of sampled texts and denominators their bytes: the sequence reverse KL per byte.
    NaN for no samples; the error is NaN for one.
    """
    x = torch.tensor(list(numerators), dtype=torch.float64)
    y = torch.tensor(list(denominators), dtype=torch.float64)
    n = len(x)
    if n == 0 or y.sum() == 0:
        return float("nan"), float("nan")
    ratio = x.sum() / y.sum()
    residual = x - ratio * y
    error = (residual.square().sum() / (n - 1) / n).sqrt() / y.mean() if n > 1 else torch.tensor(float("nan"))
    return ratio.item(), error.item()
