"""Sampled responses with the teacher's spelling of them, and the log-probability ratio of whole texts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simct.pairing.pair import TokenizerPair
from simct.rollouts.protocol import Response


@dataclass(frozen=True)
class Sample:
    """One response to one prompt, in the student's tokens and in its teacher's."""

    student_prompt: list[int]
    teacher_prompt: list[int]
    response: Response
    teacher_response: list[int]
    teacher: str = ""  # the name of the teacher that scores it
    on_policy: bool = True  # False: an answer from the data
    record: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def student_length(self) -> int:
        """Tokens of the student's forward pass (the last response token is not fed)."""
        return len(self.student_prompt) + len(self.response.token_ids) - 1


class Samples(list[Sample]):
    """Samples of one batch; each column as a list."""

    @property
    def student_prompts(self) -> list[list[int]]:
        return [sample.student_prompt for sample in self]

    @property
    def teacher_prompts(self) -> list[list[int]]:
        return [sample.teacher_prompt for sample in self]

    @property
    def responses(self) -> list[Response]:
        return [sample.response for sample in self]

    @property
    def student_responses(self) -> list[list[int]]:
        return [sample.response.token_ids for sample in self]

    @property
    def response_lengths(self) -> list[int]:
        """Student tokens of each."""
        return [len(sample.response.token_ids) for sample in self]

    @property
    def teacher_responses(self) -> list[list[int]]:
        return [sample.teacher_response for sample in self]

    def pick(self, indices: list[int]) -> "Samples":
        return Samples(self[i] for i in indices)


def log_ratios(
    pair: TokenizerPair, samples: Samples, student_logprob: Tensor, teacher_logprob: Tensor
) -> tuple[list[float], list[int]]:
    """log p_student - log p_teacher of each response's text, each under its own tokens, and the text's length in bytes
    (the end of the turn counts as one). Responses that the two sides spell differently have no common text: both are 0.

    Args:
        student_logprob: [N_s], of the packed response tokens; teacher_logprob: [N_t].
    """
    student_sums = segment_sums(student_logprob, samples.student_responses)
    teacher_sums = segment_sums(teacher_logprob, samples.teacher_responses)
    ratios, lengths = [], []
    for ids, teacher_ids, ours, theirs in zip(
        samples.student_responses, samples.teacher_responses, student_sums, teacher_sums, strict=True
    ):
        length = common_length(pair, ids, teacher_ids)
        ratios.append(ours - theirs if length else 0.0)
        lengths.append(length)
    return ratios, lengths


def common_length(pair: TokenizerPair, student_ids: list[int], teacher_ids: list[int]) -> int:
    """Bytes of a response, its end of turn counted as one, if both sides spell all of it the same; else 0."""
    texts, ended = [], []
    for ids, ends, pieces in (
        (student_ids, pair.student_end_ids, pair.student_pieces),
        (teacher_ids, pair.teacher_end_ids, pair.teacher_pieces),
    ):
        ended.append(bool(ids) and ids[-1] in ends)
        texts.append(pieces(ids[:-1] if ended[-1] else ids))
    if ended[0] != ended[1] or any(None in text for text in texts) or b"".join(texts[0]) != b"".join(texts[1]):
        return 0
    return sum(map(len, texts[0])) + ended[0]


def end_rows(pair: TokenizerPair, samples: Samples) -> tuple[Tensor, Tensor]:
    """int64 [n] of the student's packed rows and of the teacher's: which predict the end of the turn, of each response that both
    sides end."""
    rows: tuple[list[int], list[int]] = [], []
    stops = [0, 0]
    for sides in zip(samples.student_responses, samples.teacher_responses, strict=True):
        stops = [stop + len(ids) for stop, ids in zip(stops, sides, strict=True)]
        ends = pair.student_end_ids, pair.teacher_end_ids
        if all(ids and ids[-1] in known for ids, known in zip(sides, ends, strict=True)):
            for found, stop in zip(rows, stops, strict=True):
                found.append(stop - 1)
    return torch.tensor(rows[0], dtype=torch.int64), torch.tensor(rows[1], dtype=torch.int64)


def end_probabilities(
    pair: TokenizerPair, samples: Samples, student_logprob: Tensor, teacher_logprob: Tensor
) -> list[tuple[float, float]]:
    """The probability of the end of the turn by the student and by its teacher, of each response that both sides end.

    Args: as `log_ratios`'.
    """
    rows = end_rows(pair, samples)
    ours, theirs = (
        values.cpu()[at].double().exp().tolist()
        for values, at in zip((student_logprob, teacher_logprob), rows, strict=True)
    )
    return list(zip(ours, theirs, strict=True))


def segment_sums(values: Tensor, segments: list[list[int]]) -> list[float]:
    """The sum of each of the consecutive stretches of `values` [N] that are as long as the segments."""
    return [float(part.double().sum()) for part in values.cpu().split([len(segment) for segment in segments])]
