"""`python -m bench.quality.real`: trains the models, runs the arms side by side, and shows what came of it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import rows

from . import show
from .plan import ARMS, DIRECTIONS, Study, Task, small

ROWS, TABLE, LOG = "study.jsonl", "study.txt", "study-log.txt"
KEPT = 3000  # characters of each process's output
PATIENCE = 40.0  # seconds after the first arm's pace that the others' are waited for


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.real", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (%(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="of bench.quality.arms (%(default)s)")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=JSON", help="any other field of plan.Study")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy size: its numbers mean nothing")
    parser.add_argument("--show", action="store_true", help="only summary and picture, of the rows that are there")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.show:
        given = {"arms": tuple(options.arms), "directions": tuple(options.directions), "seeds": options.seeds}
        given |= {"seconds": 60 * options.minutes}
        if options.rehearse:
            given |= small()
        given |= {name: json.loads(value) for name, value in (text.split("=", 1) for text in options.set)}
        run(Study(**given), options.output / ROWS, options.output / LOG)
    text = show.write(options.output / ROWS)
    (options.output / TABLE).write_text(text + "\n", encoding="utf-8")
    print(text)


def run(study: Study, path: Path, log: Path) -> None:
    """Every task in a process of its own. Rows are in `path` as soon as they are known; nothing that a task does keeps another
    one's from it. The ends of the processes' outputs are appended to `log`."""
    path.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="simct-study-"))
    study.write(folder)
    processes: dict[Task, subprocess.Popen] = {}
    try:
        waiting = study.tasks()
        arms_from = time.time() + (15.0 if study.device == "cuda" else 0.0)  # the models' processes import first
        while True:
            for task in list(waiting):
                if task.kind == "learn" or time.time() >= arms_from:
                    processes[task] = _start(task, folder, path)
                    waiting.remove(task)
            _plan(study, folder, path, processes)
            _stop_what_waits_in_vain(processes, folder)
            running = [task for task, process in processes.items() if process.poll() is None]
            if not waiting and not running:
                break
            if time.time() > study.end:
                print(f"out of time: {', '.join('/'.join(map(str, task)) for task in running)}", flush=True)
                break
            time.sleep(0.2)
    finally:
        for process in processes.values():
            _kill(process)
        _write_log(processes, folder, log)
        shutil.rmtree(folder, ignore_errors=True)


def _start(task: Task, folder: Path, path: Path) -> subprocess.Popen:
    threads = "1" if task.kind == "arm" else "2"
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false" if task.kind == "arm" else "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.quality.real.worker", str(folder), str(path.resolve()), json.dumps(task)]
    with _log_of(task, folder).open("wb") as file:
        return subprocess.Popen(
            command, cwd=rows.REPOSITORY, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )


def _plan(study: Study, folder: Path, path: Path, processes: dict[Task, subprocess.Popen]) -> None:
    """How many steps there is time for, the same for all arms, once their pace is known."""
    plan = folder / "plan.json"
    if plan.is_file():
        return
    paces = [row for row in rows.read(path) if row.get("what") == "pace"]
    running = [task for task, process in processes.items() if task.kind == "arm" and process.poll() is None]
    now = time.time()
    if not paces or (len(paces) < len(running) and now - study.begin - paces[0]["time"] < PATIENCE):
        return
    slowest = max(row["seconds_a_step"] for row in paces)
    steps = study.affordable_steps(slowest, now)
    made = folder / "plan.part"
    made.write_text(json.dumps({"steps": steps}))
    made.rename(plan)
    found = {"what": "plan", "steps": steps, "seconds_a_step": slowest, "paces": len(paces), "arms": len(running)}
    rows.append(path, {**found, "wanted": study.steps, "time": round(now - study.begin, 1)})
    print(f"[{now - study.begin:4.0f} s] {steps} steps for every arm: the slowest takes {slowest:.2f} s", flush=True)


def _stop_what_waits_in_vain(processes: dict[Task, subprocess.Popen], folder: Path) -> None:
    failed = [task.name for task, process in processes.items() if task.kind == "learn" and process.poll()]
    for task, process in processes.items():
        if task.kind == "arm" and process.poll() is None:
            student, teacher = task.direction.split("<-")
            if {f"student-{student}-{task.seed}", f"teacher-{teacher}"}.intersection(failed):
                _kill(process)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # stuck in the driver
            pass


def _log_of(task: Task, folder: Path) -> Path:
    return folder / f"log-{'-'.join(str(part) for part in task if part).replace('<-', '-from-')}.txt"


def _write_log(processes: dict[Task, subprocess.Popen], folder: Path, path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        for task, process in processes.items():
            text = _log_of(task, folder).read_text(errors="replace")
            file.write(f"===== {' '.join(map(str, task))}: exit status {process.returncode}\n{text[-KEPT:]}\n")


if __name__ == "__main__":
    main()
