"""The partition of byte boundaries against a brute force that reads the definition aloud."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simct.pairing.alignment import anchored, invalid_utf8, matching_blocks, partition


def segmentation(lengths, zeros):
    """Random lengths that sum up to the same bytes, with rows that spell nothing put between."""
    lengths = list(lengths)
    for at in sorted(zeros, reverse=True):
        lengths.insert(min(at, len(lengths)), 0)
    return np.array(lengths, dtype=np.int64)


@st.composite
def two_segmentations(draw):
    size = draw(st.integers(0, 40))
    sides = []
    for _ in range(2):
        inner = sorted(draw(st.sets(st.integers(1, size - 1)))) if size > 1 else []
        bounds = [0, *inner, size] if size else [0]
        zeros = draw(st.lists(st.integers(0, 20), max_size=3))
        sides.append(segmentation(np.diff(bounds), zeros))
    return size, *sides


def brute_force(size, student, teacher, equal):
    """Every common boundary, every stretch between two neighbours: a unit where all its bytes are equal on both sides."""

    def boundaries(lengths):
        return {0, *np.cumsum(lengths).tolist()}

    def rows(lengths, a, b):
        stop = np.cumsum(lengths)
        inside = [k for k in range(len(lengths)) if lengths[k] and a < stop[k] <= b]
        return inside[0], inside[-1] - inside[0] + 1

    common = sorted(boundaries(student) & boundaries(teacher))
    units = []
    for a, b in zip(common, common[1:], strict=False):
        if all(equal[a:b]):
            units.append((*rows(student, a, b), *rows(teacher, a, b)))
    return units


def as_tuples(units):
    return list(zip(*(column.tolist() for column in units), strict=True))


@settings(deadline=None)
@given(two_segmentations())
def test_partition_is_the_brute_force_one(case):
    size, student, teacher = case
    blocks = np.array([[0, 0, size]] if size else [], dtype=np.int64).reshape(-1, 3)
    assert as_tuples(partition(student, teacher, blocks)) == brute_force(size, student, teacher, [True] * size)


@settings(deadline=None)
@given(two_segmentations(), st.data())
def test_partition_around_differences(case, data):
    """Bytes that differ (replaced one for one, so that offsets stay comparable) belong to no unit."""
    size, student, teacher = case
    equal = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    blocks, k = [], 0
    while k < size:
        stop = k
        while stop < size and equal[stop] == equal[k]:
            stop += 1
        if equal[k]:
            blocks.append([k, k, stop - k])
        k = stop
    found = partition(student, teacher, np.array(blocks, dtype=np.int64).reshape(-1, 3))
    # Next to a difference a boundary is common too: the texts before it, and from it on, are aligned on their own.
    assert as_tuples(found) == brute_force(size, student, teacher, equal)


@settings(deadline=None)
@given(two_segmentations())
def test_partition_invariants(case):
    size, student, teacher = case
    blocks = np.array([[0, 0, size]] if size else [], dtype=np.int64).reshape(-1, 3)
    s, m, t, n = partition(student, teacher, blocks)
    for a, k, lengths in ((s, m, student), (t, n, teacher)):
        assert (k >= 1).all() and (a[1:] >= (a + k)[:-1]).all()
        outside = np.setdiff1d(np.arange(len(lengths)), _rows(a, k))
        assert lengths[outside].sum() == 0, "every byte is in a unit"
    for i in range(len(s)):
        ours, theirs = np.cumsum(student[s[i] : s[i] + m[i]]), np.cumsum(teacher[t[i] : t[i] + n[i]])
        assert ours[-1] == theirs[-1]
        assert set(ours[ours > 0]) & set(theirs[theirs > 0]) == {ours[-1]}, "a finer common boundary exists"


def _rows(start, length):
    return np.concatenate([np.arange(a, a + k) for a, k in zip(start, length, strict=True)] or [np.zeros(0, int)])


@settings(deadline=None)
@given(two_segmentations())
def test_anchored_ends_units_at_single_ones(case):
    size, student, teacher = (case[0], *(lengths[lengths > 0] for lengths in case[1:]))
    finest = partition(student, teacher, np.array([[0, 0, size]] if size else [], dtype=np.int64).reshape(-1, 3))
    expected, tail, begun = [], [], None
    for k, (s, m, t, n) in enumerate(as_tuples(finest)):
        begun = begun or (s, t)
        tail.append(k)
        if m == n == 1:
            expected.append((begun[0], s + 1 - begun[0], begun[1], t + 1 - begun[1]))
            begun, tail = None, []
    merged, dropped = anchored(finest, np.zeros(len(finest[0]), dtype=np.int64))
    assert as_tuples(merged) == expected
    assert np.flatnonzero(dropped).tolist() == tail


def test_anchored_does_not_merge_over_a_gap_or_a_response():
    def units(*rows):
        return tuple(np.array(column) for column in zip(*rows, strict=True))

    rows = units((0, 2, 0, 1), (2, 1, 1, 1), (4, 2, 2, 3), (6, 1, 5, 1))
    merged, dropped = anchored(rows, np.array([0, 0, 0, 1]))
    assert as_tuples(merged) == [(0, 3, 0, 2), (6, 1, 5, 1)]
    assert dropped.tolist() == [False, False, True, False]
    merged, dropped = anchored(units((0, 2, 0, 1), (3, 1, 1, 1)), np.array([0, 0]))
    assert as_tuples(merged) == [(3, 1, 1, 1)] and dropped.tolist() == [True, False]


@settings(deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_matching_blocks_are_equal_and_ordered(a, b):
    at = (0, 0)
    for i, j, n in matching_blocks(a, b):
        assert n > 0 and i >= at[0] and j >= at[1] and a[i : i + n] == b[j : j + n]
        at = (i + n, j + n)
    if a == b:
        assert sum(n for *_, n in matching_blocks(a, b)) == len(a)


def matched(a: str, b: str) -> str:
    a, b = a.encode(), b.encode()
    return b"|".join(a[i : i + n] for i, _, n in matching_blocks(a, b)).decode()


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ("caf\u00e9 is open", "cafe\u0301 is open", "caf| is open"),
        ("x あ y", "x い y", "x | y"),  # the characters share their first two bytes
        ("one two three four", " one two three four", "one two three four"),
        ("aaa bbb ccc ddd eee", "aaa XXX ccc YYY eee", "aaa | ccc| eee"),
        ("same", "", ""),
    ],
)
def test_matching_blocks_of_small_differences(ours, theirs, expected):
    found = matched(ours, theirs)
    assert found.replace("|", "") == expected.replace("|", "")


def test_matching_blocks_keep_in_step_through_dense_normalisation():
    text = "Việt Nam là một quốc gia nằm ở phía đông bán đảo Đông Dương, giáp với Lào và Campuchia. " * 60
    ours, theirs = unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text)
    same = [word for word in text.split() if unicodedata.normalize("NFD", word) == word]
    found = "".join(matched(ours, theirs).split("|")).split()
    assert len(found) >= len(same)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(str.encode)), max_size=8).map(b"".join))
def test_invalid_utf8_is_what_decoding_ignores(text):
    keep = np.ones(len(text), bool)
    for start, stop in invalid_utf8(text):
        keep[start:stop] = False
    assert bytes(np.frombuffer(text, np.uint8)[keep]) == text.decode("utf-8", "ignore").encode()
