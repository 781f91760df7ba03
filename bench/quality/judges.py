"""What an arm is judged by, on held-out prompts: the sums that it gets right when it samples, how likely the right response is
to it, and both directions of the sequence KL per byte."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from simct.training.evaluation import score
from simct.training.metrics import ratio_with_standard_error
from simct.training.micro_batches import split
from simct.training.samples import Samples, segment_sums

from .means import mean_with_error
from .texts import answer

TEMPERATURE = 0.6  # of the graded draws: the rollouts', without their nucleus


@dataclass(frozen=True)
class Scope:
    """How much is judged: `draws` to each of the first `sums` sums, and the first `texts` of the teacher's texts; `whole`: with
    what costs more, the reverse KL."""

    sums: int
    draws: int
    texts: int
    whole: bool = False


class Judge:
    """Judges a trainer's student.

    Args:
        trainer: a `SimCTTrainer`; the student is judged as it is when the judge is called.
        records: prompts; sums have `answer` and `solution`.
        texts: records with `prompt`, `completion` and `logprob`: the teacher's samples at temperature 1, and its log p of the
            tokens that it drew (of a text as it would spell it, it may be far less). A text that does not fit a response has no KL.
    """

    def __init__(self, trainer, records: list[dict], texts: list[dict]) -> None:
        self.trainer, self.records = trainer, records
        self.sums = [record for record in records if "answer" in record]
        self.solutions = trainer.answers([{**record, "completion": record["solution"]} for record in self.sums])
        self.texts = trainer.answers(texts)
        self.bytes = [
            len(text["completion"].encode()) + 1 if response.finish_reason == "stop" else 0
            for text, response in zip(texts, self.texts.responses, strict=True)
        ]
        self.teacher = [text["logprob"] for text in texts]

    @torch.no_grad()
    def __call__(self, scope: Scope) -> dict[str, float]:
        """Every judge, each mean with its standard error over prompts."""
        trainer, found = self.trainer, {}
        with _judged(trainer):
            texts = self.texts.pick(list(range(min(scope.texts, len(self.texts)))))
            ours = student_sums(trainer, texts)
            right, ended = self._draw(self.sums[: scope.sums], scope.draws)
            solved = student_sums(trainer, self.solutions.pick(list(range(len(self.sums[: scope.sums])))))
            drawn = trainer.draw(self.records) if scope.whole else Samples()
            reverse = score(trainer, drawn)[0] if scope.whole else []
        forward = [(t - o, size) for t, o, size in zip(self.teacher, ours, self.bytes, strict=False) if size]
        kl = ratio_with_standard_error([ratio for ratio, _ in forward], [size for _, size in forward])
        _put(found, "forward_kl_per_byte", kl)
        _put(found, "accuracy", mean_with_error([sum(own) / len(own) for own in right]))
        _put(found, "sums_ended", mean_with_error([sum(own) / len(own) for own in ended]))
        _put(found, "logp_solution", mean_with_error(solved))
        if scope.whole:
            rows = [row for row in reverse if row.bytes]
            ratios = [row.ratio for row in rows], [row.bytes for row in rows]
            _put(found, "reverse_kl_per_byte", ratio_with_standard_error(*ratios))
            _put(found, "ended", mean_with_error([response.finish_reason != "length" for response in drawn.responses]))
            sizes = [len(_bytes(trainer.pair, response)) for response in drawn.responses]
            _put(found, "response_bytes", mean_with_error(sizes))
        return found

    def _draw(self, records: list[dict], times: int) -> tuple[list[list[bool]], list[list[bool]]]:
        """Of each record's draws: whether they give its answer, and whether they end."""
        trainer = self.trainer
        sampling = replace(trainer.sampling, temperature=TEMPERATURE, top_p=1.0)
        prompts = [prompt for prompt in map(trainer.student_prompt, records) for _ in range(times)]
        drawn = trainer.generate(prompts, sampling, seed=17)
        own = [drawn[i : i + times] for i in range(0, len(drawn), times)]
        right = [
            [answer(_bytes(trainer.pair, r).decode("utf-8", "replace")) == record["answer"] for r in responses]
            for responses, record in zip(own, records, strict=True)
        ]
        return right, [[r.finish_reason != "length" for r in responses] for responses in own]


def student_sums(trainer, samples: Samples) -> list[float]:
    """log p of each response under the student as it is."""
    found, size = [], trainer.args.per_device_eval_batch_size
    for start in range(0, len(samples), size):
        chosen = samples.pick(list(range(len(samples)))[start : start + size])
        (batch,) = split(chosen, trainer.layout, None, trainer.default_teacher)
        tokens = torch.tensor([i for ids in chosen.student_responses for i in ids], device=trainer.args.device)
        found += segment_sums(trainer.student_logprobs(batch, tokens), chosen.student_responses)
    return found


class _judged:
    """The student in evaluation mode, and back."""

    def __init__(self, trainer) -> None:
        self.student = trainer.accelerator.unwrap_model(trainer.model)

    def __enter__(self) -> None:
        self.training = self.student.training
        self.student.eval()

    def __exit__(self, *_) -> None:
        self.student.train(self.training)


def _put(found: dict[str, float], name: str, value: tuple[float, float]) -> None:
    found[name], found[f"{name}_stderr"] = value


def _bytes(pair, response) -> bytes:
    return b"".join(piece or b"" for piece in pair.student_pieces(response.token_ids))
