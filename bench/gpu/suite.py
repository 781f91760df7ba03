"""The kernels' own tests, compiled: pytest in a process of its own, each outcome written as it comes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from . import pytest_outcomes, rows
from .steps import Item, Run

# Compiling ahead of time for other devices needs none, and takes this one's time.
PATHS = ("tests/triton_backend", "tests/kernels", "--ignore", "tests/triton_backend/test_triton_compile.py")
REHEARSED = ("tests/triton_backend/test_triton_indexed.py::test_no_entry",)
# These tests need neither transformers nor the fixtures that the others share.
ALONE = ("--confcutdir", "tests/triton_backend", "-o", "pythonpath=. tests")
REPORT = "tests.txt"


def items(run: Run) -> list[Item]:
    return [Item("pytest", lambda: pytest(run), seconds=600.0)]  # the step's own time ends it


def pytest(run: Run) -> None:
    workers = "0" if run.rehearse else "12"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_outcomes"]
    command += ["-m", "not slow", "-n", workers, "--tb", "short"]
    if find_spec("pytest_timeout") is not None:
        # Its thread ends the whole worker: one that waits for the device hears no signal.
        command += ["--timeout", "60", "--timeout-method", "thread"]
    command += [*ALONE, *(REHEARSED if run.rehearse else PATHS)]
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch) / "outcomes.jsonl"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment[pytest_outcomes.VARIABLE] = str(outcomes)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, cwd=rows.REPOSITORY, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            seconds = max(5.0, run.left() - 3)
            try:
                note = f"exit status {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                note = f"stopped after {seconds:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)  # its workers too, of which one may wait for the device for ever
            output.seek(0)
            print(output.read().decode(errors="replace")[-6000:], flush=True)
        _report(run, outcomes, note)


def _report(run: Run, path: Path, note: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    by_test: dict[str, dict] = {}
    for outcome in found:  # the first failure says why; a later one may only say that its worker was replaced
        if by_test.get(outcome["test"], {}).get("outcome") != "failed":
            by_test[outcome["test"]] = outcome
    last = by_test.values()
    counts = Counter(outcome["outcome"] for outcome in last)
    run.record(what="tests", note=note, **{f"tests_{name}": count for name, count in counts.items()})
    failed = [outcome for outcome in last if outcome["outcome"] == "failed"]
    errors = Counter(_kind(outcome["error"]) for outcome in failed)
    with (run.folder / REPORT).open("w", encoding="utf-8") as file:
        print(f"{note}: {dict(counts)}\n\nErrors, most frequent first:", file=file)
        for error, count in errors.most_common():
            print(f"{count:5} {error}", file=file)
        print("\nFailed:", file=file)
        for outcome in failed:
            print(f"{outcome['test']}\n      {outcome['error']}\n      at {outcome['where']}", file=file)
        print("\nSkipped, by reason:", file=file)
        for reason, count in Counter(o["error"] for o in last if o["outcome"] == "skipped").most_common():
            print(f"{count:5} {reason}", file=file)
        print("\nSlowest:", file=file)
        for outcome in sorted(last, key=lambda outcome: -outcome["seconds"])[:25]:
            print(f"{outcome['seconds']:6.1f} s {outcome['test']}", file=file)
    for error, count in errors.most_common(20):
        run.record(what="test failures", error=error, count=count)


def _kind(error: str) -> str:
    """The same for all failures of one cause: without their numbers."""
    return re.sub(r"0x[0-9a-f]+|[-+]?\d+\.\d+(e[-+]?\d+)?", "#", error)[:250]
