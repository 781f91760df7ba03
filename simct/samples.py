"""Sampled responses with the teacher's spelling of them, and the log-probability ratio of whole texts."""

from dataclasses import dataclass

from torch import Tensor

from simct.pair import TokenizerPair
from simct.rollout import Response


@dataclass(frozen=True)
class Samples:
    """Sampled responses and the same texts in the teacher's tokens; lists of token ids, one per prompt."""

    student_prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    responses: list[Response]
    teacher_responses: list[list[int]]

    @property
    def student_responses(self) -> list[list[int]]:
        return [response.token_ids for response in self.responses]

    def __getitem__(self, part: slice) -> "Samples":
        return Samples(
            self.student_prompts[part], self.teacher_prompts[part], self.responses[part], self.teacher_responses[part]
        )


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


def segment_sums(values: Tensor, segments: list[list[int]]) -> list[float]:
    """The sum of each of the consecutive stretches of `values` [N] that are as long as the segments."""
    return [float(part.double().sum()) for part in values.cpu().split([len(segment) for segment in segments])]
