"""The finest partition of two token sequences that spell the same bytes. Knows lengths and bytes, no tokenizer.

A *block* `(student offset, teacher offset, length)` says that a stretch of bytes is the same on both sides. Where the
two texts are equal there is one block; where they differ, units are cut inside the blocks and nothing is said about
what lies between.
"""

import re
import unicodedata
from collections.abc import Iterator

import numpy as np

# Words of alphabetic scripts with their leading space and combining marks; other scripts are compared by character.
_WORDS = re.compile(r" ?[A-Za-z0-9_\u00c0-\u1fff]+|\s+|.", re.DOTALL)
_INVALID = re.compile("[\udc80-\udcff]+")
_WINDOW = 64  # words in which the two texts must agree again after a difference

# int64 [G] each, in rows: student start, student length, teacher start, teacher length.
Units = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def partition(
    student_lengths: np.ndarray,  # int64 [N_s], bytes that each row's token spells inside the packed text; 0 for none
    teacher_lengths: np.ndarray,  # int64 [N_t]
    blocks: np.ndarray,  # int64 [B, 3], ascending, not overlapping, lengths >= 1
) -> Units:
    """Cut both sequences at every byte boundary that they have in common.

    A unit starts and
    ends with a token that spells bytes; rows of length 0 between two units belong to neither, inside a unit they are
    counted in its length. Bytes that no block holds, and tokens that reach into them, are in no unit.
    """
    # The blocks side by side on one axis, a gap of one apart, so that the end of one is not the start of the next.
    axis = np.concatenate([[0], np.cumsum(blocks[:, 2] + 1)])
    student_rows, student_from, student_to = _on_axis(student_lengths, blocks[:, 0], blocks[:, 2], axis)
    teacher_rows, teacher_from, teacher_to = _on_axis(teacher_lengths, blocks[:, 1], blocks[:, 2], axis)
    student_starts, teacher_starts = _common(student_from, teacher_from, axis[-1])
    student_ends, teacher_ends = _common(student_to, teacher_to, axis[-1])

    # Pair each start with the first end after it. A block may open with a stray end or close with a stray start, if the
    # token on the other side of that boundary reaches out of the block: then the two do not lie in one block.
    start, end = student_from[student_starts], student_to[student_ends]  # ascending; the teacher's are the same values
    first_end = np.searchsorted(end, start, side="right")
    block_of_end = np.append(np.searchsorted(axis, end - 1, side="right"), -1)
    closed = block_of_end[first_end] == np.searchsorted(axis, start, side="right")
    student_starts, teacher_starts, first_end = student_starts[closed], teacher_starts[closed], first_end[closed]
    student_ends, teacher_ends = student_ends[first_end], teacher_ends[first_end]

    student_start, teacher_start = student_rows[student_starts], teacher_rows[teacher_starts]
    student_length = student_rows[student_ends] - student_start + 1
    teacher_length = teacher_rows[teacher_ends] - teacher_start + 1
    return student_start, student_length, teacher_start, teacher_length


def anchored(
    units: Units,
    response: np.ndarray,  # int64 [G], the response that each unit belongs to
) -> tuple[Units, np.ndarray]:
    """Merge units by the rule of SimCT's public code (arXiv 2605.07711): a unit ends only with a pair of equal tokens.

    A stretch that the two tokenizers cut differently is merged with the single unit after it. Returns the merged units
    and bool [G], which of the given units have no such end (the rest of a response, or up to a gap) and are dropped.
    """
    student_start, student_length, teacher_start, teacher_length = units
    count = len(student_start)
    if count == 0:
        return units, np.zeros(0, bool)
    student_stop, teacher_stop = student_start + student_length, teacher_start + teacher_length
    single = (student_length == 1) & (teacher_length == 1)
    joined = (student_stop[:-1] == student_start[1:]) & (teacher_stop[:-1] == teacher_start[1:])
    joined &= response[:-1] == response[1:]
    last = np.flatnonzero(single | ~np.append(joined, False))
    first = np.concatenate([[0], last[:-1] + 1])
    kept = single[last]
    dropped = np.repeat(~kept, last - first + 1)
    first, last = first[kept], last[kept]
    merged = (
        student_start[first],
        student_stop[last] - student_start[first],
        teacher_start[first],
        teacher_stop[last] - teacher_start[first],
    )
    return merged, dropped


