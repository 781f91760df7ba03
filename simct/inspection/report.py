"""What `simct inspect` and a run's inspection pages show of a pair and of responses: everything as data, no layout."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from simct.console import printable
from simct.inspection.scripts import SCRIPTS, script_of
from simct.pairing.coverage import Coverage
from simct.pairing.pair import Alignment, TokenizerPair

LEFT_OUT = "left_out"
# Why a student token is without supervision, in words.
REASONS = {
    "text_differs": "the teacher's text has other bytes here (a normaliser, or a character that it cannot spell)",
    "anchored_tail": "no equal pair of tokens ends the stretch (alignment=anchored)",
    "no_teacher_tokens": "the teacher has no tokens for the whole response",
    "no_teacher_end": "the student ended its turn, the teacher's tokens do not (cut to its context, perhaps)",
    "invalid_utf8": "bytes that are no whole character, or a token in a unit with them",
    "special_token": "a special token inside the response, or a token in a unit with one",
    "after_end": "behind the first end of the turn",
    LEFT_OUT: "a unit that the run's options leave out (units, mask_longer, teacher_mass_floor)",
}
SHOWN = 40  # tokens of a side of one unit in a table of units: a unit may be as long as the response
KINDS = ("single", "longer", "unsupervised")


@dataclass(frozen=True)
class Scored:
    """Aligned units of one response with their scores, each float32 [G] on the CPU, in nats.

    A side's score is the mean log-probability of the unit's tokens on that side (Eq. 7), over its whole vocabulary; the loss is the
    divergence of the unit.
    """

    student: Tensor
    teacher: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Answer:
    """A response to look at. `units`: those that are supervised, by default all that the pair aligns; `scored`: one row each."""

    student_ids: list[int]
    teacher_ids: list[int]
    title: str
    prompt: str | None = None
    units: Alignment | None = None
    scored: Scored | None = None


@dataclass(frozen=True)
class Token:
    id: int
    name: str  # as the vocabulary writes it
    piece: bytes | None  # None: a special token


@dataclass(frozen=True)
class UnitScore:
    """One row of `Scored`."""

    student: float
    teacher: float
    loss: float


@dataclass(frozen=True)
class Stretch:
    """One unit, or the tokens of both sides between two units, which nothing supervises."""

    kind: str  # of KINDS
    student: tuple[Token, ...]
    teacher: tuple[Token, ...]
    start: int  # byte of the student's text, of the response
    reasons: tuple[str, ...] = ()  # keys of REASONS, one for each student token; empty for a unit
    score: UnitScore | None = None

    @property
    def text(self) -> bytes:
        """The student's bytes, or the teacher's where the student has no token."""
        return b"".join(token.piece or b"" for token in self.student or self.teacher)


@dataclass(frozen=True)
class InspectedAnswer:
    title: str
    prompt: str | None
    stretches: tuple[Stretch, ...]

    def tokens(self, kind: str | None = None) -> int:
        """Student tokens, of one kind or all."""
        return sum(len(s.student) for s in self.stretches if kind in (None, s.kind))


@dataclass(frozen=True)
class Vocabulary:
    """One side's tokenizer."""

    name: str
    size: int
    ends: tuple[Token, ...]  # what ends a response


@dataclass(frozen=True)
class ScriptRow:
    """Tokens of both vocabularies in one script, and how many of them are a shared pair."""

    script: str
    student: int
    teacher: int
    shared: int


@dataclass(frozen=True)
class Inspection:
    """A pair, and responses in it."""

    student: Vocabulary
    teacher: Vocabulary
    coverage: Coverage
    answers: tuple[InspectedAnswer, ...]
    scripts: tuple[ScriptRow, ...]

    @property
    def scored(self) -> bool:
        return any(s.score is not None for answer in self.answers for s in answer.stretches)

    def tokens(self, kind: str | None = None) -> int:
        """Student tokens of all answers, of one kind or all."""
        return sum(answer.tokens(kind) for answer in self.answers)

    def beginning(self, tokens: int) -> list[tuple[InspectedAnswer, list[Stretch]]]:
        """The answers as far as so many student tokens go, and eight times as many of the teacher's, in whole stretches."""
        found, left, theirs = [], tokens, 8 * tokens
        for answer in self.answers:
            stretches = []
            for stretch in answer.stretches:
                left, theirs = left - len(stretch.student), theirs - len(stretch.teacher)
                if min(left, theirs) < 0:
                    break
                stretches.append(stretch)
            if stretches:
                found.append((answer, stretches))
            if min(left, theirs) < 0:
                break
        return found

    def dropped(self) -> dict[str, int]:
        """Student tokens without supervision by reason, the most frequent first."""
        counts = Counter(r for answer in self.answers for s in answer.stretches for r in s.reasons)
        return dict(counts.most_common())

    def largest(self, count: int = 12) -> list[tuple[Stretch, int]]:
        """The longer units of most tokens, both sides together, and how often each text occurs as such a unit."""
        return _ranked(self.answers, lambda s: len(s.student) + len(s.teacher), "longer")[:count]

    def costliest(self, count: int = 12) -> list[tuple[Stretch, int]]:
        """The scored units of the highest loss."""
        found = _ranked(self.answers, lambda s: s.score.loss if s.score else float("-inf"), "single", "longer")
        return [(stretch, times) for stretch, times in found if stretch.score is not None][:count]

    def mean_loss(self, kind: str) -> float | None:
        """Per unit of a kind; None without scores or units."""
        losses = [s.score.loss for a in self.answers for s in a.stretches if s.score is not None and s.kind == kind]
        return sum(losses) / len(losses) if losses else None


