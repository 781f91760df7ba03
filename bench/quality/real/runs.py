"""One arm: a student trained, and judged on held-out problems."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from bench.quality.arms import ARMS
from bench.quality.means import mean_with_error
from simct import SimCTConfig, SimCTTrainer, TokenizerPair
from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.transformers_engines import StaticBatching
from simct.training.evaluation import score
from simct.training.metrics import ratio_with_standard_error

from .losses import cross_entropy
from .models import VOCABULARIES
from .plan import PACE_STEPS, Study, Task, student_name
from .problems import Problem, Problems, answer_of

Record = Callable[..., None]
KEPT = (
    "loss", "grad_norm", "learning_rate", "response/length", "response/ended", "tokens/single", "tokens/longer",
    "teacher_mass", "reverse_kl_per_byte", "rollout/logprob_gap", "peak_memory_gb",
)  # fmt: skip


class TeacherWrites:
    """A rollout engine whose responses are the teacher's, at temperature 1, in the student's tokens: as many as the student's in
    the other arms."""

    def __init__(self, trainer: SimCTTrainer, batch: int) -> None:
        scorer = trainer.scorers[trainer.default_teacher]
        self.pair, records = scorer.pair, trainer.train_dataset
        self.prompts = {tuple(trainer.student_prompt(record)): scorer.render(record) for record in records}
        self.engine = StaticBatching(scorer.teacher.model, batch)
        self.back = TokenizerPair(scorer.teacher.tokenizer, trainer.processing_class, chat=False)

    def update_weights(self, model) -> None:
        """The teacher does not change."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        ends = self.pair.teacher_end_ids
        drawn = Sampling(ends, ends[0], sampling.max_new_tokens)
        found = self.engine.generate([self.prompts[tuple(prompt)] for prompt in prompts], drawn, seed=seed)
        last = self.pair.student_end_ids
        written = [ids or [last[0]] for ids in self.back.encode_teacher([response.token_ids for response in found])]
        return [Response(ids, "stop" if ids[-1] in last else "length") for ids in written]


