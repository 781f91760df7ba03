"""The oracles of BPM and ESCD: their definitions row by row and token by token, from the tokens' bytes, in plain autograd.

Nothing here knows the tables that `bpm_loss` and `escd_loss` read. As slow as it is plain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from simct_kernels.inputs import AlignedUnits

Pieces = Sequence[bytes | None]


def bpm_losses(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    student_bytes: Pieces,
    teacher_bytes: Pieces,
    special_routes: Mapping[int, int],
    temperature: float = 1.0,
) -> Tensor:
    """[G], as `bpm_loss` with reduction="none"."""
    log_q = (student_logits / temperature).log_softmax(dim=1)
    p = (teacher_logits.detach() / temperature).softmax(dim=1)
    losses = []
    for g in range(len(units)):
        loss = student_logits.new_zeros(())
        for row, teacher_row, emitted in _student_rows(units, g, student_bytes, teacher_bytes):
            routed: dict[int | None, Tensor] = {}
            for token, probability in enumerate(p[teacher_row]):
                piece = teacher_bytes[token]
                if not emitted:
                    home = special_routes.get(token, _home(piece, student_bytes))
                elif piece and piece.startswith(emitted) and piece != emitted:
                    home = _home(piece[len(emitted) :], student_bytes)
                else:
                    continue
                routed[home] = routed.get(home, 0) + probability
            total = sum(routed.values())
            loss = loss + _divergence({home: mass / total for home, mass in routed.items()}, log_q[row])
        losses.append(loss)
    return torch.stack(losses) if losses else student_logits.sum() * torch.zeros(0, dtype=log_q.dtype)


def escd_losses(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    student_bytes: Pieces,
    teacher_bytes: Pieces,
    special_routes: Mapping[int, int],
    response_lengths: Sequence[int],
    temperature: float = 1.0,
) -> Tensor:
    """[G], as `escd_loss` with reduction="none"."""
    log_q = (student_logits / temperature).log_softmax(dim=1)
    p = (teacher_logits.detach() / temperature).softmax(dim=1)
    last_rows = {sum(response_lengths[: i + 1]) - 1 for i in range(len(response_lengths))}
    losses = []
    for g in range(len(units)):
        row, teacher_row = int(units.student_start[g]), int(units.teacher_start[g])
        routed: dict[int | None, Tensor] = {}
        for token, probability in enumerate(p[teacher_row]):
            home = special_routes.get(token, _home(teacher_bytes[token], student_bytes))
            routed[home] = routed.get(home, 0) + probability
        loss = _divergence(routed, log_q[row])
        sampled = student_bytes[int(units.student_tokens[row])]
        if sampled and row not in last_rows:
            for shortest, members in _groups(sampled, student_bytes, teacher_bytes, special_routes).items():
                rest = shortest[len(sampled) :]
                completing = [u for u, piece in enumerate(student_bytes) if piece and piece.startswith(rest)]
                if completing:
                    loss = loss - p[teacher_row, members].sum() * log_q[row + 1, completing].logsumexp(dim=0)
        losses.append(loss)
    return torch.stack(losses) if losses else student_logits.sum() * torch.zeros(0, dtype=log_q.dtype)


def _student_rows(units: AlignedUnits, g: int, student_bytes: Pieces, teacher_bytes: Pieces):
    """Each student row of a unit, the teacher row whose token begins last at or before it, and the bytes emitted since."""

    def spelled(side: str, pieces: Pieces) -> list[tuple[int, int, bytes]]:  # (row, byte where it begins, its bytes)
        start, length = int(getattr(units, f"{side}_start")[g]), int(getattr(units, f"{side}_length")[g])
        found, at = [], 0
        for row in range(start, start + length):
            piece = pieces[int(getattr(units, f"{side}_tokens")[row])] or b"?"  # a special token is as long as a byte
            found.append((row, at, piece))
            at += len(piece)
        return found

    student = spelled("student", student_bytes)
    text = b"".join(piece for _, _, piece in student)
    teacher = spelled("teacher", teacher_bytes)
    for row, at, _ in student:
        teacher_row, begin, _ = [entry for entry in teacher if entry[1] <= at][-1]
        yield row, teacher_row, text[begin:at]


def _home(piece: bytes | None, student_bytes: Pieces) -> int | None:
    """The lowest id of the longest student token that is a prefix of these bytes."""
    best = None
    for i, candidate in enumerate(student_bytes):
        if piece and candidate and piece.startswith(candidate):
            if best is None or len(candidate) > len(student_bytes[best]):
                best = i
    return best


def _divergence(
    routed: Mapping[int | None, Tensor],  # the teacher's mass by student token; None: no home
    log_q: Tensor,  # [V_s]
) -> Tensor:
    """Forward KL over the student tokens that something routes to and one class for all the others."""
    others = [i for i in range(len(log_q)) if i not in routed]
    outcomes = [(mass, log_q[token]) for token, mass in routed.items() if token is not None]
    if others and None in routed:
        outcomes.append((routed[None], log_q[others].logsumexp(dim=0)))
    kept = sum(mass for mass, _ in outcomes)
    loss = sum(mass * (mass.log() - log) for mass, log in outcomes if mass > 0)
    return loss - kept * kept.log()


def _groups(
    sampled: bytes, student_bytes: Pieces, teacher_bytes: Pieces, special_routes: Mapping[int, int]
) -> dict[bytes, list[int]]:
    """The teacher tokens that go on after the sampled one and that no student token stands for, by the shortest of them."""
    known = set(student_bytes)
    longer = [
        (piece, token)
        for token, piece in enumerate(teacher_bytes)
        if piece
        and piece.startswith(sampled)
        and piece != sampled
        and piece not in known
        and token not in special_routes
    ]
    groups: dict[bytes, list[int]] = {}
    for piece, token in sorted(longer, key=lambda entry: len(entry[0])):
        shortest = next((begin for begin in groups if piece.startswith(begin)), piece)
        groups.setdefault(shortest, []).append(token)
    return groups
