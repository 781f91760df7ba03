"""Runs a step in a process of its own, watches how far it is, and starts another one behind whatever ended it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import rows

LOG = "log.txt"
KEPT = 12_000  # characters of a process's output, of which the end says most
GRACE = 5.0  # seconds that a process may take beyond its step's end: to import, and to leave


@dataclass(frozen=True)
class Settings:
    folder: Path
    device: str
    rehearse: bool
    cases: tuple[str, ...]
    methods: tuple[str, ...]


def run_step(step: str, seconds: float, settings: Settings, shards: int = 1) -> str:
    """Returns "done", "timed out" or what else ended it; never raises for what a step does."""
    with ThreadPoolExecutor(shards) as pool:
        outcomes = pool.map(lambda shard: _run_shard(step, f"{shard}/{shards}", seconds, settings), range(shards))
        return next((outcome for outcome in outcomes if outcome != "done"), "done")


def _run_shard(step: str, shard: str, seconds: float, settings: Settings) -> str:
    end = time.time() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        progress = Path(scratch) / "progress.jsonl"
        while True:
            begun = len(_begun(progress))
            outcome = _run_process(step, shard, end, progress, Path(scratch) / "output", settings)
            if outcome == "done" or end - time.time() < GRACE or len(_begun(progress)) == begun:
                return outcome


def _run_process(step: str, shard: str, end: float, progress: Path, output: Path, settings: Settings) -> str:
    command = [sys.executable, "-X", "faulthandler", "-m", "bench.gpu.child", step, "--folder", settings.folder]
    command += ["--shard", shard]
    command += ["--progress", progress, "--end", str(end), "--device", settings.device]
    command += ["--rehearse"] if settings.rehearse else []
    command += ["--case", *settings.cases] if settings.cases else []
    command += ["--method", *settings.methods] if settings.methods else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=rows.REPOSITORY, env=environment, stdout=file, stderr=file,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    reason = ""
    try:
        while process.poll() is None:
            time.sleep(0.05)
            if reason := _too_long(progress, end):
                break
    finally:
        if process.poll() is None:
            _kill(process)
    text = output.read_text(errors="replace")
    _log(settings.folder / LOG, step, text, reason or f"exit status {process.returncode}")
    item = _open_item(progress)
    if item is not None:  # it did not get to say how the item ended
        status = "timed out" if reason else "died"
        note = reason or f"exit status {process.returncode}{_signal_name(process.returncode)}"
        found = {"step": step, "item": item, "status": status, "error": note, "where": _last_line_of_ours(text)}
        rows.append(settings.folder / rows.NAME, found)
        rows.append(progress, {"item": item, "end": time.time()})
        return status
    if reason:
        return "timed out"
    return "done" if process.returncode == 0 else f"exit status {process.returncode}"


def _begun(progress: Path) -> list[dict]:
    return [row for row in rows.read(progress) if "begin" in row]


def _open_item(progress: Path) -> str | None:
    last = rows.read(progress)[-1:]
    return last[0]["item"] if last and "begin" in last[0] else None


def _too_long(progress: Path, end: float) -> str:
    now = time.time()
    last = rows.read(progress)[-1:]
    if last and "begin" in last[0] and now > last[0]["begin"] + last[0]["seconds"]:
        return f"not done after {last[0]['seconds']:.0f} s"
    return "its step's time was over" if now > end + GRACE else ""


def _kill(process: subprocess.Popen) -> None:
    """It says first where it is; then it and all that it started is killed."""
    try:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:  # stuck in the driver
        pass


def _signal_name(status: int | None) -> str:
    return f" ({signal.Signals(-status).name})" if status is not None and status < 0 else ""


def _last_line_of_ours(text: str) -> str:
    """Of the traceback that faulthandler left: the innermost line of this repository."""
    for file, line in re.findall(r'File "([^"]+)", line (\d+)', text):
        if ours := rows.OURS.match(file):
            return f"{ours[1]}:{line}"
    return ""


def _log(path: Path, step: str, text: str, reason: str) -> None:
    if len(text) > KEPT:
        text = f"[...]\n{text[-KEPT:]}"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"===== {step}: {reason}\n{text}\n")
