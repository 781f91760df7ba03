"""Runs the tasks of `suites` within the time there is, each method on each case; knows no method and no plot."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import record
from .floor import Cost
from .measure import Measured, ceilings, measure
from .record import Row
from .rivals import methods
from .suites import Task
from .workers import Failed, Worker

NO_TIME = "left out: no time left"


class Clock:
    """What is left of the time that a run may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def run_tasks(tasks: Sequence[Task], device: str, clock: Clock, console: Console, rounds: int = 1) -> list[Row]:
    """A row, or a few, for every method of every case: also for one that could not be measured, with the reason.

    With several rounds a case's methods take turns, every other round backwards, so that a machine whose speed drifts slows
    all of them down; a row's times are those of all rounds.
    """
    known = methods()
    rows: list[Row] = []
    columns = TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=rounds * sum(len(task.methods) for task in tasks))
        with Worker(device, fresh=device == "cpu") as alone, Worker(device, fresh=False) as shared:
            for task in tasks:
                # Two real tokenizers take longer to load than the methods to run: on a CPU too, those share a process.
                worker = shared if task.case.form == "text" and device == "cpu" else alone
                answers: dict[str, list[Measured | str]] = {name: [] for name in task.methods}
                for number in range(rounds):
                    for name in task.methods[:: -1 if number % 2 else 1]:
                        progress.update(bar, description=f"{task.suite}: {task.case.name}, {name}")
                        if not any(map(_failed, answers[name])):
                            answers[name].append(_measure(worker, task, name, device, clock))
                        progress.advance(bar)
                for name, several in answers.items():
                    rows += record.rows_of(task.suite, task.case, name, known[name].options, _together(several))
    record.judge(rows, {name for name, method in known.items() if method.same_loss})
    return rows


def _failed(answer: Measured | str) -> bool:
    return isinstance(answer, str) or bool(answer.refused)


def _together(answers: list[Measured | str]) -> Measured | str:
    """One measurement of all rounds. A round that failed says so in place of them, unless time ran out after others."""
    done = [answer for answer in answers if not _failed(answer)]
    if not done or (len(done) < len(answers) and answers[-1] != NO_TIME):
        return answers[-1]
    return dataclasses.replace(
        done[0],
        forward=tuple(seconds for answer in done for seconds in answer.forward),
        total=tuple(seconds for answer in done for seconds in answer.total),
        peak_bytes=max(answer.peak_bytes for answer in done),
        other_load=max((answer.other_load for answer in done if answer.other_load is not None), default=None),
    )


def _measure(worker: Worker, task: Task, name: str, device: str, clock: Clock) -> Measured | str:
    if clock.left() < 5:
        return NO_TIME
    try:
        limit = min(task.limit, clock.left())
        return worker.call(measure, name, task.case, device, task.seconds, seconds=limit)
    except Failed as reason:
        return str(reason)


def run_ceilings(device: str, quick: bool) -> list[Row]:
    """The copy and the matrix product that others are held against, as rows of their own."""
    with Worker(device, fresh=True) as worker:
        results = worker.call(ceilings, device, quick, seconds=120)
    name = results.pop("device")
    rows = []
    for method, (work, seconds) in results.items():
        cost = Cost(read=work) if method == "copy" else Cost(flops=work)
        rows.append(record.timed(Row("kernels", "ceiling", method, scope="", device=name), seconds, cost))
    return rows
