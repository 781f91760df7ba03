"""A folder of the study, and the processes that fill it up."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from rich.console import Console

from simct.files import replaced

from .judges import TEMPERATURE
from .results import Results
from .runs import Data, run
from .settings import STUDENTS, TEACHER, draw_teacher, is_made, make_model
from .study import Design, Task, data_of, tasks
from .texts import Texts


class Study:
    """A folder with `models/`, `teacher_samples.json` and the rows, filled up by `finish`."""

    def __init__(self, folder: Path, design: Design, texts: Texts, results: Results, console: Console) -> None:
        self.folder, self.design, self.texts, self.results, self.console = folder, design, texts, results, console
        self.models = folder / "models"
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
        if task.kind == "run":
            return {*data_of([task.key.arm]), Task("student", task.pair, task.seed)}
        return {Task("teacher")} if task.kind == "data" else set()

    def _model(self, task: Task) -> tuple:
        """The arguments of `make_model`, but for the folder."""
        if task.kind == "teacher":
            return TEACHER, self.design.sizes["teacher"], self.texts, 0
        # A pair's seeds are its own, as its tokenizer is.
        return STUDENTS[task.pair], self.design.sizes["student"], self.texts, 1 + task.seed

    def _folder(self, task: Task) -> Path:
        return self.models / ("teacher" if task.kind == "teacher" else f"{task.pair}-{task.seed}")

    def _samples(self, task: Task) -> Path:
        return self.folder / ("teacher_samples_sharp.json" if task.pair == "sharp" else "teacher_samples.json")

    def _is_made(self, task: Task) -> bool:
        return self._samples(task).is_file() if task.kind == "data" else is_made(self._folder(task), *self._model(task))

    def _call(self, task: Task) -> tuple:
        plan = self.design.test
        if task.kind == "data":
            return (
                write_samples,
                self._samples(task),
                self.models / "teacher",
                self.texts,
                plan.steps * plan.prompts,
                plan.tokens,
                TEMPERATURE if task.pair == "sharp" else 1.0,
            )
        if task.kind != "run":
            return make_model, self._folder(task), *self._model(task)
        student = self.models / f"{task.pair}-{task.seed}"
        samples = [self._samples(each) for each in data_of([task.key.arm])]
        return run_one, task.key, student, self.models / "teacher", self.texts, samples, self.design.plan(task.key)


def write_samples(
    path: Path, teacher: Path, texts: Texts, responses: int, tokens: int, temperature: float = 1.0
) -> None:
    with replaced(path) as file:
        # Half as many again: what ends within a student's budget in its tokens ends here, too.
        json.dump(draw_teacher(teacher, texts, responses, tokens * 3 // 2, temperature), file)


def run_one(key, student: Path, teacher: Path, texts: Texts, samples: list[Path], plan) -> list[dict]:
    """`samples`: to be judged on, and those to learn from if they are others."""
    own = json.loads(samples[-1].read_text())["train"]
    judged = json.loads(samples[0].read_text())[key.split]
    held_out = {"validation": texts.validation, "test": texts.test}[key.split]
    return run(key, student, teacher, Data(texts.train, held_out, own, judged), plan)
