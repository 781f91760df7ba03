"""What a step of the trainer does beside its phases: kernels compiled, memory asked of the driver, garbage collected, waits for the
device, and the host's time by function."""

from __future__ import annotations

import cProfile
import gc
import pstats
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from .compilations import Compilations
from .profiles import _device_spans, _union
from .rows import OURS

PACKAGES = str(Path(torch.__file__).parent.parent)
# Of `torch.cuda.memory_stats`: calls of the driver, each of which makes the device wait.
ASKED = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_sync_all_streams")


class Watch(TrainerCallback):
    """`steps`: of each step its milliseconds by the clock and what is counted. Into each of the last three something looks, which
    makes them slower: `waits` for the device by the line that waits; `host`, the main thread's functions; `device`, the calls of
    its driver, in ms, and for how long it is busy."""

    def __init__(self, device: str) -> None:
        self.cuda, self.trainer = device == "cuda", None
        self.steps: list[dict[str, object]] = []
        self.waits: Counter[str] = Counter()
        self.host: pstats.Stats | None = None
        self.device: list[tuple[str, int, float]] = []  # name, calls, ms
        self.busy_ms: float | None = None
        self._compilations = Compilations()
        self._looking = ExitStack()
        self._collection_ms = self._collecting_since = 0.0

    def layouts(self) -> tuple[object, object]:
        """How the student's and the teacher's sequences were laid out."""
        return self.trainer.layout, self.trainer.teacher.layout

    def on_train_begin(self, args, state, control, **kwargs):
        gc.callbacks.append(self._collect)
        self._start()

    def on_train_end(self, args, state, control, **kwargs):
        gc.callbacks.remove(self._collect)

    def on_step_end(self, args, state, control, **kwargs):
        """What is logged after it is part of the next one's time."""
        self._synchronize()
        wall = 1e3 * (time.perf_counter() - self._since)
        asked = {name: value - self._asked_before[name] for name, value in self._asked().items()}
        found = {"wall_ms": wall, "collection_ms": self._collection_ms, **asked, **self._compilations.take()}
        self.steps.append({"number": state.global_step, **found})
        self._looking.close()
        look = {3: self._look_for_waits, 2: self._look_at_host, 1: self._look_at_device}
        if state.max_steps - state.global_step in look:
            self._looking.enter_context(look[state.max_steps - state.global_step]())
        self._start()

    def _start(self) -> None:
        self._synchronize()
        self._asked_before, self._collection_ms, self._since = self._asked(), 0.0, time.perf_counter()

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _asked(self) -> dict[str, int]:
        return {name: torch.cuda.memory_stats().get(name, 0) for name in ASKED} if self.cuda else {}

    def _collect(self, phase: str, _) -> None:
        if phase == "start":
            self._collecting_since = time.perf_counter()
        else:
            self._collection_ms += 1e3 * (time.perf_counter() - self._collecting_since)

    # ---- What looks into a step ----

    @contextmanager
    def _look_for_waits(self):
        def note(*_, **__):
            self.waits[_place(sys._getframe(1))] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            if self.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if self.cuda:
                    torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def _look_at_host(self):
        profiler = cProfile.Profile()
        profiler.enable()
        try:
            yield
        finally:
            profiler.disable()
            self.host = pstats.Stats(profiler)

    @contextmanager
    def _look_at_device(self):
        with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as profiler:
            yield
            self._synchronize()
        events = profiler.key_averages()
        host = [(event.key, event.count, event.self_cpu_time_total / 1e3) for event in events]
        self.device = sorted((row for row in host if row[2] > 0), key=lambda row: -row[2])
        if spans := _device_spans(profiler) if self.cuda else []:
            self.busy_ms = _union(spans) / 1e3


def host_lines(stats: pstats.Stats, most: int) -> list[str]:
    """The functions with the most time of their own, those of this repository with all that they call, and the packages."""
    rows = [(_named(file, line, name), calls, self_s, all_s)
            for (file, line, name), (_, calls, self_s, all_s, _) in stats.stats.items()]  # fmt: skip
    packages: Counter[str] = Counter()
    for (file, _, _), (_, _, self_s, _, _) in stats.stats.items():
        packages[_package(file)] += self_s
    lines = ["own time by package: " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in packages.most_common(8))]
    for title, chosen in (
        ("own time", sorted(rows, key=lambda row: -row[2])[:most]),
        ("with all they call", sorted((r for r in rows if _is_ours(r[0])), key=lambda row: -row[3])[:most]),
    ):
        lines.append(f"{title}: ms own, ms in all, calls")
        lines += [f"{1e3 * s:9.1f} {1e3 * a:9.1f} {calls:8} {name}" for name, calls, s, a in chosen]
    return lines


def _is_ours(name: str) -> bool:
    return name.startswith(("simct/", "simct_kernels/", "bench/"))


def _named(file: str, line: int, name: str) -> str:
    if found := OURS.match(file):
        file = found[1]
    return name if file == "~" else f"{file.removeprefix(PACKAGES + '/')}:{line} {name}"


def _package(file: str) -> str:
    if file == "~":
        return "built in"
    if found := OURS.match(file):
        return found[1].split("/")[0]
    return file.removeprefix(PACKAGES + "/").split("/")[0] if file.startswith(PACKAGES) else "Python"


def _place(frame) -> str:
    """The innermost line of this repository that led here, else the innermost outside of torch."""
    other = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if (found := OURS.match(file)) and not found[1].startswith("bench/gpu/watch"):
            return f"{found[1]}:{frame.f_lineno}"
        if not other and "/torch/" not in file and file != __file__ and "warnings" not in file:
            other = f"{file.removeprefix(PACKAGES + '/')}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "?"