class ArmTrainer(SimCTTrainer):
    """`SimCTTrainer` with a schedule that learns on the way how long it is. `imitates`: cross entropy on the responses, in place of
    a comparison with the teacher."""

    imitates = False
    planned: int | None = None  # steps of this run, once it is known

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Warms up, stays, and falls over the last 40 % of the steps."""

        def scale(step: int) -> float:
            left = 1.0 if self.planned is None else (self.planned - step) / max(1.0, 0.4 * self.planned)
            return min(1.0, (step + 1) / 8, max(0.1, left))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, scale)
        return self.lr_scheduler

    def _student_loss(self, student, part, in_step: bool):
        if not self.imitates:
            return super()._student_loss(student, part, in_step)
        hidden, head = self.student_rows(student, part.packed)
        ids = [i for response in part.samples.student_responses for i in response]
        targets = torch.tensor(ids, device=hidden.device)
        return cross_entropy(hidden, head.weight, targets, self.args.chunk_rows)


class Judge:
    """Judges a trainer's student as it is, on held-out problems.

    Args:
        texts: the teacher's responses to them at temperature 1, records with `prompt` and `completion`.
    """

    def __init__(self, trainer: ArmTrainer, study: Study, held_out: list[Problem], texts: list[dict]) -> None:
        self.trainer, self.study, self.held_out = trainer, study, held_out
        self.engine = trainer.engine  # the student's, also where an arm learns from what the teacher writes
        self.prompts = [trainer.student_prompt({"prompt": problem.prompt}) for problem in held_out]
        self.texts = trainer.answers(texts)

    def draw(self, count: int, temperature: float) -> list[Response]:
        trainer = self.trainer
        ends = trainer.pair.student_end_ids
        sampling = Sampling(ends, ends[0], self.study.new_tokens, temperature)
        self.engine.update_weights(trainer.accelerator.unwrap_model(trainer.model))
        with trainer.accelerator.autocast():
            return self.engine.generate(self.prompts[:count], sampling, seed=count)

    def right(self, responses: list[Response]) -> list[bool]:
        pieces = self.trainer.pair.student_pieces
        texts = [b"".join(p or b"" for p in pieces(r.token_ids)).decode("utf-8", "replace") for r in responses]
        return [answer_of(text) == one.answer for text, one in zip(texts, self.held_out, strict=False)]

    def along(self) -> dict[str, Any]:
        """What a curve is made of: one sample of each of the first problems."""
        return self._sampled(self.study.along)[0]

    def __call__(self) -> dict[str, Any]:
        """Everything, of all problems. `right`: one bit for each, as a hexadecimal number: arms are compared problem by problem."""
        found, right = self._sampled(len(self.held_out))
        found["accuracy_greedy"], found["accuracy_greedy_stderr"] = mean_with_error(
            self.right(self.draw(len(self.held_out), 0.0))
        )
        student = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = student.training
        student.eval()
        rows = [row for row in score(self.trainer, self.texts)[0] if row.bytes] if self.texts else []
        student.train(training)
        found["forward_kl_per_byte"], found["forward_kl_per_byte_stderr"] = ratio_with_standard_error(
            [-row.ratio for row in rows], [row.bytes for row in rows]
        )
        families: dict[str, list[bool]] = {}
        for problem, one in zip(self.held_out, right, strict=True):
            families.setdefault(problem.key[0], []).append(one)
        found |= {f"accuracy_{name}": sum(own) / len(own) for name, own in families.items()}
        return {**found, "right": f"{int(''.join(str(int(one)) for one in right), 2):x}"}

    def _sampled(self, count: int) -> tuple[dict[str, Any], list[bool]]:
        responses = self.draw(count, self.study.temperature)
        right, found = self.right(responses), {}
        found["accuracy"], found["accuracy_stderr"] = mean_with_error(right)
        found["ended"], _ = mean_with_error([r.finish_reason == "stop" for r in responses])
        found["length"], _ = mean_with_error([len(r.token_ids) for r in responses])
        return {**found, "problems": count}, right


class AlongTheWay(TrainerCallback):
    """Curves, logs and the pace, written as they come; and the end of the run, where the plan or the clock says so."""

    def __init__(self, trainer: ArmTrainer, judge: Judge, study: Study, folder: Path, record: Record) -> None:
        self.trainer, self.judge, self.study, self.record = trainer, judge, study, record
        self.plan, self.times, self.cut = folder / "plan.json", {}, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.record(what="curve", step=0, **self.judge.along())

    def on_step_end(self, args, state, control, **kwargs):
        step, trainer = state.global_step, self.trainer
        self.times[step] = time.time()
        first, last = PACE_STEPS
        if step == last:
            self.record(what="pace", step=step, seconds_a_step=(self.times[last] - self.times[first]) / (last - first))
        if trainer.planned is None and self.plan.is_file():
            trainer.planned = max(step, json.loads(self.plan.read_text())["steps"])
        self.cut = time.time() > self.study.train_end
        control.should_training_stop = self.cut or step >= (trainer.planned or self.study.steps)
        if step % self.study.every == 0:
            self.record(what="curve", step=step, **self.judge.along())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            kept = {name.replace("/", "_"): logs[name] for name in KEPT if name in logs}
            seconds = {name.replace("/", "_"): value for name, value in logs.items() if name.startswith("seconds/")}
            self.record(what="log", step=state.global_step, **kept, **seconds)


def run_arm(task: Task, study: Study, problems: Problems, folder: Path, record: Record) -> None:
    """Trains and judges an arm. The first arm's run also judges the student before."""
    student, teacher = task.direction.split("<-")
    arm, gpu = ARMS[task.name], study.device == "cuda"
    options = {name: value for name, value in arm.options.items() if name != "on_policy_fraction"}
    config = SimCTConfig(
        output_dir=str(folder / f"run-{student}-{task.name}-{task.seed}"), max_steps=study.steps, seed=task.seed,
        per_device_train_batch_size=study.batch, learning_rate=study.rate[task.name], prompt_format="text",
        max_new_tokens=study.new_tokens, temperature=study.temperature, top_p=1.0, rollout_engine="static",
        chunk_rows=study.chunk_rows, max_tokens_per_batch=study.tokens_per_batch, per_device_eval_batch_size=512,
        logging_steps=study.every, logging_first_step=False, save_strategy="no", report_to="none", disable_tqdm=True,
        rollout_dtype="bfloat16" if gpu else "float32", bf16=gpu, use_cpu=not gpu, **options,
    )  # fmt: skip
    records = [{"prompt": problem.prompt} for problem in problems.train]
    trainer = ArmTrainer(
        str(folder / student_name(student, task.seed)), str(folder / f"teacher-{teacher}"), config, records,
        processing_class=VOCABULARIES[student](), teacher_processing_class=VOCABULARIES[teacher](),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.imitates = arm.sft
    for engine in trainer.engine, getattr(trainer.engine, "engine", None):  # the copy's own, where there is a copy
        if isinstance(engine, StaticBatching):
            engine.batch_size = study.batch
    texts = [json.loads(line) for line in (folder / f"teacher-{teacher}" / "texts.jsonl").read_text().splitlines()]
    judge = Judge(trainer, study, problems.held_out, texts)
    if arm.data == "teacher":
        trainer.collector.engine = TeacherWrites(trainer, study.batch)
    if task.name == study.arms[0]:
        record(what="judged", step=0, **judge(), arm="none")
    along = AlongTheWay(trainer, judge, study, folder, record)
    trainer.add_callback(along)
    trainer.train()
    record(what="judged", step=trainer.state.global_step, **judge(), cut=along.cut, shared=len(trainer.shared))
