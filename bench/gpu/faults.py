"""What a rehearsal breaks on purpose, a fault among the items of each step: the others must report all the same."""

from __future__ import annotations

import importlib
import os
import time

from .steps import Item


def hang() -> None:
    time.sleep(600)


def crash() -> None:
    os.abort()


def out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 31.25 GiB. GPU 0 has ...")


def missing_package() -> None:
    importlib.import_module("a_package_that_is_not_there")


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
