"""What other tiles would do: the kernels that read logits, timed by the profiler in calls at the real sizes.

Not part of a run unless it is named (`--steps sweep`). Each row is one kernel with one entry of `tiles.TILES` replaced; "now" is
the entry as it is.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from simct_kernels.triton_backend import tiles
from simct_kernels.triton_backend.tiles import Tile

from ..cases import Case, Problem
from ..rivals import ours
from .cases import all_cases
from .profiles import _device_ms
from .steps import Item, Run

KERNELS = {"forward": "candidate_kernel", "gradient": "gradient_kernel"}
TRIED = {
    # A program of 1,024 threads to itself on a multiprocessor, so that what it reads of a row again lies in the L1 cache, takes two
    # to four times as long (H100, Triton 3.6: 15.6 and 32 ms in place of 5.7 and 9.0).
    "forward_scattered": [
        Tile(1, 1024, 4), Tile(1, 1024, 8), Tile(1, 512, 4), Tile(1, 2048, 8), Tile(1, 4096, 8), Tile(1, 2048, 4, each=2),
    ],
    "gradient_scattered": [
        Tile(1, 1024, 4), Tile(1, 1024, 8), Tile(1, 512, 4), Tile(1, 2048, 8), Tile(1, 4096, 8), Tile(1, 2048, 4, each=2),
    ],
    "forward": [
        Tile(1, 4096, 8, each=16), Tile(1, 4096, 4, each=16), Tile(1, 1024, 4, each=32), Tile(1, 2048, 4, each=4),
        Tile(1, 2048, 4, each=64), Tile(1, 8192, 8, each=16),
    ],
    "gradient": [
        Tile(1, 4096, 8), Tile(1, 4096, 4), Tile(1, 1024, 4), Tile(1, 2048, 8), Tile(1, 2048, 4, each=4),
        Tile(1, 1024, 2), Tile(2, 1024, 4), Tile(1, 4096, 8, each=4),
    ],
}  # fmt: skip


def items(run: Run) -> list[Item]:
    cases = [case for case in all_cases(run.rehearse) if case.form in ("linear", "logits")]
    cases = [case for case in cases if run.chooses(case.name, run.cases)]
    cases.sort(key=lambda case: case.form != "logits")
    return [Item(case.name, lambda case=case: sweep(run, case), 120.0) for case in cases]


def sweep(run: Run, case: Case) -> None:
    problem = Problem(case, torch.device(run.device))
    call = ours.prepare(problem, backend="triton")

    def step() -> None:
        problem.clear()
        call().backward()

    step()
    scattered = case.form == "logits" and not case.one_vocabulary
    for kernel, name in KERNELS.items():
        entry = f"{kernel}_scattered" if scattered else kernel
        for shape in [None, *TRIED[entry][: 2 if run.rehearse else None]]:
            if run.left() < 4:
                run.record(what="tile", case=case.name, note="no time left")
                return
            if run.rehearse and shape is not None:
                shape = Tile(1, 64, 4, each=min(shape.each, 2))
            try:
                ms = _kernel_ms(run, step, entry, shape, name)
            except Exception as error:  # one that does not compile, or does not fit
                run.record(what="tile", case=case.name, kernel=name, tile=str(shape), note=f"{error}"[:200])
                continue
            run.record(what="tile", case=case.name, kernel=name, tile=str(shape or "now"), ms=ms)


def _kernel_ms(run: Run, step, entry: str, shape: Tile | None, name: str) -> float:
    """Of all launches of the kernel in one call: the median of five calls."""
    table = {arch: own | ({entry: shape} if shape else {}) for arch, own in tiles.TILES.items()}
    gpu = run.device == "cuda"
    with mock.patch.object(tiles, "TILES", table):
        step()
        spans = []
        for _ in range(5 if gpu else 1):
            with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
                step()
                if gpu:
                    torch.cuda.synchronize()
            spans.append(sum(_device_ms(event) for event in profiler.key_averages() if name in event.key))
    return sorted(spans)[len(spans) // 2]
