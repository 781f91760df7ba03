"""`python -m bench.gpu`: one step after the other within the minutes that there are, then a short table of it all."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import rows, summary
from .steps import EXTRA, SHARDS, STEPS, TOGETHER
from .supervise import GRACE, Settings, run_step

REHEARSAL_SECONDS = 180.0  # of a step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--steps", default=",".join(STEPS), help="in this order, separated by commas (%(default)s)")
    parser.add_argument("--study", action="store_true", help="then the study with real tokenizers, of eight minutes")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (%(default)s)")
    parser.add_argument("--output", type=Path, help="default: $OUT, or bench/results/gpu-<device>")
    parser.add_argument(
        "--case", nargs="*", default=(), help="of profile, bench, sweep and oracle: only cases named like one of these"
    )
    parser.add_argument("--method", nargs="*", default=(), help="of bench: only methods named like one of these")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU at toy size, with faults on purpose")
    options = parser.parse_args(arguments)
    steps = [step for step in options.steps.split(",") if step] + ["study"] * options.study
    if unknown := [step for step in steps if step not in STEPS | EXTRA]:
        parser.error(f"--steps: {', '.join(unknown)} is none of {', '.join(STEPS | EXTRA)}")
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
    groups = _groups(steps)
    for number, group in enumerate(groups):
        rest = sum(_weight(later) for later in groups[number:])
        seconds = (
            max(REHEARSAL_SECONDS, _weight(group))
            if options.rehearse
            else max(0.0, end - time.time()) * _weight(group) / rest
        )
        print(f"[{time.time() - begin:4.0f} s] {' and '.join(group)}: at most {seconds:.0f} s", flush=True)
        with ThreadPoolExecutor(len(group)) as pool:
            list(pool.map(lambda step, seconds=seconds: _run(step, seconds, settings), group))
        summary.write(folder)  # kept, whatever comes next
    print(summary.write(folder))
    print(f"{time.time() - begin:.0f} s in all: {folder}")


def _groups(steps: list[str]) -> list[list[str]]:
    """In their order, neighbours that may run side by side together."""
    groups: list[list[str]] = []
    for step in steps:
        if groups and step in TOGETHER and groups[-1][-1] in TOGETHER:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _weight(group: list[str]) -> int:
    return max((STEPS | EXTRA)[step] for step in group)


def _run(step: str, seconds: float, settings: Settings) -> None:
    begin = time.time()
    shards = 1 if settings.rehearse else SHARDS.get(step, 1)
    outcome = run_step(step, seconds, settings, shards)
    found = {"step": step, "item": "", "status": outcome, "seconds": time.time() - begin}
    rows.append(settings.folder / rows.NAME, found)


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
