"""What a rehearsal breaks on purpose: the others must report all the same. Alone (step `faults`) it needs no torch."""

from __future__ import annotations

import importlib
import os
import time

from .steps import Item, Run


class OutOfMemoryError(RuntimeError):
    """As torch's is named."""


def hang() -> None:
    time.sleep(600)


def crash() -> None:
    os.abort()


def out_of_memory() -> None:
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 31.25 GiB. GPU 0 has ...")


def missing_package() -> None:
    importlib.import_module("a_package_that_is_not_there")


def broken_device() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")


FAULTS = {
    "oracle": (hang, 1.0),
    "profile": (crash, 10.0),
    "bench": (out_of_memory, 10.0),
    "step": (missing_package, 10.0),
}


def among(step: str, items: list[Item]) -> list[Item]:
    """Behind the first item, so that there is one before it and, mostly, one after it."""
    if step not in FAULTS:
        return items
    run, seconds = FAULTS[step]
    return [*items[:1], Item(f"fault: {run.__name__}", run, seconds), *items[1:]]


def items(run: Run) -> list[Item]:
    """One of each, with an item before and behind it that works."""
    made = [Item("work 0", lambda: run.record(what="work"))]
    for number, fault in enumerate((hang, crash, out_of_memory, missing_package, broken_device), start=1):
        made += [Item(fault.__name__, fault, 0.5 if fault is hang else 10.0)]
        made += [Item(f"work {number}", lambda: run.record(what="work"))]
    return made
