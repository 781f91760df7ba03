"""Which tokens of two vocabularies are byte prefixes of which: what `bpm_loss` and `escd_loss` look up instead of bytes.

Made once for a pair of vocabularies, on the CPU; afterwards everything is integers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels.inputs import moved

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
    continued_begin: (
        Tensor  # int32 [B_t], in teacher_order: the tokens that start with what this token has before this byte,
    )
    continued_stop: Tensor  # int32 [B_t]   and are longer
    student_order: Tensor  # int64 [n_s], the student's tokens with bytes, sorted by them
    group_begin: Tensor  # int64 [V_s], the completions of each student token: groups from here
    group_stop: Tensor  # int64 [V_s]
    member_first: Tensor  # int64 [groups + 1], where each group's teacher tokens begin in `members`
    members: Tensor  # int64 [any]
    completion_begin: Tensor  # int64 [groups], in student_order: the tokens that complete the group
    completion_stop: Tensor  # int64 [groups]

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
        routes, canonical = special_routes or {}, canonical or {}
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
    lengths = torch.tensor([0, *(len(piece) if piece else 1 for piece in pieces)])
    text = [value for piece in pieces for value in (piece or (NO_BYTE,))]
    return lengths.cumsum(0), torch.tensor(text, dtype=torch.int16)


def _suffix_homes(pieces: Pieces, ids: Mapping[bytes, int], none: int) -> Tensor:
    longest = max(map(len, ids), default=0)
    known: dict[bytes, int] = {}
    homes = []
    for piece in pieces:
        for at in range(len(piece)) if piece else ():
            text = piece[at : at + longest]
            found = known.get(text)
            if found is None:
                found = next((ids[text[:n]] for n in range(len(text), 0, -1) if text[:n] in ids), none)
                known[text] = found
            homes.append(found)
        if not piece:
            homes.append(none)
    return torch.tensor(homes, dtype=torch.int32)


def _continued(pieces: Pieces, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    spelled = [pieces[i] for i in order]
    whole = (0, len(spelled))
    known: dict[bytes, tuple[int, int]] = {}
    ranges = []
    for piece in pieces:
        ranges.append(whole)  # nothing emitted: never looked up
        for at in range(1, len(piece or b"")):
            text = piece[:at]
            if text not in known:
                known[text] = bisect_right(spelled, text), _behind(spelled, text)
            ranges.append(known[text])
    begin, stop = torch.tensor(ranges, dtype=torch.int32).T
    return begin.contiguous(), stop.contiguous()


def _completions(
    student: Pieces,
    student_order: Sequence[int],
    teacher: Pieces,
    teacher_order: Sequence[int],
    ids: Mapping[bytes, int],
) -> dict[str, Tensor]:
    spelled = [student[i] for i in student_order]
    unspelled = {teacher[i] for i in teacher_order} - ids.keys()
    known: dict[bytes, tuple[int, int]] = {}
    groups: dict[bytes, dict[bytes, list[int]]] = {}  # by the sampled token, by the group's shortest token
    for i in teacher_order:
        piece = teacher[i]
        if piece not in unspelled:
            continue
        lengths = [n for n in range(1, len(piece) + 1) if piece[:n] in unspelled]
        for n in range(1, len(piece)):
            if piece[:n] not in ids:
                continue
            shortest = piece[: lengths[bisect_right(lengths, n)]]
            rest = shortest[n:]
            if rest not in known:
                known[rest] = bisect_left(spelled, rest), _behind(spelled, rest)
            if known[rest][0] < known[rest][1]:
                groups.setdefault(piece[:n], {}).setdefault(shortest, []).append(i)

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
    completing = [known[shortest[len(piece) :]] for piece, found in groups.items() for shortest in found]
    completion_begin, completion_stop = torch.tensor(completing, dtype=torch.int64).reshape(-1, 2).T
    return dict(
        group_begin=begin,
        group_stop=stop,
        member_first=torch.tensor([0, *map(len, members)]).cumsum(0),
        members=torch.tensor([i for group in members for i in group], dtype=torch.int64),
        completion_begin=completion_begin.contiguous(),
        completion_stop=completion_stop.contiguous(),
    )


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
    if not isinstance(i, int) or not 0 <= i < len(pieces):
        raise ValueError(f"{name} holds {side} id {i!r}, outside the {len(pieces)} ids of {side}_bytes")
