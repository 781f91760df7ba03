"""What `SimCTTrainer.evaluate` measures on held-out prompts: the sequence reverse KL, and accuracy where there are answers."""

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object

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
