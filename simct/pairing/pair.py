"""Two tokenizers: the tokens they share, the teacher's tokens for what the student wrote, and aligned units.

Everything is compared by bytes. Prompts, chat templates and models are other modules' subjects: what is aligned here is
a response, the token ids a student sampled, end-of-turn included if it came to one.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from simct.pairing.alignment import Units, anchored, partition
from simct.pairing.coverage import Coverage, RuleCoverage, greedy_single, shared_by_string, without_markers
from simct.pairing.endings import STOPS, end_class, end_ids, known_ends
from simct.pairing.side import Ids, Side, text_blocks
from simct_kernels.inputs import AlignedUnits, SharedVocabulary
from simct_kernels.objectives.prefix_tables import PrefixTables

# Why a student token is in no unit. Where several apply, the later one is counted.
_REASONS = (
    "text_differs",  # the teacher's text has other bytes here (a normaliser, a replaced character)
    "anchored_tail",  # alignment="anchored": no equal pair of tokens ends the stretch
    "no_teacher_tokens",  # the teacher has no tokens for the whole response
    "no_teacher_end",  # the student ended its turn, the teacher's tokens do not
    "invalid_utf8",  # bytes that are no character (a response cut inside one), and the tokens in a unit with them
    "special_token",  # a special token inside the response, and the tokens in a unit with one
    "after_end",  # behind the first end-of-turn
)
_TEXT_DIFFERS, _ANCHORED_TAIL, _NO_TEACHER, _NO_END, _INVALID, _SPECIAL, _AFTER_END = range(len(_REASONS))


@dataclass(frozen=True, eq=False)
class Alignment(AlignedUnits):
    """Aligned units and what they leave out: `dropped` counts the student's response tokens in no unit, by reason.

    `select` and `single` leave `dropped` as it is; `concatenate` adds it up. Reasons: text_differs, anchored_tail,
    no_teacher_tokens, no_teacher_end, invalid_utf8, special_token, after_end.
    """

    dropped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def concatenate(cls, parts: Sequence["Alignment"]) -> "Alignment":  # type: ignore[override]
        dropped: Counter[str] = Counter()
        for part in parts:
            dropped.update(part.dropped)
        return replace(super().concatenate(parts), dropped=dict(dropped))  # type: ignore[call-arg, return-value]


@dataclass(frozen=True)
class Cut:
    """How both tokenizers cut one stretch of text: the tokens' bytes on each side, `None` for a special token."""

    student: tuple[bytes | None, ...]
    teacher: tuple[bytes | None, ...]
    aligned: bool  # False: no unit, hence no supervision


