"""One process of the study: learns a model, or runs an arm once its models are there."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from bench.gpu import rows
from bench.quality.means import mean_with_error
from simct.data.renderer import Renderer
from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.transformers_engines import StaticBatching

from .models import VOCABULARIES, Documents, Learner, body_parameters, learn_to, learn_until
from .plan import Study, Task, student_name
from .problems import Problem, Problems, answer_of, make_problems
from .runs import run_arm


class Writer:
    """What a model in training writes: its own samples."""

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, study: Study) -> None:
        self.model, self.tokenizer, self.study = model, tokenizer, study
        self.render, self.engine = Renderer(tokenizer, "text"), StaticBatching(model, 512)

    def draw(self, problems: list[Problem], temperature: float) -> list[Response]:
        ends = (self.tokenizer.eos_token_id,)
        sampling = Sampling(ends, self.tokenizer.pad_token_id, self.study.new_tokens, temperature)
        prompts = [self.render({"prompt": problem.prompt}) for problem in problems]
        device = self.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return self.engine.generate(prompts, sampling, seed=len(problems))

    def text(self, response: Response) -> str:
        return self.tokenizer.decode(response.token_ids, skip_special_tokens=True)

    def right(self, problems: list[Problem], temperature: float) -> list[bool]:
        found = self.draw(problems, temperature)
        return [answer_of(self.text(response)) == one.answer for response, one in zip(found, problems, strict=True)]

    def accuracy(self, problems: list[Problem]) -> float:
        return mean_with_error(self.right(problems, self.study.temperature))[0]


def learn(task: Task, study: Study, problems: Problems, folder: Path, record) -> None:
    """`folder/NAME`, there at once and whole: the model, and of a teacher also what it answers to the held-out problems."""
    kind, vocabulary, *number = task.name.split("-")
    teaches, seed = kind == "teacher", int(number[0]) if number else 0
    size, tokenizer = study.teacher if teaches else study.student, VOCABULARIES[vocabulary]()
    model = size.model(tokenizer, seed).to(study.device)
    documents = Documents.build(problems.documents, tokenizer, model.config.vocab_size, study.device)
    learner, writer = Learner(model, documents, size.rate, study.learn_batch, seed), Writer(model, tokenizer, study)
    end = study.learn_end(time.time())
    asked = problems.train[:256]  # in no document, and judged by nobody

    def said(step: int, loss: float, accuracy: float) -> None:
        record(what="learn", step=step, loss=loss, accuracy=accuracy)

    def accuracy() -> float:
        return writer.accuracy(asked)

    if teaches:
        learn_until(learner, end, study.learn_steps, accuracy, study.seconds / 30, said)
    else:
        learn_to(learner, study.target, end, study.learn_steps, accuracy, study.learn_every, said)
    made = folder / f"{task.name}.part"
    model.eval().save_pretrained(made)
    if teaches:
        drawn = writer.draw(problems.held_out, 1.0)
        with (made / "texts.jsonl").open("w") as file:
            for problem, response in zip(problems.held_out, drawn, strict=True):
                if response.finish_reason == "stop":
                    file.write(json.dumps({"prompt": problem.prompt, "completion": writer.text(response)}) + "\n")
    made.rename(folder / task.name)
    sizes = {"parameters": model.num_parameters(), "body_parameters": body_parameters(model)}
    record(what="model", step=learner.steps, used_tokens=len(documents.used), vocabulary=len(tokenizer), **sizes)
    if teaches:
        for name, temperature in ("accuracy", study.temperature), ("accuracy_greedy", 0.0), ("accuracy_1", 1.0):
            mean, error = mean_with_error(writer.right(problems.held_out, temperature))
            record(what="teacher", judge=name, mean=mean, stderr=error, problems=len(problems.held_out))


def wait_for_models(task: Task, study: Study, folder: Path) -> None:
    student, teacher = task.direction.split("<-")
    needed = [folder / student_name(student, task.seed), folder / f"teacher-{teacher}"]
    while missing := [path.name for path in needed if not path.is_dir()]:
        if time.time() > study.train_end:
            raise TimeoutError(f"{' and '.join(missing)} did not come in time")
        time.sleep(0.2)


def main(arguments: list[str]) -> None:
    """FOLDER ROWS TASK, the last as JSON."""
    folder, path, task = Path(arguments[0]), Path(arguments[1]), Task(*json.loads(arguments[2]))
    study = Study.read(folder)
    key = {"item": "/".join(str(part) for part in task[1:] if part), "arm": task.name}
    key |= {"direction": task.direction, "seed": task.seed}

    def record(**row: Any) -> None:
        row = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        rows.append(path, {**key, **row, "time": round(time.time() - study.begin, 1)})

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        problems = make_problems(study.documents if task.kind == "learn" else 0, study.prompts, study.held_out)
        if task.kind == "learn":
            learn(task, study, problems, folder, record)
        else:
            for vocabulary in task.direction.split("<-"):
                VOCABULARIES[vocabulary]()  # kept: made while the models learn
            wait_for_models(task, study, folder)
            if study.device == "cuda":  # beyond it a process gives back what it keeps, or works in halves
                torch.cuda.set_per_process_memory_fraction(study.memory_share)
            run_arm(task, study, problems, folder, record)
    except Exception as error:
        record(what="error", error=rows.short(error), where=rows.where(error))
        raise
    finally:
        shutil.rmtree(folder / f"{task.name}.part", ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for the device's own clean-up


if __name__ == "__main__":
    main(sys.argv[1:])
