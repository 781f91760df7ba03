"""Programs in processes of their own that start at once: forked from one that has imported what they need, and computed nothing.

`python -m simct.commands.cli` spends ten seconds of a core on imports. A test marked `slow` starts it as a user does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SERVER = """
import gc, json, os, runpy, sys, traceback
import simct.commands.cli, simct.training.plots, simct.training.trainer

simct.training.plots.plot_curves = simct.training.plots.plot_phases = lambda *_: None  # most of what a short run takes
gc.freeze()

for line in sys.stdin:
    given = json.loads(line)
    if given.get("wait") is not None:
        pid, status = os.waitpid(given["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    code = 1
    try:
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(given["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.update(given["environment"])
        sys.argv = given["command"]
        if given["module"]:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
"""


class Program:
    """A running program: `kill` it, or `finish` it and read what it printed."""

    def __init__(self, programs: "Programs", pid: int, output: Path) -> None:
        self.programs, self.pid, self.output = programs, pid, output

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, once it has ended. To be asked no more after that."""
        return self.programs.ask(wait=self.pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def finish(self, seconds: float = 300) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"not done after {seconds} s:\n{self.output.read_text()[-3000:]}")
            time.sleep(0.02)
        return code


class Programs:
    """The process that they are forked from. A context manager."""

    def __enter__(self) -> "Programs":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exception) -> None:
        self._server.stdin.close()
        self._server.wait(60)

    def ask(self, **given):
        self._server.stdin.write(json.dumps(given) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, command: list, output: Path, *, module: bool = True, **environment: str) -> Program:
        """`python -m COMMAND`, or a script's path and its arguments."""
        words = [str(word) for word in command]
        pid = self.ask(command=words, output=str(output), module=module, environment=environment)
        return Program(self, pid, output)

    def run(self, command: list, output: Path, **options) -> str:
        """What it printed, where it ended well."""
        code = self.start(command, output, **options).finish()
        assert code == 0, output.read_text()[-3000:]
        return output.read_text()
