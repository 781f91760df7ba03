"""What `SimCTTrainer.evaluate` measures on held-out prompts: both sequence KLs, the end of the turn, and accuracy where there are
answers.

The reverse KL alone rewards a student that narrows down: it falls when the student keeps to what the teacher likes and gives up the
rest. The forward KL, on texts that the student did not choose, rises then.
"""

import contextlib
import itertools
import math
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object

from simct.data.records import reference_answer
from simct.data.records import rows as rows_of
from simct.training import checks
from simct.training.collector import numbered_seed
from simct.training.metrics import ratio_with_standard_error
from simct.training.micro_batches import split
from simct.training.placement import reshard, shard_student
from simct.training.samples import Samples, end_probabilities, log_ratios

FALLS = 0.1  # of the responses that end, and by how much of itself the forward KL rises, before a collapse is told
UNLIKELY = 0.01  # the mean probability of an end of turn below which the teacher does not know it


@dataclass(frozen=True)
class Scored:
    """One response: its log-probability ratio log p_student - log p_teacher, of so many bytes and student tokens."""

    ratio: float
    bytes: int  # 0: the two sides spell no common text, it has no ratio
    tokens: int
    ended: bool


@torch.no_grad()
def score(trainer, samples: Samples) -> tuple[list[Scored], list[tuple[float, float]]]:
    """The log-probability ratios of texts, and `end_probabilities`, in any order. `trainer`: a `SimCTTrainer`, its student in
    evaluation mode."""
    args, rows, ends, batches = trainer.args, [], [], []
    for start in range(0, len(samples), args.per_device_eval_batch_size):
        chosen = samples.pick(list(range(len(samples)))[start : start + args.per_device_eval_batch_size])
        batches += split(chosen, trainer.layout, args.max_tokens_per_batch, trainer.default_teacher)
    batches = trainer.as_many_everywhere([batches])[0]
    students, teachers = [], {}
    for batch in batches:
        tokens = list(itertools.chain.from_iterable(batch.samples.student_responses))
        students.append(trainer.student_logprobs(batch, torch.tensor(tokens, dtype=torch.int64, device=args.device)))
    for name, scorer in trainer.scorers.items():
        own = [i for i, batch in enumerate(batches) if batch.teacher == name]
        with scorer.teacher.on_device() if own else contextlib.nullcontext():  # an offloaded one comes once
            for i in own:
                part = batches[i].samples
                teachers[i] = scorer.teacher.token_logprobs(part.teacher_prompts, part.teacher_responses)
    for i, batch in enumerate(batches):
        part, scorer, ours, theirs = batch.samples, trainer.scorers[batch.teacher], students[i], teachers[i]
        ratios, lengths = log_ratios(scorer.pair, part, ours, theirs)
        rows += [
            Scored(ratio, length, len(response.token_ids), response.finish_reason != "length")
            for ratio, length, response in zip(ratios, lengths, part.responses, strict=True)
        ]
        ends += end_probabilities(scorer.pair, part, ours, theirs)
    return rows, ends


def summarize(rows: list[Scored], ends: list[tuple[float, float]]) -> dict[str, float]:
    """KL(student || teacher) of whole texts, per byte and per student token, with standard errors over the samples."""
    scored = [row for row in rows if row.bytes]
    per_byte = ratio_with_standard_error([row.ratio for row in scored], [row.bytes for row in scored])
    per_token = ratio_with_standard_error([row.ratio for row in scored], [row.tokens for row in scored])
    return {
        "reverse_kl_per_byte": per_byte[0],
        "reverse_kl_per_byte_stderr": per_byte[1],
        "reverse_kl_per_token": per_token[0],
        "reverse_kl_per_token_stderr": per_token[1],
        "response_length": sum(row.tokens for row in rows) / len(rows),
        "response_ended": sum(row.ended for row in rows) / len(rows),
        "samples": len(scored),
        "samples_unscored": len(rows) - len(scored),
        **(
            {
                "end_probability": sum(ours for ours, _ in ends) / len(ends),
                "teacher_end_probability": sum(theirs for _, theirs in ends) / len(ends),
            }
            if ends
            else {}
        ),
    }


def summarize_answers(rows: list[Scored]) -> dict[str, float]:
    """log p_teacher - log p_student of given answers, per byte: on the teacher's own samples KL(teacher || student)."""
    scored = [row for row in rows if row.bytes]
    found = ratio_with_standard_error([-row.ratio for row in scored], [row.bytes for row in scored])
    return {"forward_kl_per_byte": found[0], "forward_kl_per_byte_stderr": found[1], "answers": len(scored)}


def collapse(first: dict[str, float], now: dict[str, float]) -> str | None:
    """What speaks for a collapse between two evaluations, in words: the reverse KL fell, and what it does not see got worse."""
    error = math.hypot(first["reverse_kl_per_byte_stderr"], now["reverse_kl_per_byte_stderr"])
    if not now["reverse_kl_per_byte"] < first["reverse_kl_per_byte"] - 2 * error:
        return None
    worse = []
    before, after = first["response_ended"], now["response_ended"]
    noise = 2 * math.sqrt(sum(p * (1 - p) for p in (before, after)) / max(1, now["samples"]))
    if before - after > max(FALLS, noise):
        worse.append(f"responses that end went from {before:.0%} to {after:.0%}")
    before, after = (row.get("forward_kl_per_byte", math.nan) for row in (first, now))
    if after > (1 + FALLS) * before:
        worse.append(f"the forward KL on the data's answers rose from {before:.3f} to {after:.3f} nats per byte")
    if not worse:
        return None
    return (
        f"the reverse KL fell from {first['reverse_kl_per_byte']:.3f} to {now['reverse_kl_per_byte']:.3f} nats per byte, but "
        f"{' and '.join(worse)}: the student narrows down rather than learns (a smaller learning rate, another objective, or "
        "answers mixed in with on_policy_fraction)"
    )


