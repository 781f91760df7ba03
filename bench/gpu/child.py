"""The process of one step: works through its items, says which one it is at, and leaves when the device is broken."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from . import faults, rows
from .compilations import Compilations
from .steps import EXTRA, STEPS, Item, Run

BROKEN = 70  # exit status: the device answers this process no more, the rest is for another one
# Of the steps whose modules are not named like them.
MODULES = {"tests": "suite", "profile": "profiles", "bench": "losses", "step": "train"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=(*STEPS, *EXTRA, "faults"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--progress", type=Path, required=True)  # one line for each item begun, and each ended
    parser.add_argument("--shard", default="0/1")  # which of how many processes of the step this is
    parser.add_argument("--end", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--case", nargs="*", default=())
    parser.add_argument("--method", nargs="*", default=())
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # asked before it is killed
    run = Run(
        options.step, options.folder, options.device, options.end, options.rehearse,
        tuple(options.case), tuple(options.method),
    )  # fmt: skip
    done = {row["item"] for row in rows.read(options.progress) if "begin" in row}
    run.item = "setup"
    try:
        items = importlib.import_module(f".{MODULES.get(options.step, options.step)}", __package__).items(run)
    except Exception as error:
        _failed(run, error, 0.0)
        sys.exit(1)
    if options.rehearse:
        items = faults.among(options.step, items)
    counted = Compilations() if run.device == "cuda" and "torch" in sys.modules else None
    shard, shards = map(int, options.shard.split("/"))
    for item in items[shard::shards]:
        if item.name not in done:
            _work(run, item, options.progress, counted)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for compilers and the device, of which some never end


def _work(run: Run, item: Item, progress: Path, counted: Compilations | None) -> None:
    run.item = item.name
    if run.left() < 2:
        run.record(status="left out", note="no time left in its step")
        return
    rows.append(progress, {"item": item.name, "begin": time.time(), "seconds": item.seconds})
    begin = time.perf_counter()
    broken = False
    try:
        item.run()
    except Exception as error:  # whatever it is, the other items go on
        _failed(run, error, time.perf_counter() - begin, counted)
        broken = run.device == "cuda" and rows.breaks_device(error)
    else:
        run.record(status="ok", seconds=time.perf_counter() - begin, **(counted.take() if counted else {}))
    rows.append(progress, {"item": item.name, "end": time.time()})
    if broken:
        sys.stderr.flush()
        os._exit(BROKEN)  # without the device's own clean-up, which may wait for ever
    _clean(run)


def _failed(run: Run, error: Exception, seconds: float, counted: Compilations | None = None) -> None:
    found = counted.take() if counted else {}
    run.record(status=rows.status_of(error), seconds=seconds, error=rows.short(error), where=rows.where(error), **found)
    print(f"--- {run.step}: {run.item}", file=sys.stderr)
    text = "".join(traceback.format_exception(error))
    print(text if len(text) < 4000 else f"{text[:2000]}\n[...]\n{text[-2000:]}", file=sys.stderr, flush=True)


def _clean(run: Run) -> None:
    gc.collect()
    if run.device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


if __name__ == "__main__":
    main()
