"""One training step by phase: the demo's pair through the trainer, and the first pair's shapes with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .. import end2end
from .steps import Item, Run


def items(run: Run) -> list[Item]:
    jobs = end2end.jobs(run.device, run.rehearse)
    return [Item(job[0].__name__.replace("_", " "), lambda job=job: step(run, *job), 60.0) for job in jobs]


def step(run: Run, function: Callable, *arguments) -> None:
    for row in function(*arguments):
        found = {key: value for key, value in dataclasses.asdict(row).items() if value not in (None, "")}
        milliseconds = {"median_ms": 1e3 * row.median_s} if row.median_s is not None else {}
        run.record(what="phase", **{**found, **milliseconds})
