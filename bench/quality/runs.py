"""One run of the study: a pair, an arm, a learning rate and a seed, trained and judged."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback, TrainerCallback, get_cosine_schedule_with_warmup
from transformers.utils import logging

from bench.measure import device_name
from bench.record import commit
from simct import SimCTConfig, SimCTTrainer
from simct.models.hidden import response_hidden_states
from simct.training.micro_batches import split

from .arms import ARMS, Arm
from .judges import Judge, Scope
from .sampling import engine


class Key(NamedTuple):
    """What a row is the row of. `split`: "validation" (to choose a learning rate) or "test"; arm "none" is the student before."""

    pair: str
    arm: str
    learning_rate: float
    seed: int
    split: str


@dataclass(frozen=True)
class Plan:
    """How long a run is, and how it is judged: `last` after it, `along` before it and every `every` steps."""

    steps: int = 600
    prompts: int = 32  # of a step
    tokens: int = 24  # of a response, at most: a right one is done by then
    every: int = 100
    last: Scope = Scope(sums=500, draws=8, texts=750, whole=True)
    along: Scope = Scope(sums=128, draws=2, texts=128)


@dataclass(frozen=True)
class Data:
    """`train`, `held_out`: records to sample from and to be judged on. `teacher_train`, `teacher_held_out`: the teacher's samples,
    those to be judged on at temperature 1; records with `prompt`, `completion` and `logprob`."""

    train: list[dict]
    held_out: list[dict]
    teacher_train: list[dict]
    teacher_held_out: list[dict]


def run(
    key: Key, student: str | Path, teacher: str | Path, data: Data, plan: Plan, device: str = "cpu", **options: Any
) -> list[dict[str, Any]]:
    """Rows: one of the judges after the last step, and one of those along the run for each `plan.every` steps (`curve` tells them
    apart). Deterministic but for its seconds. `options` of `SimCTConfig` go before the arm's."""
    if device == "cpu":
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    arm = ARMS.get(key.arm)
    drawn = random.Random(key.seed).sample(data.teacher_train, min(plan.steps * plan.prompts, len(data.teacher_train)))
    train = drawn if arm and arm.data != "student" and not arm.sft else data.train
    curve: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(key, arm, student, teacher, train, plan, scratch, {"use_cpu": device == "cpu", **options})
        judge = Judge(trainer, data.held_out, data.teacher_held_out)

        def along(step: int) -> None:
            if step % plan.every == 0:
                curve.append({"step": step, **judge(plan.along)})

        begun = time.perf_counter()
        if arm:
            along(0)
            if arm.sft:
                finetune(trainer, drawn, plan.steps, along)
            else:
                trainer.add_callback(_Along(along))
                trainer.train()
        trained = time.perf_counter() - begun
        found = judge(plan.last)
        log = [row for row in trainer.state.log_history if "loss" in row]
    common = {**key._asdict(), "steps": plan.steps if arm else 0}
    share = {f"{n}_{when}": row[f"tokens/{n}"] for row, when in zip(log[:1] + log[-1:], ("first", "last"), strict=False)
             for n in ("single", "longer") if f"tokens/{n}" in row}  # fmt: skip
    seconds = {"train_seconds": trained, "seconds": time.perf_counter() - started}
    last = {
        **common,
        "curve": False,
        **found,
        **share,
        **seconds,
        "machine": device_name(torch.device(device)),
        "commit": commit(),
    }
    return [last, *({**common, "curve": True, **row} for row in curve)]


def _trainer(
    key: Key, arm: Arm | None, student, teacher, train, plan: Plan, scratch: str, options: dict
) -> SimCTTrainer:
    common = dict(
        output_dir=scratch, max_steps=plan.steps, per_device_train_batch_size=plan.prompts, learning_rate=key.learning_rate,
        seed=key.seed, max_new_tokens=plan.tokens, prompt_format="text", logging_steps=plan.every, logging_first_step=False,
        per_device_eval_batch_size=256, save_strategy="no", disable_tqdm=True, report_to=[],
        bf16=False, gradient_checkpointing=False,  # on a GPU as on a CPU
        on_nonfinite="skip",  # a student that collapses may leave a step without a unit
    )  # fmt: skip
    config = SimCTConfig(**{**common, **options, **(arm.options if arm else {})})
    trainer = SimCTTrainer(str(student), str(teacher), config, train)
    trainer.remove_callback(PrinterCallback)
    render = _Rendered(trainer.student_prompt)
    trainer.student_prompt = trainer.collector.render = render
    for name, scorer in trainer.scorers.items():
        trainer.scorers[name] = replace(scorer, render=_Rendered(scorer.render))
    if config.device.type == "cpu":
        trainer.engine = trainer.collector.engine = engine(trainer.accelerator.unwrap_model(trainer.model))
    return trainer


class _Rendered:
    """A renderer that remembers its prompts: they come again and again, and a tenth of a small model's step is spent on them."""

    def __init__(self, render: Callable[[dict], list[int]]) -> None:
        self.render, self.known = render, {}

    def __call__(self, record: dict) -> list[int]:
        prompt = record["prompt"]
        if prompt not in self.known:
            self.known[prompt] = self.render(record)
        return self.known[prompt]


class _Along(TrainerCallback):
    def __init__(self, along: Callable[[int], None]) -> None:
        self.along = along

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.along(state.global_step)


def finetune(trainer: SimCTTrainer, records: list[dict], steps: int, along: Callable[[int], None]) -> None:
    """Cross entropy on the records' completions, `trainer`'s batch of them a step and with its optimiser's settings; the teacher is
    not asked."""
    args = trainer.args
    student = trainer.accelerator.unwrap_model(trainer.model).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    for step in range(steps):
        start = step * args.per_device_train_batch_size % len(records)
        samples = trainer.answers(records[start : start + args.per_device_train_batch_size])
        (batch,) = split(samples, trainer.layout, None, trainer.default_teacher)
        hidden = response_hidden_states(student, batch.packed.to(args.device))
        logits = student.get_output_embeddings()(hidden)
        targets = torch.tensor([i for ids in samples.student_responses for i in ids], device=args.device)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        along(step + 1)
