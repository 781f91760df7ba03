"""`python -m bench.gpu`: one step after the other within the minutes that there are, then a short table of it all."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from pathlib import Path

from . import rows, summary
from .steps import STEPS
from .supervise import GRACE, Settings, run_step

REHEARSAL_SECONDS = 60.0  # of a step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--steps", default=",".join(STEPS), help="in this order, separated by commas (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (%(default)s)")
    parser.add_argument("--output", type=Path, help="default: $OUT, or bench/results/gpu-<device>")
    parser.add_argument(
        "--case", nargs="*", default=(), help="of profile and bench: only cases named like one of these"
    )
    parser.add_argument("--method", nargs="*", default=(), help="of bench: only methods named like one of these")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU at toy size, with faults on purpose")
    options = parser.parse_args(arguments)
    steps = [step for step in options.steps.split(",") if step]
    if unknown := [step for step in steps if step not in STEPS]:
        parser.error(f"--steps: {', '.join(unknown)} is none of {', '.join(STEPS)}")
    if options.rehearse:
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    folder = options.output or _folder(options.rehearse)
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        folder.resolve(),
        "cpu" if options.rehearse else "cuda",
        options.rehearse,
        tuple(options.case),
        tuple(options.method),
    )
    begin, end = time.time(), time.time() + 60 * options.minutes - GRACE
    for number, step in enumerate(steps):
        rest = sum(STEPS[later] for later in steps[number:])
        seconds = REHEARSAL_SECONDS if options.rehearse else max(0.0, end - time.time()) * STEPS[step] / rest
        print(f"[{time.time() - begin:4.0f} s] {step}: at most {seconds:.0f} s", flush=True)
        since = time.time()
        outcome = run_step(step, seconds, settings)
        found = {"step": step, "item": "", "status": outcome, "seconds": time.time() - since}
        rows.append(folder / rows.NAME, found)
        summary.write(folder)  # kept, whatever comes next
    print(summary.write(folder))
    print(f"{time.time() - begin:.0f} s in all: {folder}")


def _folder(rehearse: bool) -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    name = "rehearsal"
    if not rehearse:  # asked of the driver: nothing of this process may take memory of the device
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            name = "unknown"
    return Path(__file__).parent.parent / "results" / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
