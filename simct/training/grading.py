"""Is a response right? Its boxed or last expression against the answer, by math-verify; and how often samples are.

math-verify's own time limit is a Unix signal: it holds only in the main thread, and not inside one long multiplication. So it
runs in a process of its own, one for all threads, which is ended and started again where an answer takes too long.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue

from simct.training.metrics import ratio_with_standard_error

_START = 120.0  # seconds that the process may take to import what it needs


def check_math_verify() -> None:
    """ValueError unless math-verify is installed."""
    if find_spec("math_verify") is None:
        raise ValueError("grading needs math-verify, which is not installed: pip install 'simct[math]'")


def is_correct(response: str, answer: str, *, timeout: float = 10.0) -> bool:
    """Whether the response's last \\boxed{...}, or without one its last expression, equals the answer: as a number, as LaTeX
    mathematics, or in a box as the same text. Of an answer that ends in "#### 18" (GSM8K), 18 counts.

    Never raises for what stands in a text. What takes longer than `timeout` seconds is wrong, with a warning. Any thread may call
    it; one comparison runs at a time. ValueError if math-verify is not installed.
    """
    check_math_verify()
    return _worker.ask(answer, response, timeout)


def accuracy(correct: Sequence[Sequence[bool]]) -> dict[str, float]:
    """What the grades of several samples a prompt (at least one each) say of the model.

    Returns:
        prompts: their number; samples: the mean number of samples a prompt, n
        pass@1: the share of right samples, the mean of n; pass@1_stderr: over prompts, as samples of one prompt are not independent
        pass@n: the share of prompts with a right one among their samples; pass@n_stderr
    NaN for no prompts; a standard error is NaN for one.
    """
    for i, grades in enumerate(correct):
        if not len(grades):
            raise ValueError(f"correct[{i}] is empty: expected the grade of at least one sample of each prompt")
    sizes = [len(grades) for grades in correct]
    one, one_error = ratio_with_standard_error([sum(map(bool, grades)) for grades in correct], sizes)
    some, some_error = ratio_with_standard_error([any(grades) for grades in correct], [1] * len(sizes))
    return {
        "prompts": len(sizes),
        "samples": sum(sizes) / len(sizes) if sizes else float("nan"),
        "pass@1": one,
        "pass@1_stderr": one_error,
        "pass@n": some,
        "pass@n_stderr": some_error,
    }


class _Worker:
    """The process, started when it is first asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner = 0
        self.replies: Queue[str] = Queue()

    def ask(self, answer: str, response: str, timeout: float) -> bool:
        line = json.dumps([answer, response])  # ASCII: no sampled character can end the line or fail to be encoded
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self._start()
            try:
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
                reply = self.replies.get(timeout=timeout)
            except (Empty, OSError):
                reply = None
            if reply in ("true", "false"):
                return reply == "true"
            self.stop()
        how = "ended the process that grades" if reply == "" else f"was not done in {timeout:g} s"
        warnings.warn(f"comparing a response with the answer {answer[:60]!r} {how}: it counts as wrong", stacklevel=3)
        return False

    def _start(self) -> None:
        path = os.pathsep.join(p for p in sys.path if p)
        self.owner, self.replies = os.getpid(), Queue()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("grading_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        threading.Thread(target=_forward, args=(self.process.stdout, self.replies), daemon=True).start()
        try:
            ready = self.replies.get(timeout=_START)
        except Empty:
            ready = ""
        if ready != "ready":
            self.stop()
            raise RuntimeError(
                "the process that grades answers with math-verify could not be started: is it installed whole?"
            )

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process = None


def _forward(lines, replies: Queue) -> None:
    for line in lines:
        replies.put(line.strip())
    replies.put("")  # the process has ended


_worker = _Worker()
atexit.register(_worker.stop)
