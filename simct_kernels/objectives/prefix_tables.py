"""Which tokens of two vocabularies are byte prefixes of which: what `bpm_loss` and `escd_loss` look up instead of bytes.

Made once for a pair of vocabularies, on the CPU; afterwards everything is integers.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from os.path import commonprefix

import torch
from torch import Tensor

from simct_kernels.host import moved
from simct_kernels.values import check_device, check_type, describe, is_dense

_DTYPES = {
    **dict.fromkeys(("student_text", "teacher_text"), torch.int16),
    **dict.fromkeys(("suffix_home", "continued_begin", "continued_stop"), torch.int32),
    "routed": torch.bool,
}
NO_BYTE = 256  # stands in a text for a token without bytes, which is as long as one byte

Pieces = Sequence[bytes | None]


@dataclass(frozen=True, eq=False)
class PrefixTables:
    """Made by `PrefixTables.build`. V_s and V_t are the columns of the heads, B_t the bytes of all the teacher's tokens together.

    The *home* of a byte string is the longest student token whose bytes are a prefix of it, V_s if there is none. The
    *completions* of a student token `a` are groups of teacher tokens that start with `a` and are longer, and that no student
    token stands for, by bytes or by a route: those of which one is a prefix of the others, the shortest being y. The student
    completes a group with any token that starts with what y has after `a`; in `student_order` such tokens are neighbours.
    Groups that no student token completes are not listed.
    """

    student_first: Tensor  # int64 [V_s + 1], where each token's bytes begin in student_text
    student_text: Tensor  # int16 [B_s], all tokens' bytes one after the other
    teacher_first: Tensor  # int64 [V_t + 1]
    teacher_text: Tensor  # int16 [B_t]
    home: Tensor  # int64 [V_t], of each teacher token
    routed: Tensor  # bool [V_s], whether a student token is the home of any teacher token
    suffix_home: Tensor  # int32 [B_t], of what a teacher token has from this byte on
    teacher_order: Tensor  # int64 [n_t], the teacher's tokens with bytes, sorted by them
    # In teacher_order, the tokens that start with what this token has before this byte, and are longer:
    continued_begin: Tensor  # int32 [B_t]
    continued_stop: Tensor  # int32 [B_t]
    student_order: Tensor  # int64 [n_s], the student's tokens with bytes, sorted by them
    group_begin: Tensor  # int64 [V_s], the completions of each student token: groups from here
    group_stop: Tensor  # int64 [V_s]
    member_first: Tensor  # int64 [groups + 1], where each group's teacher tokens begin in `members`
    members: Tensor  # int64 [any]
    completion_begin: Tensor  # int64 [groups], in student_order: the tokens that complete the group
    completion_stop: Tensor  # int64 [groups]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, dtype = getattr(self, field.name), _DTYPES.get(field.name, torch.int64)
            if not is_dense(value) or value.dtype != dtype or value.dim() != 1:
                raise ValueError(
                    f"{field.name} must be {dtype} [any], got {describe(value)}: tables are made by PrefixTables.build"
                )
            check_device(field.name, value, "student_first", self.student_first)

    @classmethod
    def build(
        cls,
        student_bytes: Pieces,
        teacher_bytes: Pieces,
        *,
        special_routes: Mapping[int, int] | None = None,
        canonical: Mapping[bytes, int] | None = None,
    ) -> PrefixTables:
        """Reads the bytes of every token of both sides, a few seconds for 250,000 tokens.

        Args:
            student_bytes, teacher_bytes: by id, one for each row of the side's head; None for a token that spells nothing: a
                special one, or a row that only fills up the head.
            special_routes: {teacher id: student id} of tokens that mean the same without regard to bytes, such as the ends of
                turn. A teacher token without bytes and without a route has no home.
            canonical: the student id that is meant where several spell the same bytes; the lowest if not given.

        Raises:
            ValueError: an empty vocabulary, a token that is neither bytes nor None, ids outside a vocabulary, a canonical id that
                has other bytes.
        """
        _check_pieces("student_bytes", student_bytes)
        _check_pieces("teacher_bytes", teacher_bytes)
        routes = {} if special_routes is None else special_routes
        canonical = {} if canonical is None else canonical
        check_type("special_routes", routes, Mapping, "a mapping or None")
        check_type("canonical", canonical, Mapping, "a mapping or None")
        for teacher_id, student_id in routes.items():
            _check_id("special_routes", teacher_id, "teacher", teacher_bytes)
            _check_id("special_routes", student_id, "student", student_bytes)
        for piece, i in canonical.items():
            _check_id("canonical", i, "student", student_bytes)
            if student_bytes[i] != piece:
                raise ValueError(f"canonical maps {piece!r} to student id {i}, which spells {student_bytes[i]!r}")

        student_order, teacher_order = _sorted_ids(student_bytes), _sorted_ids(teacher_bytes)
        ids = {student_bytes[i]: i for i in reversed(student_order)} | dict(canonical)
        suffix_home = _suffix_homes(teacher_bytes, ids, none=len(student_bytes))
        teacher_first, teacher_text = _texts(teacher_bytes)
        student_first, student_text = _texts(student_bytes)
        home = suffix_home[teacher_first[:-1]].long()
        for teacher_id, student_id in routes.items():
            home[teacher_id] = student_id
        routed = torch.zeros(len(student_bytes) + 1, dtype=torch.bool)
        routed[home] = True
        continued = _continued(teacher_bytes, teacher_order)
        return cls(
            student_first=student_first,
            student_text=student_text,
            teacher_first=teacher_first,
            teacher_text=teacher_text,
            home=home,
            routed=routed[:-1].clone(),
            suffix_home=suffix_home,
            teacher_order=torch.tensor(teacher_order, dtype=torch.int64),
            continued_begin=continued[0],
            continued_stop=continued[1],
            student_order=torch.tensor(student_order, dtype=torch.int64),
            **_completions(student_bytes, student_order, teacher_bytes, _without(teacher_order, routes), ids),
        )

    @property
    def student_size(self) -> int:
        return self.routed.shape[0]

    @property
    def teacher_size(self) -> int:
        return self.home.shape[0]

    def to(self, device: torch.device | str) -> PrefixTables:
        return moved(self, device)


def _without(ids: Sequence[int], left_out: Container[int]) -> list[int]:
    return [i for i in ids if i not in left_out]


def _sorted_ids(pieces: Pieces) -> list[int]:
    return sorted((i for i, piece in enumerate(pieces) if piece), key=lambda i: pieces[i])


def _texts(pieces: Pieces) -> tuple[Tensor, Tensor]:
    first = torch.tensor([0, *(len(piece) if piece else 1 for piece in pieces)]).cumsum(0)
    text = torch.frombuffer(bytearray(b"".join(piece or b"?" for piece in pieces)), dtype=torch.uint8).short()
    text[first[:-1][torch.tensor([not piece for piece in pieces])]] = NO_BYTE
    return first, text


def _suffix_homes(pieces: Pieces, ids: Mapping[bytes, int], none: int) -> Tensor:
    spelled = sorted(ids)
    prefix_of = [-1 if not stack else stack[-1] for stack in _prefixes(spelled)]
    longest = max(map(len, spelled), default=0)
    known: dict[bytes, int] = {}
    homes = []
    for piece in pieces:
        for at in range(len(piece)) if piece else ():
            text = piece[at : at + longest]
            home = known.get(text)
            if home is None:
                # The last token that does not come behind the text is its home, or the home is a prefix of that token.
                place = bisect_right(spelled, text) - 1
                while place >= 0 and not text.startswith(spelled[place]):
                    place = prefix_of[place]
                home = ids[spelled[place]] if place >= 0 else none
                if len(text) <= 32:
                    known[text] = home
            homes.append(home)
        if not piece:
            homes.append(none)
    return torch.tensor(homes, dtype=torch.int32)


def _continued(pieces: Pieces, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where in `order` the tokens that go on after each beginning of a token start and stop."""
    spelled = [pieces[i] for i in order]
    same = [0, *(len(commonprefix(pair)) for pair in pairwise(spelled)), 0]  # bytes shared with the token before
    bounds = []
    for backwards in (False, True):
        found: list[Sequence[int]] = [[]] * len(pieces)
        open_at = [0]  # by number of bytes: where, in this direction, the tokens with this token's beginning start
        for k in reversed(range(len(spelled))) if backwards else range(len(spelled)):
            size, kept = len(spelled[k]), same[k + 1 if backwards else k]
            open_at[kept + 1 :] = [k + backwards] * (size - kept)
            if not backwards:
                open_at[size] = k + 1  # what is equal goes before what is longer
            found[order[k]] = open_at[1:size]
        whole = len(spelled) if backwards else 0  # nothing emitted: never looked up
        every = chain.from_iterable((whole, *rest) for rest in found)
        bounds.append(torch.tensor(list(every), dtype=torch.int32))
    return bounds[0], bounds[1]