class TokenizerPair:
    """Aligns what a student writes with the same text in a teacher's tokens.

    `special_tokens`: "auto" maps the student's end-of-turn to the teacher's, each found in its chat template,
    generation config or special tokens. A mapping {student token: teacher token} (strings or ids, one to one) adds
    pairs to the shared vocabulary and takes precedence; end-of-turn tokens in it are also translated in responses,
    other special tokens in a response spell nothing. `alignment`: "bytes", the finest common partition, or "anchored",
    the coarser rule of the public code of SimCT (arXiv 2605.07711). `student_vocabulary_size`: rows of the student's head, if it
    has more than its tokenizer has tokens; the ids between spell nothing. `chat=False`: prompts are plain text, and a chat
    template does not say what ends a response. `stop`: what the end of the turn is as a candidate, the mapped "pair" of ids or a
    "class", the sums of `stop_ids`: all that end a student's response, all that may end a teacher's (arXiv 2609.20511).

    Raises ValueError if a tokenizer belongs to no supported family, does not spell built-in text byte by byte (the
    first difference is shown), has no end-of-turn token, or if a mapped token is unknown.
    """

    def __init__(
        self,
        student_tokenizer,
        teacher_tokenizer,
        special_tokens: str | Mapping[str | int, str | int] = "auto",
        *,
        alignment: str = "bytes",
        student_generation_config=None,
        teacher_generation_config=None,
        student_vocabulary_size: int | None = None,
        chat: bool = True,
        stop: str = "pair",
    ):
        for role, tokenizer in ("student", student_tokenizer), ("teacher", teacher_tokenizer):
            if not hasattr(tokenizer, "get_vocab"):
                raise ValueError(
                    f"{role}_tokenizer is {tokenizer!r}: expected a tokenizer, AutoTokenizer.from_pretrained(folder or hub name)"
                )
        for name, value, known in ("alignment", alignment, ("bytes", "anchored")), ("stop", stop, STOPS):
            if value not in known:
                raise ValueError(f'{name} must be "{known[0]}" or "{known[1]}", got {value!r}')
        if special_tokens != "auto" and not isinstance(special_tokens, Mapping):
            raise ValueError(f'special_tokens must be "auto" or a mapping, got {special_tokens!r}')
        self.alignment, self.stop = alignment, stop
        given = special_tokens if isinstance(special_tokens, Mapping) else {}
        mapped = _resolve(given, student_tokenizer, teacher_tokenizer)
        student_ends = end_ids(student_tokenizer, student_generation_config, chat=chat)
        teacher_ends = end_ids(teacher_tokenizer, teacher_generation_config, chat=chat)
        self.end_pair: tuple[int, int] = _end_pair(mapped, student_ends, teacher_ends)
        mapped.setdefault(*self.end_pair)
        self.student_end_ids = tuple(dict.fromkeys((self.end_pair[0], *student_ends)))
        self._teacher_end = {i: mapped.get(i, self.end_pair[1]) for i in self.student_end_ids}
        self.teacher_end_ids = tuple(dict.fromkeys((*self._teacher_end.values(), *teacher_ends)))
        self.stop_ids = self.student_end_ids, known_ends(teacher_tokenizer, self.teacher_end_ids)

        self._student = Side("student", student_tokenizer, self.student_end_ids, student_vocabulary_size)
        self._teacher = Side("teacher", teacher_tokenizer, self.teacher_end_ids)
        self.shared, self._mapped = self._share(mapped), mapped
        self._prefixes: _PrefixIndex | None = None
        self._strings: tuple[list[str], list[str]] | None = None  # as the public code compares tokens

    def encode_teacher(self, batch: Sequence[Ids]) -> list[list[int]]:
        """The teacher's ids for a batch of student responses: the same bytes, no special token, no prefix space.

        Bytes that are not valid UTF-8 and special tokens inside a response are left out; an end-of-turn becomes the
        teacher's.
        """
        packed = self._student.pack(batch)
        encoded = self._teacher.encoder([text.decode("utf-8", "ignore") for text in packed.texts])
        for ids, stop, ended in zip(encoded, packed.stops, packed.ended, strict=True):
            if ended:
                ids.append(self._teacher_end[int(packed.ids[stop])])
        return encoded

    def align(self, student_ids: Ids, teacher_ids: Ids, *, disjoint: bool = False) -> Alignment:
        """Aligned units of one response; see `align_batch`."""
        return self.align_batch([student_ids], [teacher_ids], disjoint=disjoint)

    def align_batch(
        self, student_ids: Sequence[Ids], teacher_ids: Sequence[Ids], *, disjoint: bool = False
    ) -> Alignment:
        """Aligned units of a batch of responses, rows packed in order: every id of every response is one row.

        The end-of-turn is always a unit of its own ("anchored" may merge it with a mismatched stretch before it, as the
        public code does); a unit never holds a special token. `disjoint` fills `left_out`,
        which `candidates="disjoint"` needs.

        Raises ValueError for batches of different sizes and for ids that are no integers or not in the vocabulary.
        """
        return self._align(student_ids, teacher_ids, self.alignment, disjoint)

    def encode_student(self, texts: Iterable[str]) -> list[list[int]]:
        """The student's ids for texts as it would write them: no special token but the end-of-turn that closes each."""
        return [[*ids, self.end_pair[0]] for ids in self._student.encoder(list(texts))]

    def coverage(self, texts: Iterable[str]) -> Coverage:
        """What the teacher would supervise if the student answered with these texts, each closed by the end-of-turn."""
        texts = list(texts)
        student = self.encode_student(texts)
        found = self.coverage_of(student, self.encode_teacher(student))
        return replace(found, text_bytes=sum(len(text.encode()) for text in texts))

    def coverage_of(self, student_ids: Sequence[Ids], teacher_ids: Sequence[Ids]) -> Coverage:
        """What the teacher would supervise of a batch of responses; `texts` of the result counts them."""
        student, teacher = list(student_ids), list(teacher_ids)
        total = sum(map(len, student))

        student_tokens, teacher_tokens = self._student.tokens(), self._teacher.tokens()
        public = sum(len(self.match_strings(s, t)) for s, t in zip(student, teacher, strict=True))
        rules = {"simpleopd_public": RuleCoverage.count(public, 0, total, {"not_matched": total - public})}
        for rule, alignment in (("simct_public", "anchored"), ("simct", "bytes")):
            units = self._align(student, teacher, alignment, False)
            one = int(((units.student_length == 1) & (units.teacher_length == 1)).sum())
            longer = int(units.student_length.sum()) - one
            if rule == "simct":
                dropped = units.dropped | {"longer_unit": longer}
                rules["simpleopd"] = RuleCoverage.count(one, 0, total, {k: v for k, v in dropped.items() if v})
            rules[rule] = RuleCoverage.count(one, longer, total, units.dropped)
        return Coverage(
            texts=len(student),
            text_bytes=sum(len(piece or b"") for ids in student for piece in self.student_pieces(ids)),
            student_tokens=total,
            teacher_tokens=sum(map(len, teacher)),
            shared=len(self.shared.student_ids),
            shared_by_string=shared_by_string(student_tokens, teacher_tokens),
            rules=rules,
        )

    def reasons(self, student_ids: Ids, teacher_ids: Ids) -> list[str | None]:
        """Why each student token of one response is in no unit (see `Alignment`), None for one that is in a unit."""
        _, reason = self._align_rows([student_ids], [teacher_ids], self.alignment, False)
        return [None if i < 0 else _REASONS[i] for i in reason.tolist()]

    def match_strings(self, student_ids: Ids, teacher_ids: Ids) -> list[tuple[int, int]]:
        """The pairs of positions in one response that SimpleOPD's public code compares: it walks over token strings, without
        their space markers, and after the first two that do not begin alike it finds no more."""
        if self._strings is None:
            self._strings = without_markers(self._student.tokens()), without_markers(self._teacher.tokens())
            for strings, end in zip(self._strings, self.end_pair, strict=True):
                strings[end] = "end of turn"
        student, teacher = self._strings
        return greedy_single([student[i] for i in student_ids], [teacher[i] for i in teacher_ids])

    def cut(self, text: str) -> list[Cut]:
        """How both tokenizers cut one text, unit by unit, stretches without supervision included."""
        (student,) = self._student.encoder([text])
        (teacher,) = self.encode_teacher([student])
        units = self.align(student, teacher)
        bounds = [
            t.tolist() for t in (units.student_start, units.student_length, units.teacher_start, units.teacher_length)
        ]
        student_pieces, teacher_pieces = self.student_pieces(student), self.teacher_pieces(teacher)
        cuts, i, j = [], 0, 0
        for s, m, t, n in [*zip(*bounds, strict=True), (len(student), 0, len(teacher), 0)]:
            if i < s or j < t:
                cuts.append(Cut(tuple(student_pieces[i:s]), tuple(teacher_pieces[j:t]), aligned=False))
            i, j = s + m, t + n
            if m:
                cuts.append(Cut(tuple(student_pieces[s:i]), tuple(teacher_pieces[t:j]), aligned=True))
        return cuts

    def prefix_tables(self, student_size: int, teacher_size: int) -> PrefixTables:
        """What `bpm_loss` and `escd_loss` read, for heads of so many rows. Takes seconds: make it once.

        Mapped special tokens go where the mapping says, any other end-of-turn of the teacher to the student's primary one.
        """
        routes = dict.fromkeys(self.teacher_end_ids, self.end_pair[0])
        routes.update((teacher, student) for student, teacher in self._mapped.items())
        sides = ((self._student.pieces, student_size), (self._teacher.pieces, teacher_size))
        pieces = [(side + [None] * size)[:size] for side, size in sides]  # a head may have rows for no token, a padding
        canonical = {piece: i for piece, i in self._student.by_bytes().items() if i < student_size}
        return PrefixTables.build(*pieces, special_routes=routes, canonical=canonical)

    def student_pieces(self, ids: Ids) -> list[bytes | None]:
        """The bytes of student tokens, `None` for a special one."""
        return self._student.pieces_of(ids)

    def teacher_pieces(self, ids: Ids) -> list[bytes | None]:
        """The bytes of teacher tokens, `None` for a special one."""
        return self._teacher.pieces_of(ids)

    def _share(self, mapped: dict[int, int]) -> SharedVocabulary:
        student, teacher = self._student.by_bytes(), self._teacher.by_bytes()
        taken, classes = set(mapped.values()), dict[str, torch.Tensor]()
        if self.stop == "class":
            mapped, classes = end_class(mapped, *self.stop_ids)
        pairs = {i: teacher[piece] for piece, i in student.items() if piece in teacher and teacher[piece] not in taken}
        student_ids, teacher_ids = torch.tensor(sorted((pairs | mapped).items()), dtype=torch.int64).T
        return SharedVocabulary(student_ids.contiguous(), teacher_ids.contiguous(), **classes)

    def _align(self, student_batch, teacher_batch, alignment: str, disjoint: bool) -> Alignment:
        return self._align_rows(student_batch, teacher_batch, alignment, disjoint)[0]

    def _align_rows(self, student_batch, teacher_batch, alignment: str, disjoint: bool) -> tuple[Alignment, np.ndarray]:
        """The aligned units, and int64 [N_s]: for a student row in no unit why (of _REASONS), else -1."""
        if len(student_batch) != len(teacher_batch):
            raise ValueError(f"{len(student_batch)} student responses, but {len(teacher_batch)} of the teacher's")
        student, teacher = self._student.pack(student_batch), self._teacher.pack(teacher_batch)
        invalid = np.zeros(len(student.ids), bool)
        blocks = text_blocks(student, teacher, invalid)
        units = partition(student.lengths, teacher.lengths, blocks)

        spoiled = _count(student.lengths == 0, units[0], units[1]) + _count(teacher.lengths == 0, units[2], units[3])
        spoiled = (spoiled + _count(invalid, units[0], units[1])) > 0
        lost, units = [column[spoiled] for column in units], tuple(column[~spoiled] for column in units)
        tail = np.zeros(0, bool)
        finest = units
        if alignment == "anchored":
            units, tail = anchored(units, np.searchsorted(student.rows, units[0], side="right"))

        covered = _cover(len(student.ids), units[0], units[1])
        dropped = {}
        reason = np.full(len(student.ids), -1)
        if not covered.all():
            special = _count(student.special, lost[0], lost[1]) + _count(teacher.special, lost[2], lost[3]) > 0
            reason[:] = _TEXT_DIFFERS
            reason[_cover(len(reason), lost[0][~special], lost[1][~special])] = _INVALID
            reason[_cover(len(reason), lost[0][special], lost[1][special])] = _SPECIAL
            if tail.any():
                reason[_cover(len(reason), finest[0][tail], finest[1][tail])] = _ANCHORED_TAIL
            for r, (stop, ended) in enumerate(zip(student.stops, student.ended, strict=True)):
                if teacher.rows[r] == teacher.rows[r + 1]:
                    reason[student.rows[r] : student.rows[r + 1]] = _NO_TEACHER
                elif ended and not teacher.ended[r]:
                    reason[stop] = _NO_END
                reason[stop + ended : student.rows[r + 1]] = _AFTER_END
            reason[invalid] = _INVALID
            reason[student.special] = _SPECIAL
            reason[covered] = -1
            counts = np.bincount(reason[~covered], minlength=len(_REASONS))
            dropped = {name: int(count) for name, count in zip(_REASONS, counts, strict=True) if count}

        left_out = None
        if disjoint:
            left_out = torch.from_numpy(self._left_out(student.ids, teacher.ids, units))
        student_start, student_length, teacher_start, teacher_length = map(torch.from_numpy, units)
        aligned = Alignment(
            student_start,
            student_length,
            teacher_start,
            teacher_length,
            student_tokens=torch.from_numpy(student.ids),
            teacher_tokens=torch.from_numpy(teacher.ids),
            left_out=left_out,
            dropped=dropped,
        )
        return aligned, reason

    def _left_out(self, student_ids: np.ndarray, teacher_ids: np.ndarray, units: Units) -> np.ndarray:
        """int64 [E, 2], (unit, shared token) whose bytes overlap with the unit's continuation."""
        if self._prefixes is None:
            self._prefixes = _PrefixIndex(self._student.pieces, self.shared.student_ids.tolist())
        start, length, teacher_start, teacher_length = units
        single = (length == 1) & (teacher_length == 1)
        tokens = torch.from_numpy(student_ids[start]), torch.from_numpy(teacher_ids[teacher_start])
        continued = np.flatnonzero(~(single & self.shared.holds(*tokens).numpy()))
        spelled, ids = self._student.spelled, student_ids.tolist()
        # An end-of-turn without a pair of its own still means what the primary one means; a class holds all ends.
        end = np.flatnonzero(self.shared.student_ids.numpy() == self.end_pair[0])
        found = [end[:0]]
        for first, count in zip(start[continued].tolist(), length[continued].tolist(), strict=True):
            text = b"".join([spelled[i] for i in ids[first : first + count]])
            found.append(self._prefixes.overlapping(text) if text else end)
        unit = np.repeat(continued, [len(tokens) for tokens in found[1:]])
        return np.stack([unit, np.concatenate(found)], axis=1)


