"""A pytest plugin: appends each test's outcome to a file as it comes, and replaces a worker whose device is broken."""

from __future__ import annotations

import json
import os

from . import rows

VARIABLE = "BENCH_GPU_OUTCOMES"
_broken = False


def _reason(report) -> str:
    """The first line of the error, or of the reason to skip."""
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "")
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^")]
    return " | ".join(lines[:1] + lines[-1:] if len(lines) > 3 else lines)[:400]


def pytest_runtest_logreport(report) -> None:
    global _broken
    worker = "PYTEST_XDIST_WORKER" in os.environ
    if worker:
        _broken = _broken or (report.failed and rows.breaks_device(str(report.longrepr)))
        return
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        found = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        found |= {"error": _reason(report), "where": f"{crash.path}:{crash.lineno}" if crash is not None else ""}
        with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def pytest_collectreport(report) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        text = str(report.longrepr).strip().splitlines()
        found = {
            "test": report.nodeid,
            "outcome": "failed",
            "seconds": 0.0,
            "error": text[-1][:400] if text else "",
            "where": "",
        }
        with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def pytest_runtest_logfinish(nodeid, location) -> None:
    """After an illegal access every later test of this worker would fail too: another one takes its place."""
    if _broken and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(70)
