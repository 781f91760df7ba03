"""What share of a student's tokens a teacher with another tokenizer supervises, under four rules of alignment."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

# Space markers of byte-level and SentencePiece vocabularies, as the public code compares them: by string, without the
# marker.
_MARKERS = ("Ġ", "▁")

# The rules, as tables call them.
RULES = {
    "simpleopd_public": "one-to-one tokens only, by string (SimpleOPD, public code)",
    "simct_public": "the public code's rule (alignment=anchored)",
    "simpleopd": "one-to-one tokens only, by bytes (units=single)",
    "simct": "SimCT by bytes (default)",
}


DIGITS = "31415926535897932384"


def most_digits(pair) -> tuple[int, int]:
    """Of one token of a number: in the student's tokenizer, and in the teacher's, of a `TokenizerPair`."""
    ids = pair.encode_student([DIGITS])
    pieces = pair.student_pieces(ids[0]), pair.teacher_pieces(pair.encode_teacher(ids)[0])
    student, teacher = (max((len(piece) for piece in side if piece), default=0) for side in pieces)
    return student, teacher


def digits_differ(pair) -> bool:
    """Whether the student writes digits one by one, and the teacher in groups."""
    student, teacher = most_digits(pair)
    return student == 1 < teacher


def in_words(reason: str) -> str:
    """Why tokens have no supervision, as tables call it."""
    return {
        "not_matched": "not equal as strings",
        "anchored_tail": "after the last equal tokens",
        "longer_unit": "in longer units",
    }.get(reason, reason.replace("_", " "))


@dataclass(frozen=True)
class RuleCoverage:
    """One rule's shares of the student's response tokens; `single + longer + lost = 1`."""

    single: float  # in units of one token on each side
    longer: float  # in longer units
    lost: float  # without supervision
    dropped: dict[str, int]  # the lost tokens by reason

    @classmethod
    def count(cls, single: int, longer: int, total: int, dropped: dict[str, int]) -> "RuleCoverage":
        total = max(total, 1)
        return cls(single / total, longer / total, sum(dropped.values()) / total, dropped)


@dataclass(frozen=True)
class Coverage:
    """What a teacher supervises of a student's responses.

    `rules` holds, in this order: `simpleopd_public` and `simct_public` (the rules of the public code of arXiv
    2605.07711: strings, greedy; units closed by equal tokens), `simpleopd` (single units of the partition by bytes) and
    `simct` (all its units).
    """

    texts: int
    text_bytes: int
    student_tokens: int  # the end-of-turn of every text included
    teacher_tokens: int
    shared: int  # K, the shared vocabulary by bytes
    shared_by_string: int  # the same by token string, one space marker replaced by the other
    rules: dict[str, RuleCoverage]

    def to_dict(self) -> dict:
        return asdict(self)


def without_markers(tokens: Sequence[str]) -> list[str]:
    """Token strings as the public rule compares them."""
    stripped = []
    for token in tokens:
        for marker in _MARKERS:
            token = token.replace(marker, "")
        stripped.append(token)
    return stripped


def shared_by_string(student_tokens: Sequence[str], teacher_tokens: Sequence[str]) -> int:
    """Tokens of equal strings in both vocabularies, one space marker replaced by the other."""
    keep, other = _MARKERS
    teacher = {token.replace(other, keep) for token in teacher_tokens}
    return len({token.replace(other, keep) for token in student_tokens} & teacher)


def greedy_single(student: Sequence[str], teacher: Sequence[str]) -> list[tuple[int, int]]:
    """The pairs of positions that the public SimpleOPD rule compares in one response.

    Two pointers over token strings: where they differ, the shorter side takes its next token until both are equal
    again. Once neither is the beginning of the other they never are, and the rest of the response is lost.
    """
    i = j = 0
    single: list[tuple[int, int]] = []
    while i < len(student) and j < len(teacher):
        if student[i] == teacher[j]:
            single.append((i, j))
            i, j = i + 1, j + 1
            continue
        # One side's text is the beginning of the other's: `longer` is the last token of the side that is ahead, and its first
        # `known` characters are spelled by both sides. No text is put together: that would take their length squared.
        m = n = 1
        ahead = len(student[i]) > len(teacher[j])
        longer, other = (student[i], teacher[j]) if ahead else (teacher[j], student[i])
        if len(longer) == len(other) or not longer.startswith(other):
            return single
        known = len(other)
        while known < len(longer):
            if (j + n if ahead else i + m) >= (len(teacher) if ahead else len(student)):
                return single
            if ahead:
                token, n = teacher[j + n], n + 1
            else:
                token, m = student[i + m], m + 1
            if longer.startswith(token, known):
                known += len(token)
            elif token.startswith(longer[known:]):
                longer, known, ahead = token, len(longer) - known, not ahead
            else:
                return single
        i, j = i + m, j + n
    return single