class _PrefixIndex:
    """Finds the shared tokens that are a prefix of a text or start with it."""

    def __init__(self, pieces: Sequence[bytes | None], student_ids: Sequence[int]):
        spelled = sorted((piece, k) for k, i in enumerate(student_ids) if (piece := pieces[i]))
        self._bytes = [piece for piece, _ in spelled]
        self._index = [k for _, k in spelled]
        self._by_bytes = dict(spelled)
        self._longest = max(map(len, self._bytes), default=0)
        self._known: dict[bytes, np.ndarray] = {}

    def overlapping(self, text: bytes) -> np.ndarray:
        """Shared indices, int64, ascending."""
        if text not in self._known:
            if len(self._known) >= 100_000:  # a long run meets ever new units
                self._known.clear()
            shorter = (self._by_bytes.get(text[:n]) for n in range(1, min(len(text), self._longest + 1)))
            first = last = bisect_left(self._bytes, text)
            while last < len(self._bytes) and self._bytes[last].startswith(text):
                last += 1
            found = sorted([*(k for k in shorter if k is not None), *self._index[first:last]])
            self._known[text] = np.array(found, dtype=np.int64)
        return self._known[text]


def _resolve(special_tokens: Mapping, student_tokenizer, teacher_tokenizer) -> dict[int, int]:
    """An explicit mapping as ids."""

    def identify(token, role, tokenizer, vocabulary):
        if isinstance(token, str) and token in vocabulary:
            return vocabulary[token]
        if isinstance(token, int) and token in vocabulary.values():
            return token
        raise ValueError(f"special_tokens names {token!r}, which the {role}'s tokenizer does not have")

    sides = [(role, t, t.get_vocab()) for role, t in (("student", student_tokenizer), ("teacher", teacher_tokenizer))]
    pairs = [
        tuple(identify(token, *side) for token, side in zip(pair, sides, strict=True))
        for pair in special_tokens.items()
    ]
    mapped = dict(pairs)
    if len(mapped) < len(pairs) or len(set(mapped.values())) < len(pairs):
        raise ValueError(f"special_tokens must be one to one, got {dict(special_tokens)!r}")
    return mapped


def _end_pair(mapped: dict[int, int], student_ends: Sequence[int], teacher_ends: Sequence[int]) -> tuple[int, int]:
    """The primary end-of-turn of both sides: the mapped pair that holds one of them, else the two that were found."""
    for student, teacher in mapped.items():
        if student_ends[:1] == (student,):
            return student, teacher
    for student, teacher in mapped.items():
        if teacher_ends[:1] == (teacher,) or not (student_ends and teacher_ends):
            return student, teacher
    for role, ends in (("student", student_ends), ("teacher", teacher_ends)):
        if not ends:
            raise ValueError(
                f"the {role}'s tokenizer has no end-of-turn token; name one with special_tokens={{student: teacher}}"
            )
    return student_ends[0], teacher_ends[0]


def _count(marked: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """How many rows of each unit are marked."""
    if not marked.any():
        return np.zeros(len(start), np.int64)
    total = np.concatenate([[0], np.cumsum(marked)])
    return total[start + length] - total[start]


def _cover(rows: int, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bool [rows], the rows of units that do not overlap."""
    change = np.zeros(rows + 1, np.int8)
    change[start] += 1
    change[start + length] -= 1
    return np.cumsum(change[:-1], dtype=np.int8).astype(bool)