def _completions(
    student: Pieces,
    student_order: Sequence[int],
    teacher: Pieces,
    teacher_order: Sequence[int],
    ids: Mapping[bytes, int],
) -> dict[str, Tensor]:
    spelled = [student[i] for i in student_order]
    members_of: dict[bytes, list[int]] = {}  # by what no student token spells
    for i in teacher_order:
        if teacher[i] not in ids:
            members_of.setdefault(teacher[i], []).append(i)
    groups: dict[bytes, dict[bytes, list[int]]] = {}  # by the sampled token, by the group's shortest token
    ranges: dict[bytes, tuple[int, int]] = {}  # in `spelled`, of the tokens that start with a group's remaining bytes
    union = sorted(members_of.keys() | ids.keys())
    for piece, stack in zip(union, _prefixes(union), strict=True):
        shortest = piece
        for sampled in map(union.__getitem__, reversed(stack)) if piece in members_of else ():
            if sampled in members_of:
                shortest = sampled
                continue
            rest = shortest[len(sampled) :]
            if rest not in ranges:
                ranges[rest] = bisect_left(spelled, rest), _behind(spelled, rest)
            if ranges[rest][0] < ranges[rest][1]:
                groups.setdefault(sampled, {}).setdefault(shortest, []).extend(members_of[piece])

    begin, stop = torch.zeros(2, len(student), dtype=torch.int64)
    count = 0
    place: dict[bytes, tuple[int, int]] = {}
    for piece, found in groups.items():
        place[piece] = count, count + len(found)
        count += len(found)
    for i in student_order:
        if student[i] in place:
            begin[i], stop[i] = place[student[i]]
    members = [group for found in groups.values() for group in found.values()]
    completing = [ranges[shortest[len(sampled) :]] for sampled, found in groups.items() for shortest in found]
    completion_begin, completion_stop = torch.tensor(completing, dtype=torch.int64).reshape(-1, 2).T
    return dict(
        group_begin=begin,
        group_stop=stop,
        member_first=torch.tensor([0, *map(len, members)]).cumsum(0),
        members=torch.tensor([i for group in members for i in group], dtype=torch.int64),
        completion_begin=completion_begin.contiguous(),
        completion_stop=completion_stop.contiguous(),
    )


