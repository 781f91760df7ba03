"""The kernels under NVIDIA's compute-sanitizer: what reads or writes outside of an allocation, or what nothing wrote.

Every tensor has an allocation of its own (PyTorch's cache is off), so that the byte behind a tensor is nobody's. Sizes are
small, odd, and several tiles: `python -m bench.gpu.memcheck DEVICE` makes the calls, the step runs it under the tool.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

from . import rows
from .steps import Item, Run

TOOL = "compute-sanitizer"
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
CALLS = "calls made"


def items(run: Run) -> list[Item]:
    return [Item("memcheck", lambda: memcheck(run), seconds=600.0)]  # the step's own time ends it


def memcheck(run: Run) -> None:
    command = [sys.executable, "-m", "bench.gpu.memcheck", run.device]
    if not run.rehearse:
        path = shutil.which(TOOL) or shutil.which(TOOL, path=os.pathsep.join(PLACES))
        if path is None:
            raise ImportError(f"{TOOL} is not on this machine")
        command = [
            path,
            "--tool",
            "memcheck",
            "--print-limit",
            "30",
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "9",
            *command,
        ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile() as output:  # a file, not a pipe: what it said until it was stopped is kept
        process = subprocess.Popen(
            command, cwd=rows.REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            note = f"exit status {process.wait(max(5.0, run.left() - 2))}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
            note = "stopped: no time left in its step"
        output.seek(0)
        text = output.read().decode(errors="replace")
    errors = [line.removeprefix("========= ").strip() for line in text.splitlines() if re.match(r"=+ \w.*", line)]
    errors = [line for line in errors if re.search(r"Invalid|Uninitialized|[Mm]isaligned|Program hit", line)]
    print(text[-6000:], flush=True)
    made = text.count(CALLS)
    run.record(
        what="memcheck", note=note, calls=made, passed=note == "exit status 0", error=" | ".join(errors[:4])[:400]
    )


def main(device: str) -> None:
    """Each loss once, forward and backward, in the Triton backend."""
    import torch

    from .oracle import VARIANTS, Variant, problem_of, results

    chosen: list[Variant] = VARIANTS[:3] if device == "cpu" else VARIANTS
    for one in chosen:
        for dtype in one.dtypes if device == "cuda" else one.dtypes[-1:]:
            problem = problem_of(one, dtype, device, "toy" if device == "cpu" else "tiles")
            found = results(problem, one, "triton")
            if device == "cuda":
                torch.cuda.synchronize()
            finite = all(bool(value.isfinite().all()) for value in found.values())
            print(f"{CALLS}: {one.name}, {dtype}, {'finite' if finite else 'NOT FINITE'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
