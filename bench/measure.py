"""Measures one method on one case, in this process: seconds, peak memory, and what it computes."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case, Problem

L2_BYTES = 1 << 28  # more than any device's second-level cache: written between two calls, so that each starts cold


@dataclass(frozen=True)
class Measured:
    """Of one method; `refused` says why it did not run, and then nothing else is set."""

    refused: str = ""
    forward: tuple[float, ...] = ()  # seconds of each call
    total: tuple[float, ...] = ()  # with the backward
    peak_bytes: int = 0  # above the inputs, gradients included
    gradient_bytes: int = 0
    loss: float = float("nan")
    gradient_norm: float = float("nan")  # of hidden states, or logits
    student_rows: int = 0
    teacher_rows: int = 0
    units: int = 0
    shared: int = 0
    floor: tuple = ()  # of the forward, of the backward
    device: str = ""
    other_load: float | None = None  # cores that other processes kept busy meanwhile


def measure(name: str, case: Case, device_type: str, seconds: float) -> Measured:
    """`seconds` is what the repeats after the first call may take. There is at least one, but not for a slow call on a CPU."""
    from .rivals import methods

    method, device = methods()[name], torch.device(device_type)
    reason = method.refuses(case, device_type)
    if reason:
        return Measured(refused=reason)
    torch._dynamo.reset()  # what was compiled keeps its inputs alive
    if device_type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    if device_type == "cpu":  # code is loaded, and memory pools are opened, before memory is looked at
        _once(method.prepare(Problem(case.tiny(), device)))
    problem = Problem(case, device)
    call = method.prepare(problem)
    timer = _CudaTimer(device) if device_type == "cuda" else _CpuTimer()
    if device_type == "cpu" and method.compiles:  # its code stays in memory, and is not counted
        _once(call)
        problem.clear()
    memory = PeakMemory(device)
    if device_type == "cuda":
        _once(call)  # compiles and tunes
        problem.clear()
        memory.restart()  # what that took is not counted; what a method keeps is, a copy of a head say
    load = OtherLoad()
    loss, forward, total = timer(call)
    peak = memory.above_start()
    gradients = problem.gradients()
    first = next(iter(gradients.values()))
    result = {
        "peak_bytes": peak,
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients.values()),
        "loss": loss.item() * method.scale(case),
        "gradient_norm": torch.linalg.vector_norm(first, dtype=torch.float32).item() * method.scale(case),
        "student_rows": len(problem.units.student_tokens),
        "teacher_rows": len(problem.units.teacher_tokens),
        "units": len(problem.units),
        "shared": len(problem.shared),
        "floor": problem.floor(method.options),
        "device": device_name(device),
    }
    del loss, gradients, first
    # On a CPU a call that takes long is its own warm-up: the first touch of its memory is paid in every call anyway.
    spans = [(forward, total)] if device_type == "cpu" and total > seconds / 2 else []
    repeats = 0 if spans else max(1, min(50, int(seconds / total) if total else 50))
    for _ in range(repeats):
        problem.clear()
        spans.append(timer(call)[1:])
    forwards, totals = zip(*spans, strict=True)
    problem.clear()
    return Measured(forward=forwards, total=totals, other_load=load.cores(), **result)


def _once(call: Callable[[], Tensor]) -> Tensor:
    loss = call()
    loss.backward()
    return loss.detach()


class _CpuTimer:
    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
        """The loss, the seconds of the forward, and those of forward and backward."""
        begin = time.perf_counter()
        loss = call()
        middle = time.perf_counter()
        loss.backward()
        return loss.detach(), middle - begin, time.perf_counter() - begin


class _CudaTimer:
    def __init__(self, device: torch.device) -> None:
        self.cache = torch.empty(L2_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.cache.zero_()  # also keeps the device busy while the first launches are queued
        begin.record()
        loss = call()
        middle.record()
        loss.backward()
        end.record()
        end.synchronize()
        return loss.detach(), begin.elapsed_time(middle) / 1e3, begin.elapsed_time(end) / 1e3


class OtherLoad:
    """How many cores other processes kept busy since it was made (Linux; None elsewhere).

    Beside other work a CPU's times mean nothing: threads that wait for one another in short parallel loops spin while one of
    them has no core, so that a method of many short loops was seen to take ten times as long, and one of few loops twice.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter(), self._others()

    def cores(self) -> float | None:
        begin, others = self._begin
        elapsed = time.perf_counter() - begin
        if others is None or elapsed < 0.1:  # the kernel counts in hundredths of a second
            return None
        return max(0.0, (self._others() - others) / elapsed)

    @staticmethod
    def _others() -> float | None:
        """Seconds of all cores that were not idle and not this process's."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time()


class PeakMemory:
    """Peak memory since it was made: allocated on a GPU, resident in main memory on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.status = Path("/proc/self/status")
        if device.type == "cuda":
            for dtype in (torch.float32, torch.bfloat16):  # cuBLAS allocates its workspace at the first product
                square = torch.ones(64, 64, dtype=dtype, device=device)
                torch.mm(square, square)
            del square
        self.restart()
        self.start = torch.cuda.memory_allocated(device) if device.type == "cuda" else self._peak()

    def restart(self) -> None:
        """The peak starts again from what is in use now; it is still told above the start."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what was freed before is given back, or it would be used again unseen
        if self.status.exists():
            Path("/proc/self/clear_refs").write_text("5")

    def above_start(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return self._peak() - self.start

    def _peak(self) -> int:
        if self.status.exists():
            return 1024 * int(re.search(r"VmHWM:\s+(\d+)", self.status.read_text())[1])
        from simct.training.metrics import peak_memory_gb

        return int(1e9 * peak_memory_gb(self.device))


def ceilings(device_type: str, quick: bool) -> dict[str, tuple[float, ...]]:
    """Seconds of a large copy within the device's memory, and of a large matrix product, with the work they did."""
    device = torch.device(device_type)
    gpu = device_type == "cuda"
    size, width = (1 << 32, 8192) if gpu else (1 << 26, 1024) if quick else (1 << 28, 2048)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    dtype = torch.bfloat16 if gpu else torch.float32
    left, right = (torch.empty(width, width, dtype=dtype, device=device).uniform_(-1, 1) for _ in range(2))
    out = torch.empty(width, width, dtype=dtype, device=device)

    def seconds(run: Callable[[], object]) -> tuple[float, ...]:
        run()
        if gpu:
            timer = _CudaTimer(device)
            spans = []
            for _ in range(20):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                timer.cache.zero_()
                begin.record()
                run()
                end.record()
                end.synchronize()
                spans.append(begin.elapsed_time(end) / 1e3)
            return tuple(spans)
        spans = []
        for _ in range(7):
            begin = time.perf_counter()
            run()
            spans.append(time.perf_counter() - begin)
        return tuple(spans)

    return {
        "copy": (2 * size, seconds(lambda: target.copy_(source))),
        f"product, {str(dtype).removeprefix('torch.')}": (
            2 * width**3,
            seconds(lambda: torch.mm(left, right, out=out)),
        ),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1].strip() if model else 'CPU'}, {torch.get_num_threads()} threads"
