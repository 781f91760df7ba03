"""What `SimCTTrainer.evaluate` measures on held-out prompts: the sequence reverse KL, and accuracy where there are answers."""

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object

from simct.training import checks
from simct.training.collector import numbered_seed
from simct.training.metrics import ratio_with_standard_error
from simct.training.micro_batches import split
from simct.training.samples import Samples, log_ratios


@dataclass(frozen=True)
class Scored:
    """One response: its log-probability ratio log p_student - log p_teacher, of so many bytes and student tokens."""

    ratio: float
    bytes: int  # 0: the two sides spell no common text, it has no ratio
    tokens: int
    ended: bool


@torch.no_grad()
def score(trainer, samples: Samples) -> list[Scored]:
    """The log-probability ratios of sampled texts, in any order. `trainer`: a `SimCTTrainer`, its student in evaluation mode."""
    args, rows, batches = trainer.args, [], []
    for start in range(0, len(samples), args.per_device_eval_batch_size):
        chosen = samples.pick(list(range(len(samples)))[start : start + args.per_device_eval_batch_size])
        batches += split(chosen, trainer.layout, args.max_tokens_per_batch, trainer.default_teacher)
    for batch in trainer.as_many_everywhere([batches])[0]:
        part, scorer = batch.samples, trainer.scorers[batch.teacher]
        tokens = list(itertools.chain.from_iterable(part.student_responses))
        ours = trainer.student_logprobs(batch, torch.tensor(tokens, dtype=torch.int64, device=args.device))
        with scorer.teacher.on_device():
            theirs = scorer.teacher.token_logprobs(part.teacher_prompts, part.teacher_responses)
        ratios, lengths = log_ratios(scorer.pair, part, ours, theirs)
        rows += [
            Scored(ratio, length, len(response.token_ids), response.finish_reason != "length")
            for ratio, length, response in zip(ratios, lengths, part.responses, strict=True)
        ]
    return rows


def summarize(rows: list[Scored]) -> dict[str, float]:
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
    }


def grade(trainer, records: list[dict[str, Any]], seed: int) -> list[list[bool]]:
    """For each record with an `answer`: whether each of its `eval_num_generations` responses gives it."""
    graded = [record for record in records if record.get("answer") is not None]
    if not graded:
        return []
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
    student = trainer.accelerator.unwrap_model(trainer.model)
    training = student.training
    student.eval()
    try:
        rows, graded = score(trainer, samples), grade(trainer, records, numbered_seed(args.seed, 0, args.process_index))
    finally:
        student.train(training)
    if trainer.accelerator.num_processes > 1:
        rows, graded = gather_object(rows), gather_object(graded)
    metrics = summarize(rows)
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
        measured, self.evaluated = measure(self, dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.recorder.start_window(self.state.global_step)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def draw(self, records: list[dict[str, Any]]) -> Samples:
        """One sample of each record from the student's own distribution, the same at every call with the same weights."""
        self._update_engine()
        sampling = replace(self.sampling, temperature=1.0, top_p=1.0)
        with self.accelerator.autocast():
            return self.collector.collect(records, sampling, numbered_seed(self.args.seed, 0, self.args.process_index))