def _prefixes(spelled: Sequence[bytes]) -> Iterator[list[int]]:
    """Of each of these ascending strings the places of those that it starts with, the shortest first: one list, used again."""
    stack: list[int] = []
    for k, piece in enumerate(spelled):
        while stack and not piece.startswith(spelled[stack[-1]]):
            stack.pop()
        yield stack
        stack.append(k)


def _behind(spelled: Sequence[bytes], prefix: bytes) -> int:
    """Where in the sorted list the strings that start with `prefix` end."""
    stem = prefix.rstrip(b"\xff")
    return bisect_left(spelled, stem[:-1] + bytes([stem[-1] + 1])) if stem else len(spelled)


def _check_pieces(name: str, pieces: Pieces) -> None:
    if isinstance(pieces, (bytes, str)) or not isinstance(pieces, Sequence) or not pieces:
        got = "an empty one" if isinstance(pieces, Sequence) and not pieces else type(pieces).__name__
        raise ValueError(f"{name} must be a list with the bytes of each token, got {got}")
    for i, piece in enumerate(pieces):
        if piece is not None and not isinstance(piece, bytes):
            raise ValueError(f"{name}[{i}] must be bytes or None, got {piece!r}")


def _check_id(name: str, i: int, side: str, pieces: Pieces) -> None:
    if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(pieces):
        raise ValueError(f"{name} holds {side} id {i!r}, outside the {len(pieces)} ids of {side}_bytes")
