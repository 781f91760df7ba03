"""`python -m bench`: runs the suites within the time there is, writes CSV and PNG files, and prints what they say."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from . import cost, end2end, goals, plots, record, step, suites, tables
from .measure import device_name
from .record import Row
from .runner import Clock, run_ceilings, run_tasks
from .workers import Failed, Worker

SUITES = ("kernels", "memory", "end2end", "cost", "step")
BUDGET = 510.0  # seconds; the plots and the last measurement must still fit into nine minutes
# What the later suites may need, kept free while the earlier ones run.
RESERVED = {"memory": 90.0, "end2end": 60.0, "cost": 45.0, "step": 60.0}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument("--output", type=Path, help="default: $OUT, or bench/results/<device>")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds; what does not fit is left out (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="in which methods take turns (%(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be fetched
    device, console = options.device, Console(width=None if sys.stdout.isatty() else 160)
    name = device_name(torch.device(device))
    folder = options.output or record.folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.budget)

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes that are started from here
    if options.quick:
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny sizes: more threads would wait for one another

    rows: list[Row] = []
    chosen = [suite for suite in SUITES if suite in options.suite]
    for number, suite in enumerate(chosen):
        share = Clock(clock.left() - sum(RESERVED[later] for later in chosen[number + 1 :]))
        if suite == "kernels":
            rows += _tried(console, "ceilings", lambda: run_ceilings(device, options.quick))
            rows += run_tasks(suites.kernels(device, options.quick), device, share, console, options.rounds)
            rows += _micro(options.quick, share, console)
        elif suite == "memory":
            rows += run_tasks(suites.memory(device, options.quick), device, share, console, options.rounds)
        elif suite == "end2end":
            rows += _end2end(device, options.quick, share, console)
        elif suite == "cost":
            _cost(folder, share, console)
        else:
            _step(folder, share, console)
        for row in rows:
            row.device = row.device or name
        record.write(folder / "results.csv", [record.as_dict(row) for row in rows])  # kept, whatever comes next

    tables.print_results(rows, console)
    reached = goals.goals(rows, device) if "kernels" in chosen and not options.quick else []
    if reached:
        tables.print_goals(reached, console)
        record.write(folder / "goals.csv", [{**vars(goal), "met": goal.met} for goal in reached])
    for name, draw in (("scaling", plots.scaling), ("comparison", plots.comparison), ("ceilings", plots.ceilings)):
        draw(rows, folder / f"{name}.png")
    console.print(f"{len(rows)} rows in {options.budget - clock.left():.0f} s: {folder}", highlight=False)


def _tried(console: Console, what: str, run) -> list[Row]:
    try:
        return run()
    except Failed as reason:
        console.print(f"[yellow]{what}: {reason}")
        return [Row("kernels", what, what, note=str(reason))]


def _micro(quick: bool, clock: Clock, console: Console) -> list[Row]:
    """Runs `micro.py` and takes its times over."""
    with tempfile.TemporaryDirectory() as scratch, console.status("kernels: microbenchmarks"):
        target = Path(scratch) / "micro.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/micro.py"]
        command += [f"--benchmark-json={target}", f"--benchmark-max-time={0.02 if quick else 0.5}"]
        command += ["--benchmark-min-rounds=2" if quick else "--benchmark-min-rounds=5", "--benchmark-warmup=on"]
        command += ["--benchmark-warmup-iterations=1"]
        if quick:
            command += ["--deselect", "bench/micro.py::test_alignment"]  # its tokenizers take seconds to load
        # Started from a test that pytest-xdist runs, pytest-benchmark would take itself for one of its workers and measure nothing.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        options = dict(capture_output=True, text=True, timeout=max(1.0, clock.left()))
        try:
            done = subprocess.run(command, cwd=record.REPOSITORY, env=environment, **options)
            note = "" if target.exists() else f"failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
        except subprocess.TimeoutExpired:
            note = "left out: no time left"
        if note:
            return [Row("kernels", "micro", "pytest-benchmark", note=note)]
        found = json.loads(target.read_text())
    rows = []
    for benchmark in found["benchmarks"]:
        row = Row("kernels", "micro", benchmark["name"].removeprefix("test_"), scope="")
        rows.append(record.timed(row, benchmark["stats"]["data"]))
    return rows


def _end2end(device: str, quick: bool, clock: Clock, console: Console) -> list[Row]:
    rows = []
    for function, *arguments in end2end.jobs(device, quick):
        name = function.__name__.replace("_", " ")
        with console.status(f"end2end: {name}"), Worker(device, fresh=True) as worker:
            if clock.left() < 5:
                rows.append(Row("end2end", name, "step", note="left out: no time left"))
                continue
            try:
                rows += worker.call(function, *arguments, seconds=clock.left())
            except Failed as reason:
                rows.append(Row("end2end", name, "step", note=str(reason)))
    return rows


def _cost(folder: Path, clock: Clock, console: Console) -> None:
    with console.status("cost: calls on tensors without data"):
        counted, predictions, note = cost.run(folder, clock.left())
    tables.print_dicts("What a call does, counted at the real sizes, and the time that it predicts", counted, console)
    tables.print_dicts("Predictions at the measured ceilings, not measurements", predictions, console)
    if note:
        console.print(f"[yellow]cost: {note}")


def _step(folder: Path, clock: Clock, console: Console) -> None:
    with console.status("step: models on tensors without data"):
        phases, note = step.run(folder, clock.left())
    tables.print_dicts("Seconds of a step by phase, predicted for an H100 by a rule; not measurements", phases, console)
    if note:
        console.print(f"[yellow]step: {note}")