def matching_blocks(student: bytes, teacher: bytes) -> list[tuple[int, int, int]]:
    """Stretches of equal bytes of two texts, in order: a common start, equal words between, a common end.

    Blocks begin and end between characters; neighbouring ones may touch. After a difference the texts must agree again
    within some dozens of words, or all up to their common end counts as different.
    """
    if student == teacher:
        return [(0, 0, len(student))] if student else []
    shortest = min(len(student), len(teacher))
    a, b = np.frombuffer(student, np.uint8), np.frombuffer(teacher, np.uint8)
    differs = np.flatnonzero(a[:shortest] != b[:shortest])
    head = int(differs[0]) if len(differs) else shortest
    while head and (_continues(student, head) or _continues(teacher, head)):
        head -= 1
    rest = shortest - head
    differs = np.flatnonzero(a[len(a) - rest :] != b[len(b) - rest :])
    tail = rest - 1 - int(differs[-1]) if len(differs) else rest
    while tail and (_continues(student, len(student) - tail) or _continues(teacher, len(teacher) - tail)):
        tail -= 1

    student_words, student_at = _words(student[head : len(student) - tail], head)
    teacher_words, teacher_at = _words(teacher[head : len(teacher) - tail], head)
    blocks = [(0, 0, head)]
    for i, j in _equal_words(student_words, teacher_words):
        blocks.append((student_at[i], teacher_at[j], student_at[i + 1] - student_at[i]))
    blocks.append((len(student) - tail, len(teacher) - tail, tail))
    return [block for block in blocks if block[2]]


def invalid_utf8(text: bytes) -> list[tuple[int, int]]:
    """The stretches `[start, stop)` that are not valid UTF-8: what `decode(errors="ignore")` leaves out."""
    try:
        text.decode()
        return []
    except UnicodeDecodeError:
        pass
    # One pass, in which every byte of no character becomes a surrogate of its own.
    spans, at, decoded, done = [], 0, text.decode("utf-8", "surrogateescape"), 0
    for found in _INVALID.finditer(decoded):
        at += len(decoded[done : found.start()].encode())
        done = found.end()
        spans.append((at, at + done - found.start()))
        at = spans[-1][1]
    return spans


def _continues(text: bytes, at: int) -> bool:
    """Whether the byte at `at` continues a character."""
    return at < len(text) and text[at] & 0xC0 == 0x80


def _equal_words(a: list[str], b: list[str]) -> Iterator[tuple[int, int]]:
    """Pairs of indices of equal words, in order; linear in the words.

    Words that differ only by Unicode normalisation keep the two texts in step without being equal.
    """
    like_a, like_b = ([unicodedata.normalize("NFKC", word) for word in words] for words in (a, b))
    step: tuple[int, int] | None = (0, 0)
    i = j = 0
    while step is not None:
        i, j = i + step[0], j + step[1]
        while i < len(a) and j < len(b) and like_a[i] == like_b[j]:
            if a[i] == b[j]:
                yield i, j
            i, j = i + 1, j + 1
        step = _resume(like_a, like_b, i, j)


def _resume(a: list[str], b: list[str], i: int, j: int) -> tuple[int, int] | None:
    """The fewest words to skip on both sides until they agree again: one replaced word, or three equal words in a row."""
    if a[i + 1 : i + 2] == b[j + 1 : j + 2] != []:
        return 1, 1
    for skipped in range(1, _WINDOW):
        for m in sorted(range(skipped + 1), key=lambda m: abs(2 * m - skipped)):
            run = a[i + m : i + m + 3]
            if run and run == b[j + skipped - m : j + skipped - m + 3]:
                return m, skipped - m
    return None


def _words(text: bytes, offset: int) -> tuple[list[str], list[int]]:
    words = _WORDS.findall(text.decode("utf-8", "surrogateescape"))
    at = [offset]
    for word in words:
        at.append(at[-1] + len(word.encode("utf-8", "surrogateescape")))
    return words, at


def _on_axis(lengths, offsets, sizes, axis):
    """Rows that spell bytes, and where each starts and ends on the axis; -1 where that lies outside the blocks."""
    rows = np.flatnonzero(lengths)
    stop = np.cumsum(lengths[rows])
    start = stop - lengths[rows]
    if len(offsets) == 1 and offsets[0] == 0 and len(stop) and stop[-1] == sizes[0]:
        return rows, start, stop
    return rows, _locate(start, 0, offsets, sizes, axis), _locate(stop - 1, 1, offsets, sizes, axis)


def _locate(byte, shift, offsets, sizes, axis):
    if not len(offsets):
        return np.full(len(byte), -1)
    block = np.searchsorted(offsets, byte, side="right") - 1
    inside = (block >= 0) & (byte < offsets[block] + sizes[block])
    return np.where(inside, axis[block] + byte - offsets[block] + shift, -1)


def _common(student, teacher, size):
    """Indices of the points (ascending on the axis, -1 for none) that both sides have."""
    marked = np.zeros(size + 1, bool)
    marked[teacher] = True  # the points outside, -1, mark the last place, which no point uses
    marked[-1] = False
    in_student = np.flatnonzero(marked[student])
    marked[:] = False
    marked[student] = True
    marked[-1] = False
    return in_student, np.flatnonzero(marked[teacher])
