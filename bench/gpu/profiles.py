"""Where the time of the linear loss goes: by kernel, by host and device, and by the rows of a chunk."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..cases import Case, Problem
from ..rivals import ours
from .cases import all_cases, headline
from .steps import Item, Run
from .timing import peak_bytes, times

TEXT, TABLE = "profile.txt", "profile.csv"
CHUNKS = ("auto", 2048, 4096, 1229, 512)
# Host calls that wait for the device, or make it wait for the host, as the profiler names them.
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync", "cudaMalloc",
    "cudaLaunchKernel", "cuLaunchKernel", "Memcpy DtoH", "Memcpy HtoD",
)  # fmt: skip


def items(run: Run) -> list[Item]:
    cases = [case for case in all_cases(run.rehearse) if case.form in ("linear", "logits")]
    cases = [case for case in cases if run.chooses(case.name, run.cases)]
    if run.rehearse:
        cases = cases[:1]
    chunks = (8,) if run.rehearse else CHUNKS
    made = [Item(f"kernels, {case.name}", lambda case=case: kernels(run, case), 60.0) for case in cases]
    if run.chooses("headline, top_k=16", run.cases):
        made.append(Item("kernels, headline, top_k=16", lambda: kernels(run, headline(run.rehearse), top_k=16), 60.0))
    return made + [
        Item(f"chunk_rows {rows}, {case.name}", lambda case=case, rows=rows: chunk(run, case, rows), 40.0)
        for rows in chunks
        for case in cases
        if case.form == "linear"
    ]


def _step(problem: Problem, **keywords) -> Callable[[], None]:
    call = ours.prepare(problem, backend="triton", **keywords)

    def step() -> None:
        problem.clear()
        call().backward()

    return step


def chunk(run: Run, case: Case, rows: int | str) -> None:
    problem = Problem(case, torch.device(run.device))
    step = _step(problem, chunk_rows=rows)
    step()  # compiles
    problem.clear()
    peak = peak_bytes(step, run.device)
    gradients = sum(gradient.nbytes for gradient in problem.gradients().values())
    spans = times(step, run.device, seconds=0.5, most=7, warm=1)
    scratch = None if peak is None else max(0, peak - gradients)
    run.record(what="chunk_rows", case=case.name, chunk_rows=str(rows), scratch_bytes=scratch, **spans.row())


def kernels(run: Run, case: Case, **keywords) -> None:
    problem = Problem(case, torch.device(run.device))
    step = _step(problem, **keywords)
    case = case.replace(name=", ".join([case.name, *(f"{name}={value}" for name, value in keywords.items())]))
    for _ in range(2):
        step()
    gpu = run.device == "cuda"
    host_ms, wall_ms = _host_and_wall(step, gpu)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    if gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    by_device = [
        {"case": case.name, "name": event.key[:160], "calls": event.count, "device_ms": _device_ms(event),
         "host_ms": event.self_cpu_time_total / 1e3}
        for event in averages
    ]  # fmt: skip
    by_device.sort(key=lambda row: (-row["device_ms"], -row["host_ms"]))
    _append_csv(run.folder / TABLE, by_device[:150])
    counts = {name: sum(row["calls"] for row in by_device if row["name"].startswith(name)) for name in WAITS}
    spans = _device_spans(profiler) if gpu else []
    found = {
        "what": "profile",
        "case": case.name,
        "host_ms": host_ms,
        "wall_ms": wall_ms,
        **{f"calls of {name}": count for name, count in counts.items() if count},
    }
    if spans:
        begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
        found |= {
            "device_span_ms": (end - begin) / 1e3,
            "device_busy_ms": _union(spans) / 1e3,
            "device_calls": len(spans),
        }
        found["idle_share"] = 1 - found["device_busy_ms"] / found["device_span_ms"]
    run.record(**found)
    with (run.folder / TEXT).open("a", encoding="utf-8") as file:
        print(f"===== {case.name}\n{found}\n\nBy kernel (device time without overlap):", file=file)
        for row in [row for row in by_device if row["device_ms"] > 0][:45]:
            print(f"{row['device_ms']:9.3f} ms {row['calls']:6} {row['name'][:110]}", file=file)
        print("\nBy host call:", file=file)
        for row in sorted(by_device, key=lambda row: -row["host_ms"])[:30]:
            print(f"{row['host_ms']:9.3f} ms {row['calls']:6} {row['name'][:110]}", file=file)
        print("\nGaps of the device above 20 microseconds, with what ran before and after:", file=file)
        for gap, at, before, after in _gaps(spans)[:30]:
            print(f"{gap / 1e3:9.3f} ms at {at / 1e3:9.3f} ms: {before[:60]} -> {after[:60]}", file=file)


def _host_and_wall(step: Callable[[], None], gpu: bool) -> tuple[float, float]:
    """Until the host has launched everything, and until the device is done: what is the same for a call that waits."""
    if gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    launched = time.perf_counter()
    if gpu:
        torch.cuda.synchronize()
    return 1e3 * (launched - begin), 1e3 * (time.perf_counter() - begin)


def _device_ms(event) -> float:
    """Of the kernels themselves: an operation's share of its kernels' time would count it twice."""
    on_host = "CPU" in str(getattr(event, "device_type", "CPU"))
    return 0.0 if on_host else getattr(event, "self_device_time_total", 0.0) / 1e3


def _device_spans(profiler) -> list[tuple[float, float, str]]:
    """Begin and end in microseconds, and the name, of all that ran on the device."""
    events = [event for event in profiler.events() if "CPU" not in str(event.device_type)]
    return sorted((event.time_range.start, event.time_range.end, event.name) for event in events)


def _union(spans: list[tuple[float, float, str]]) -> float:
    busy, reached = 0.0, float("-inf")
    for begin, end, _ in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy


def _gaps(spans: list[tuple[float, float, str]]) -> list[tuple[float, float, str, str]]:
    found = []
    reached, before = (spans[0][1], spans[0][2]) if spans else (0.0, "")
    for begin, end, name in spans:
        if begin - reached > 20:
            found.append((begin - reached, reached - spans[0][0], before, name))
        if end > reached:
            reached, before = end, name
    return sorted(found, reverse=True)


def _append_csv(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
