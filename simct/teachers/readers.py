"""Long answers of a teacher's server read in processes of their own: JSON of 64 log-probabilities a row is 8 MB for 1,500 tokens,
and one interpreter reads some 25 MB of it a second, whatever its threads.

`python -m simct.teachers.readers` is such a process. It gets answers on its standard input and gives arrays on its standard output:
no pickles, and no fork of a process that may hold a GPU.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from simct.teachers.formats import FORMATS, Scores

LONG = 1 << 20  # bytes of an answer that is worth sending on


class Unread(Exception):
    """What came is no answer that holds scores: whoever has it may say more of it."""


class Readers:
    """At most `count` processes, started when they are first needed. Any thread may call `read`; each call has one for itself.

    They end with this object, and by themselves when this process does.
    """

    def __init__(self, count: int) -> None:
        self._idle: list[subprocess.Popen] = []
        self._free, self._lock = threading.Semaphore(count), threading.Lock()
        self._end = weakref.finalize(self, _close, self._idle)

    def read(self, content: bytes, **asked: Any) -> Scores:
        """`asked`: the name of a format as `server`, and the arguments of its `scores` but the answer. RuntimeError for an answer
        that is not what was asked for; Unread for what is no JSON, or an error."""
        with self._free:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            process = _started() if process is None or process.poll() is not None else process
            try:
                found = _ask(process, content, asked)
            except BaseException as error:
                process.kill()
                process.wait()
                if isinstance(error, (OSError, EOFError)):  # it has ended, for want of memory say: it can be read here
                    raise Unread from None
                raise
            with self._lock:
                self._idle.append(process)
        if isinstance(found, Scores):
            return found
        raise Unread if found is None else RuntimeError(found)


def default_count() -> int:
    """Readers where nobody says how many: half of the cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // 2))


def _started() -> subprocess.Popen:
    command = [sys.executable, "-m", "simct.teachers.readers"]
    paths = os.pathsep.join(filter(None, sys.path))  # also what a program has put there
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": paths}
    # A session of its own: an interrupt from the keyboard is for the run, which then lets it go.
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


def _close(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        with suppress(OSError):
            process.stdin.close()  # at its end they end
        process.wait()
        process.stdout.close()


def _ask(process: subprocess.Popen, content: bytes, asked: dict[str, Any]) -> Scores | str | None:
    process.stdin.write(json.dumps({**asked, "bytes": len(content)}).encode() + b"\n")
    process.stdin.write(content)
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise EOFError
    said = json.loads(line)
    if "n" not in said:
        return said["problem"]
    n, k = said["n"], said["k"]
    arrays = [
        np.frombuffer(process.stdout.read(4 * count), dtype)
        for count, dtype in ((n * k, np.int32), (n * k, np.float32), (n, np.float32))
    ]
    return Scores(arrays[0].reshape(n, k), arrays[1].reshape(n, k), arrays[2])


def _scores(content: bytes, server: str, **asked: Any) -> Scores | str | None:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(answer, dict) and (answer.get("error") or answer.get("object") == "error"):
        return None
    try:
        return FORMATS[server]().scores(answer, **asked)
    except RuntimeError as error:
        return str(error)


def main() -> None:
    given, back = sys.stdin.buffer, sys.stdout.buffer
    while line := given.readline():
        asked: dict[str, Any] = json.loads(line)
        found = _scores(given.read(asked.pop("bytes")), **asked)
        if isinstance(found, Scores):
            n, k = found.topk_ids.shape
            parts: Sequence[np.ndarray] = (found.topk_ids, found.topk_logprobs, found.token_logprobs)
            back.write(json.dumps({"n": n, "k": k}).encode() + b"\n")
            for part in parts:
                back.write(np.ascontiguousarray(part).tobytes())
        else:
            back.write(json.dumps({"problem": found}).encode() + b"\n")
        back.flush()


if __name__ == "__main__":
    main()
