"""One side of a pair: its token bytes, its text encoder, its responses packed into rows; where two sides' texts agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simct.pairing.alignment import invalid_utf8, matching_blocks
from simct.pairing.tokens import TextEncoder, describe, token_bytes, verify

Ids = Sequence[int] | np.ndarray | torch.Tensor


@dataclass
class Packed:
    """A batch of responses of one side, rows in order."""

    ids: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [R + 1], the first row of each response
    lengths: np.ndarray  # int64 [N], bytes of each row's token; 1 for the end-of-turn, 0 for what spells nothing
    special: np.ndarray  # bool [N], special tokens inside a response; the end-of-turn is none
    texts: list[bytes]  # without the end-of-turn
    stops: list[int]  # row behind the text
    ended: list[bool]  # whether that row is an end-of-turn


class Side:
    """One tokenizer of the pair: its token bytes, its text encoder, and the packing of its responses."""

    def __init__(self, role: str, tokenizer, ends: Sequence[int], vocabulary_size: int | None = None):
        self.role = role
        self._tokenizer = tokenizer
        self.pieces = token_bytes(tokenizer)
        self.pieces += [None] * ((vocabulary_size or 0) - len(self.pieces))
        for i in ends:
            if not 0 <= i < len(self.pieces):
                raise ValueError(f"the {role}'s end-of-turn id {i} is outside its vocabulary of {len(self.pieces)} ids")
            self.pieces[i] = None
        self.spelled = [piece or b"" for piece in self.pieces]
        self._lengths = np.array([len(piece) for piece in self.spelled])
        self._is_end = np.zeros(len(self.pieces), bool)
        self._is_end[list(ends)] = True
        self.encoder = TextEncoder(tokenizer, self.pieces)
        verify(self.encoder, f"the {role}'s tokenizer {describe(tokenizer)}")

    def by_bytes(self) -> dict[bytes, int]:
        """The id of every spelled byte string; of several, the one that the tokenizer itself produces, else the lowest."""
        found: dict[bytes, int] = {}
        several: dict[bytes, set[int]] = {}
        for i, piece in enumerate(self.spelled):
            if piece and found.setdefault(piece, i) != i:
                several.setdefault(piece, {found[piece]}).add(i)
        valid = {piece: text for piece in several if (text := piece.decode("utf-8", "ignore")).encode() == piece}
        for piece, ids in zip(valid, self.encoder(list(valid.values())), strict=True):
            if len(ids) == 1 and ids[0] in several[piece]:
                found[piece] = ids[0]
        return found

    def tokens(self) -> list[str]:
        """Token strings by id, as the vocabulary writes them."""
        tokens = [""] * len(self.pieces)
        for token, i in self._tokenizer.get_vocab().items():
            tokens[i] = token
        return tokens

    def pieces_of(self, ids: Ids) -> list[bytes | None]:
        (known,), _ = self._checked([ids])
        return [self.pieces[i] for i in known]

    def pack(self, batch: Sequence[Ids]) -> Packed:
        lists, arrays = self._checked(batch)
        rows = np.cumsum([0, *map(len, lists)])
        ids = np.concatenate([np.zeros(0, np.int64), *arrays])
        lengths = self._lengths[ids]
        is_end = np.flatnonzero(self._is_end[ids])
        first = np.searchsorted(is_end, rows[:-1])
        stops = np.minimum(np.append(is_end, len(ids))[first], rows[1:])
        ended = stops < rows[1:]
        special = lengths == 0
        for stop, row_end in zip(stops[ended].tolist(), rows[1:][ended].tolist(), strict=True):
            lengths[stop], lengths[stop + 1 : row_end] = 1, 0
            special[stop:row_end] = False
        spelled, texts = self.spelled, []
        for response, length in zip(lists, (stops - rows[:-1]).tolist(), strict=True):
            texts.append(b"".join(map(spelled.__getitem__, response[:length])))
        return Packed(ids, rows, lengths, special, texts, stops.tolist(), ended.tolist())

    def _checked(self, batch: Sequence[Ids]) -> tuple[list[list[int]], list[np.ndarray]]:
        """The responses as lists and as int64 arrays."""
        if text := next((ids for ids in [batch, *batch] if isinstance(ids, (str, bytes))), None):
            raise ValueError(
                f"{self.role} responses must be token ids, got the text {text[:40]!r}: expected what "
                "pair.encode_student([text, ...]) returns"
            )
        lists = [ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in batch]
        arrays = []
        for ids in filter(None, lists):
            array = np.array(ids)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(
                    f"{self.role} ids must be a flat sequence of integers, got {array.dtype} of shape {array.shape}"
                )
            outside = (array < 0) | (array >= len(self.pieces))
            if outside.any():
                raise ValueError(
                    f"{self.role} id {int(array[outside][0])} is outside the {self.role}'s vocabulary of "
                    f"{len(self.pieces)} ids"
                )
            arrays.append(array.astype(np.int64, copy=False))
        return lists, arrays


def text_blocks(student: Packed, teacher: Packed, invalid: np.ndarray) -> np.ndarray:
    """int64 [B, 3], the stretches of equal bytes of a packed batch. An end-of-turn counts as one byte.

    Invalid UTF-8 is taken out of a student's text that the teacher does not spell the same: `student.lengths` is
    shortened and the rows are marked in `invalid`.
    """
    blocks: list[list[int]] = []
    student_at = teacher_at = 0
    for r, (ours, theirs) in enumerate(zip(student.texts, teacher.texts, strict=True)):
        if ours != theirs:
            ours = _without_invalid(student, r, invalid)
        found = matching_blocks(ours, theirs)
        if student.ended[r] and teacher.ended[r]:
            found.append((len(ours), len(theirs), 1))
        for i, j, n in found:
            i, j = i + student_at, j + teacher_at
            if blocks and blocks[-1][0] + blocks[-1][2] == i and blocks[-1][1] + blocks[-1][2] == j:
                blocks[-1][2] += n
            else:
                blocks.append([i, j, n])
        student_at += len(ours) + student.ended[r]
        teacher_at += len(theirs) + teacher.ended[r]
    return np.array(blocks, dtype=np.int64).reshape(-1, 3)


def _without_invalid(student: Packed, r: int, invalid: np.ndarray) -> bytes:
    text = student.texts[r]
    spans = invalid_utf8(text)
    if not spans:
        return text
    bad = np.zeros(len(text), bool)
    for start, stop in spans:
        bad[start:stop] = True
    rows = slice(student.rows[r], student.stops[r])
    before = np.concatenate([[0], np.cumsum(bad)])
    stop = np.cumsum(student.lengths[rows])
    taken = before[stop] - before[stop - student.lengths[rows]]
    invalid[rows] = taken > 0
    student.lengths[rows] -= taken
    return np.frombuffer(text, np.uint8)[~bad].tobytes()
