"""What an arm is judged by, on held-out prompts; both directions of the sequence KL are per byte."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from simct import TokenizerPair
from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.transformers_engines import StaticBatching
from simct.training.evaluation import score
from simct.training.metrics import ratio_with_standard_error
from simct.training.micro_batches import split
from simct.training.samples import Sample, Samples
from simct_kernels import token_statistics

from .means import mean_with_error
from .texts import answer


@dataclass(frozen=True)
class TeacherSamples:
    """Responses of the teacher, in both vocabularies, with the records that they answer."""

    records: list[dict]
    student: list[list[int]]
    teacher: list[list[int]]


def sample_teacher(trainer, records: list[dict], sampling: Sampling, seed: int) -> TeacherSamples:
    """One response of the teacher to each prompt."""
    scorer = trainer.scorers[trainer.default_teacher]
    pair = scorer.pair
    end = pair.teacher_end_ids
    settings = replace(sampling, end_ids=end, pad_id=end[0], stop_strings=())
    prompts = [scorer.render(record) for record in records]
    responses = [r.token_ids for r in StaticBatching(scorer.teacher.model, 256).generate(prompts, settings, seed=seed)]
    back = TokenizerPair(scorer.teacher.tokenizer, trainer.processing_class)
    return TeacherSamples(records, back.encode_teacher(responses), responses)


def as_samples(trainer, drawn: TeacherSamples) -> Samples:
    """The teacher's responses, as if the student had written them."""
    scorer = trainer.scorers[trainer.default_teacher]
    ends = scorer.pair.student_end_ids
    rows = zip(drawn.records, drawn.student, drawn.teacher, strict=True)
    return Samples(
        Sample(
            trainer.student_prompt(record),
            scorer.render(record),
            Response(student, "stop" if student[-1] in ends else "length"),
            teacher,
            trainer.default_teacher,
            on_policy=False,
            record=record,
        )
        for record, student, teacher in rows
        if student and teacher
    )


@torch.no_grad()
def judge(trainer, records: list[dict], teacher_samples: TeacherSamples) -> dict[str, float]:
    """Every judge of the student as it is, each mean with its standard error over prompts."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    training = student.training
    student.eval()
    try:
        drawn = trainer.draw(records)
        reverse, _ = score(trainer, drawn)
        forward, _ = score(trainer, as_samples(trainer, teacher_samples))
        greedy = replace(trainer.sampling, temperature=0.0, top_p=1.0)
        asked = [record for record in records if "answer" in record]
        answers = trainer.generate([trainer.student_prompt(record) for record in asked], greedy, 0)
        entropy = _entropy(trainer, drawn)
    finally:
        student.train(training)
    pair = trainer.pair
    texts = [b"".join(p or b"" for p in pair.student_pieces(r.token_ids)) for r in drawn.responses]
    right = [answer(_text(pair, r)) == record["answer"] for r, record in zip(answers, asked, strict=True)]
    found: dict[str, float] = {}
    for name, rows, sign in (("reverse_kl_per_byte", reverse, 1), ("forward_kl_per_byte", forward, -1)):
        rows = [row for row in rows if row.bytes]
        found[name], found[f"{name}_stderr"] = ratio_with_standard_error(
            [sign * row.ratio for row in rows], [row.bytes for row in rows]
        )
    found["accuracy"], found["accuracy_stderr"] = mean_with_error(right)
    found["entropy"], found["entropy_stderr"] = mean_with_error(entropy)
    found["response_bytes"], found["response_bytes_stderr"] = mean_with_error([len(text) for text in texts])
    found["ended"], found["ended_stderr"] = mean_with_error([r.finish_reason != "length" for r in drawn.responses])
    blank = [(len(text) - len(b"".join(text.split()))) / max(1, len(text)) for text in texts]
    found["whitespace"], found["whitespace_stderr"] = mean_with_error(blank)
    return found


def _entropy(trainer, samples: Samples) -> list[float]:
    """Nats per byte of each response: the entropies of its rows, added up. Per token they would depend on the tokenizer."""
    values = []
    for batch in split(samples, trainer.layout, None, trainer.default_teacher):
        ids = torch.tensor([i for ids in batch.samples.student_responses for i in ids])
        hidden, head = trainer.student_rows(trainer.accelerator.unwrap_model(trainer.model), batch.packed)
        rows = token_statistics(hidden, head, ids).entropy
        parts = rows.split([len(ids) for ids in batch.samples.student_responses])
        for part, ids in zip(parts, batch.samples.student_responses, strict=True):
            size = sum(len(p or b" ") for p in trainer.pair.student_pieces(ids))
            values.append(float(part.sum()) / max(1, size))
    return values


def _text(pair, response: Response) -> str:
    return b"".join(p or b"" for p in pair.student_pieces(response.token_ids)).decode("utf-8", "replace")