def grade(trainer, records: list[dict[str, Any]], seed: int) -> list[list[bool]]:
    """For each record with an `answer`: whether each of its `eval_num_generations` responses gives it."""
    graded = [record for record in records if record.get("answer") is not None]
    from simct.training.grading import is_correct

    times = trainer.args.eval_num_generations
    sampling = replace(trainer.sampling, temperature=trainer.args.eval_temperature, top_p=1.0)
    prompts = [trainer.student_prompt(record) for record in graded for _ in range(times)]
    responses = trainer.generate(prompts, sampling, seed)
    texts = [
        b"".join(piece or b"" for piece in trainer.pair.student_pieces(response.token_ids)).decode("utf-8", "replace")
        for response in responses
    ]
    return [
        [is_correct(text, str(record["answer"])) for text in texts[i * times : (i + 1) * times]]
        for i, record in enumerate(graded)
    ]


def measure(trainer, dataset) -> tuple[dict[str, float], Samples]:
    """All of it, over all processes (keys without a prefix), and this process's samples."""
    started = time.perf_counter()
    args = trainer.args
    records = [dataset[i] for i in range(args.process_index, len(dataset), args.world_size)]
    samples = trainer.draw(records)
    # What all processes go through together is decided by the whole data set, not by one's own share of it.
    every = list(rows_of(dataset))
    has_answers = any(reference_answer(record) is not None for record in every)
    is_graded = any(record.get("answer") is not None for record in every)
    answered = trainer.answers(records) if has_answers else Samples()
    student = trainer.accelerator.unwrap_model(trainer.model)
    training = student.training
    student.eval()
    try:
        rows, ends = score(trainer, samples)
        given, _ = score(trainer, answered) if has_answers else ([], [])
        graded = grade(trainer, records, numbered_seed(args.seed, 0, args.process_index)) if is_graded else []
    finally:
        student.train(training)
    if trainer.accelerator.num_processes > 1:
        rows, ends, given, graded = (gather_object(found) for found in (rows, ends, given, graded))
    metrics = summarize(rows, ends)
    if given:
        metrics |= summarize_answers(given)
    if graded:
        from simct.training.grading import accuracy

        found = accuracy(graded)
        metrics |= {
            "accuracy": found["pass@1"],
            "accuracy_stderr": found["pass@1_stderr"],
            "accuracy_any": found["pass@n"],
            "accuracy_any_stderr": found["pass@n_stderr"],
            "accuracy_prompts": found["prompts"],
            "accuracy_samples": found["samples"],
        }
    return {**metrics, "runtime": time.perf_counter() - started}, samples


class Evaluation:
    """The part of `SimCTTrainer` that evaluates."""

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The sequence reverse KL per byte and per token on held-out prompts, and accuracy where they have an `answer`.

        Where the records hold answers in full (`completion` or a last assistant turn), `forward_kl_per_byte` on those: it is one if
        they are the teacher's samples (`simct answers --temperature 1`).

        One response to each prompt, drawn from the student's own distribution (temperature 1, no truncation: the estimate of
        KL(student || teacher) of whole texts is then unbiased) with the run's seed, so that two evaluations of one student agree.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        if dataset is None:
            raise ValueError("eval_dataset is None: expected records with a prompt or messages")
        checks.check_datasets(None, dataset)
        if self.is_in_train:  # an evaluation between two logs is no part of their training time
            self.recorder.close_window(self.state.global_step)
        shard_student(self)
        measured, self.evaluated = measure(self, dataset)
        reshard(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.recorder.start_window(self.state.global_step)
        self._warn(metrics, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _warn(self, metrics: dict[str, float], prefix: str) -> None:
        """Says what figures mean that are bad: a collapse since the first evaluation, an end that the teacher does not know."""
        now = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        # Kept beside the Trainer's own state, which `train` begins anew.
        first = self.first_evaluations.get(prefix)
        self.first_evaluations.setdefault(prefix, now)
        problem = None if first is None else collapse(first, now)
        if problem is not None:
            warnings.warn(problem, stacklevel=3)
        elif first is None and now.get("teacher_end_probability", 1.0) < UNLIKELY:
            unread = self.args.prompt_format == "text" and getattr(self.teacher.tokenizer, "chat_template", None)
            chat = ", which has a chat template and is read without it," if unread else ""
            warnings.warn(
                f"the teacher{chat} gives the end of the turn a probability of {now['teacher_end_probability']:.2g} after the "
                "student's finished answers: the student will learn not to end (see prompt_format, special_tokens and stop)",
                stacklevel=3,
            )

    def answers(self, records: list[dict[str, Any]]) -> Samples:
        """The records' own answers in full, where they have one, as samples that the student did not draw."""
        answered = [record for record in records if reference_answer(record) is not None]
        return self.collector.collect(answered, self.sampling, self.args.seed, on_policy_fraction=0.0)

    def draw(self, records: list[dict[str, Any]]) -> Samples:
        """One sample of each record from the student's own distribution, the same at every call with the same weights."""
        self._update_engine()
        sampling = replace(self.sampling, temperature=1.0, top_p=1.0)
        with self.accelerator.autocast():
            return self.collector.collect(records, sampling, numbered_seed(self.args.seed, 0, self.args.process_index))