def _ranked(answers: Sequence[InspectedAnswer], size, *kinds: str) -> list[tuple[Stretch, int]]:
    found: dict[tuple, list[Stretch]] = {}
    for answer in answers:
        for stretch in answer.stretches:
            if stretch.kind in kinds:
                found.setdefault((stretch.student, stretch.teacher), []).append(stretch)
    ranked = [(max(same, key=size), len(same)) for same in found.values()]
    return sorted(ranked, key=lambda pair: -size(pair[0]))


def inspect_answers(pair: TokenizerPair, student_tokenizer, teacher_tokenizer, answers: Sequence[Answer]) -> Inspection:
    """Everything that a page shows. The tokenizers are the pair's. ValueError for ids outside their vocabularies."""
    names = student_tokenizer.convert_ids_to_tokens, teacher_tokenizer.convert_ids_to_tokens
    return Inspection(
        student=_vocabulary(student_tokenizer, pair.student_end_ids),
        teacher=_vocabulary(teacher_tokenizer, pair.teacher_end_ids),
        coverage=pair.coverage_of([a.student_ids for a in answers], [a.teacher_ids for a in answers]),
        answers=tuple(InspectedAnswer(a.title, a.prompt, _stretches(pair, names, a)) for a in answers),
        scripts=tuple(_scripts(pair, student_tokenizer, teacher_tokenizer)),
    )


def _vocabulary(tokenizer, ends: Sequence[int]) -> Vocabulary:
    name = printable(Path(tokenizer.name_or_path).name) or type(tokenizer).__name__
    return Vocabulary(name, len(tokenizer), tuple(Token(i, tokenizer.convert_ids_to_tokens(i), None) for i in ends))


def _stretches(pair: TokenizerPair, names, answer: Answer) -> tuple[Stretch, ...]:
    units = pair.align(answer.student_ids, answer.teacher_ids) if answer.units is None else answer.units
    student = _tokens(answer.student_ids, names[0], pair.student_pieces)
    teacher = _tokens(answer.teacher_ids, names[1], pair.teacher_pieces)
    reasons = [reason or LEFT_OUT for reason in pair.reasons(answer.student_ids, answer.teacher_ids)]
    offsets = [0]
    for token in student:
        offsets.append(offsets[-1] + len(token.piece or b""))
    columns = (units.student_start, units.student_length, units.teacher_start, units.teacher_length)
    bounds = list(zip(*(column.tolist() for column in columns), strict=True))
    scores: list[UnitScore | None] = [None] * len(bounds)
    if answer.scored is not None:
        rows = zip(
            *(c.tolist() for c in (answer.scored.student, answer.scored.teacher, answer.scored.loss)), strict=True
        )
        scores = [UnitScore(*row) for row in rows]
    found, i, j = [], 0, 0
    for (s, m, t, n), score in zip([*bounds, (len(student), 0, len(teacher), 0)], [*scores, None], strict=True):
        if i < s or j < t:
            found.append(Stretch("unsupervised", student[i:s], teacher[j:t], offsets[i], tuple(reasons[i:s])))
        i, j = s + m, t + n
        if m:
            kind = "single" if m == n == 1 else "longer"
            found.append(Stretch(kind, student[s:i], teacher[t:j], offsets[s], (), score))
    return tuple(found)


def _tokens(ids: list[int], names, pieces) -> tuple[Token, ...]:
    # A head may have rows for no token: such an id has no name.
    return tuple(Token(i, name or f"<{i}>", piece) for i, name, piece in zip(ids, names(ids), pieces(ids), strict=True))


def _scripts(pair: TokenizerPair, student_tokenizer, teacher_tokenizer) -> list[ScriptRow]:
    student = pair.student_pieces(range(len(student_tokenizer)))
    teacher = pair.teacher_pieces(range(len(teacher_tokenizer)))
    shared = [student[i] for i in pair.shared.student_ids.tolist()]
    counts = [Counter(map(script_of, side)) for side in (student, teacher, shared)]
    rows = [ScriptRow(script, *(count[script] for count in counts)) for script in SCRIPTS]
    return [row for row in rows if row.student or row.teacher]
