"""`python -m bench.quality`: trains the pairs, runs every arm on each, and writes CSV, tables and plots. Run again, it goes on.

CONTRASTS.md says what is asked, docs/evidence.md what came out. Hours of two cores; a run is one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench.record import REPOSITORY
from simct.files import replaced

from . import plots, show
from .results import Results
from .runs import Data, run
from .settings import STUDENTS, TEACHER, draw_teacher, is_made, make_model
from .study import QUICK, Design, Task, tasks
from .texts import Texts, make_texts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--output", type=Path, help="default: bench/results/quality")
    parser.add_argument("--pairs", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, help="at most, of the test runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--show", action="store_true", help="run nothing: tables and plots of what is there")
    parser.add_argument(
        "--quick", action="store_true", help="tiny: shows that everything runs, its numbers mean nothing"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be fetched
    folder = options.output or REPOSITORY / "bench" / "results" / "quality"
    if options.quick and options.output is None:
        parser.error("--quick needs --output: its numbers are not to be kept beside real ones")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if os.isatty(1) else 200)
    design = QUICK if options.quick else Design()
    groups = tuple(tuple(pair for pair in group if pair in options.pairs) for group in design.groups)
    design = replace(design, groups=tuple(filter(None, groups)))
    if options.seeds is not None:
        design = replace(design, seeds={pair: min(n, options.seeds) for pair, n in design.seeds.items()})
    results = Results(folder)
    if not options.show:
        texts = make_texts(**design.prompts)
        Study(folder, design, texts, results, console).finish(options.workers)
    for pair in design.pairs:
        console.print(show.table(design, results.rows, pair))
    show.write_markdown(results.rows, design, folder)
    plots.plot_curves(results.rows, results.curves, design, folder / "curves.png")
    plots.plot_rates(results.rows, design, folder / "rates.png")
    console.print(f"results: {folder}", highlight=False)


class Study:
    """A folder with `models/`, `teacher_samples.json` and the rows, filled up by `finish`."""

    def __init__(self, folder: Path, design: Design, texts: Texts, results: Results, console: Console) -> None:
        self.folder, self.design, self.texts, self.results, self.console = folder, design, texts, results, console
        self.models, self.samples = folder / "models", folder / "teacher_samples.json"
        self.made = {task for task in tasks(design, results.rows) if task.kind != "run" and self._is_made(task)}

    def finish(self, workers: int) -> None:
        """Everything that is left, in the order of `tasks`: each free process takes the first that can be done. What fails is told
        and left for the next call; RuntimeError at the end then."""
        context = multiprocessing.get_context("spawn")  # forked threads of torch would wait for ever
        running: dict[Future, tuple[Task, float]] = {}
        failed: set[Task] = set()
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            while True:
                while len(running) < workers and (task := self._next(failed | {t for t, _ in running.values()})):
                    running[pool.submit(*self._call(task))] = task, time.perf_counter()
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    task, begun = running.pop(done)
                    name = " ".join(map(str, task.key or (task.kind, task.pair, task.seed)))
                    if done.exception() is not None:
                        failed.add(task)
                        self.console.print(f"{name}: {done.exception()!r}", markup=False)
                        continue
                    found = done.result()
                    if task.kind == "run":
                        self.results.add(found)
                    else:
                        self.made.add(task)
                    told = f", accuracy {found[0]['accuracy']:.1%}" if task.kind == "run" else ""
                    self.console.print(f"{time.strftime('%H:%M:%S')} {name}: {time.perf_counter() - begun:.0f} s{told}")
        if failed:
            raise RuntimeError(f"{len(failed)} of the study's tasks failed: their reasons are above")

    def _next(self, taken: set[Task]) -> Task | None:
        for task in tasks(self.design, self.results.rows):
            done = self.results.has(task.key) if task.kind == "run" else task in self.made
            if not done and task not in taken and self._needs(task) <= self.made:
                return task
        return None

    def _needs(self, task: Task) -> set[Task]:
        return {
            "data": {Task("teacher")},
            "run": {Task("data"), Task("student", task.pair, task.seed)},
        }.get(task.kind, set())

    def _model(self, task: Task) -> tuple:
        """The arguments of `make_model`, but for the folder."""
        if task.kind == "teacher":
            return TEACHER, self.design.sizes["teacher"], self.texts, 0
        # A pair's seeds are its own, as its tokenizer is.
        return STUDENTS[task.pair], self.design.sizes["student"], self.texts, 1 + task.seed

    def _folder(self, task: Task) -> Path:
        return self.models / ("teacher" if task.kind == "teacher" else f"{task.pair}-{task.seed}")

    def _is_made(self, task: Task) -> bool:
        return self.samples.is_file() if task.kind == "data" else is_made(self._folder(task), *self._model(task))

    def _call(self, task: Task) -> tuple:
        plan = self.design.test
        if task.kind == "data":
            return (
                write_samples,
                self.samples,
                self.models / "teacher",
                self.texts,
                plan.steps * plan.prompts,
                plan.tokens,
            )
        if task.kind != "run":
            return make_model, self._folder(task), *self._model(task)
        student = self.models / f"{task.pair}-{task.seed}"
        return run_one, task.key, student, self.models / "teacher", self.texts, self.samples, self.design.plan(task.key)


def write_samples(path: Path, teacher: Path, texts: Texts, responses: int, tokens: int) -> None:
    with replaced(path) as file:
        # Half as many again: what ends within a student's budget in its tokens ends here, too.
        json.dump(draw_teacher(teacher, texts, responses, tokens * 3 // 2), file)


def run_one(key, student: Path, teacher: Path, texts: Texts, samples: Path, plan) -> list[dict]:
    drawn = json.loads(samples.read_text())
    held_out = {"validation": texts.validation, "test": texts.test}[key.split]
    return run(key, student, teacher, Data(texts.train, held_out, drawn["train"], drawn[key.split]), plan)


if __name__ == "__main__":
    main()
