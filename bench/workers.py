"""Runs functions in a process of their own: what one of them allocates, breaks or never finishes is its own affair.

On a CPU every call has a fresh process, so that its peak memory is its own. On a GPU one process serves call after call,
until one of them takes too long or leaves the device in an error.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Failed(Exception):
    """The call gave no result; the message says why."""


class Worker:
    def __init__(self, device: str, *, fresh: bool) -> None:
        self.device, self.fresh = device, fresh  # fresh: a new process for each call
        if device == "cpu":
            # What is forked has imported what every call needs and computed nothing.
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(["bench.measure"])
        else:
            # An import may ask whether there is a GPU, and after that a fork cannot use it.
            self._context = multiprocessing.get_context("spawn")
        self._process = self._pipe = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def call(self, function: Callable, *arguments, seconds: float) -> Any:
        """Raises Failed if the function raises, if its process dies, or if it is not done within `seconds`."""
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs, self.device), daemon=False)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(seconds):
                raise Failed(f"not done after {seconds:.0f} s")
            result, reason, broken = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._stop()
            raise Failed(f"its process died, exit code {code}" + (" (out of memory?)" if code == -9 else "")) from None
        except BaseException:
            self._stop()
            raise
        if self.fresh or broken:
            self._stop()
        if reason is not None:
            raise Failed(reason)
        return result

    def _stop(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(0 if self._process.exitcode is None else None)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe, device: str) -> None:
    if device == "cpu":
        _limit_memory()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (function(*arguments), None, False)
        except Exception as error:  # whatever it is, the other measurements go on
            answer = (None, _reason(error), _device_is_broken(error))
        pipe.send(answer)


def _reason(error: Exception) -> str:
    """One short line."""
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        return "out of memory" + (f" (asked for {asked[1]})" if asked else "")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _device_is_broken(error: Exception) -> bool:
    """After an illegal access every later call on the device fails too."""
    return "CUDA error" in str(error) or "HIP error" in str(error) or type(error).__name__ == "AcceleratorError"


def _limit_memory() -> None:
    """Asking for more than the machine has left is an error in this process, not the end of another (Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    import resource

    available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    used = 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(0.9 * available), hard))
