"""The tables of two vocabularies, read back against the bytes that they were made of."""

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simct_kernels import PrefixTables
from simct_kernels.reference.prefix import _groups, _home

from .prefix_cases import ENDS, vocabulary

PIECE = st.one_of(st.none(), st.binary(min_size=1, max_size=4).map(lambda b: bytes(x % 3 + 253 for x in b)))
PIECES = st.lists(PIECE, min_size=1, max_size=25)


def read(tables: PrefixTables, a: int) -> dict[tuple[int, ...], set[int]]:
    """The completions of a student token: the groups' teacher tokens, and the student tokens that complete each."""
    found = {}
    for group in range(int(tables.group_begin[a]), int(tables.group_stop[a])):
        members = tables.members[tables.member_first[group] : tables.member_first[group + 1]].tolist()
        completing = tables.student_order[tables.completion_begin[group] : tables.completion_stop[group]].tolist()
        found[tuple(sorted(members))] = set(completing)
    return found


def check(student: list, teacher: list) -> None:
    tables = PrefixTables.build(student, teacher)
    none = len(student)
    for token, piece in enumerate(teacher):
        for at in range(len(piece or b"")):
            place = int(tables.teacher_first[token]) + at
            home = _home(piece[at:], student)
            assert int(tables.suffix_home[place]) == (none if home is None else home)
            if at:
                span = slice(int(tables.continued_begin[place]), int(tables.continued_stop[place]))
                longer = {i for i, p in enumerate(teacher) if p and p.startswith(piece[:at]) and len(p) > at}
                assert set(tables.teacher_order[span].tolist()) == longer
        home = _home(piece, student)
        assert int(tables.home[token]) == (none if home is None else home)
    assert tables.routed.nonzero().flatten().tolist() == sorted({int(h) for h in tables.home if h != none})
    for a, piece in enumerate(student):
        expected = {}
        for shortest, members in _groups(piece, student, teacher, {}).items() if piece else ():
            completing = {u for u, p in enumerate(student) if p and p.startswith(shortest[len(piece) :])}
            if completing:
                expected[tuple(sorted(members))] = completing
        assert read(tables, a) == expected


@settings(max_examples=150, deadline=None)
@given(PIECES, PIECES)
def test_any_two_vocabularies(student, teacher):
    """Of the highest bytes, behind which no string comes."""
    check(student, teacher)


@pytest.mark.parametrize("seed", range(4))
def test_nested_vocabularies(seed):
    rng = random.Random(seed)
    check(vocabulary(rng, 60, 3, ENDS[0]), vocabulary(rng, 90, 5, ENDS[1]))


def test_digits_one_by_one_against_groups_of_three():
    digits = [str(d).encode() for d in range(10)]
    teacher = [str(n).zfill(k).encode() for k in (1, 2, 3) for n in range(10**k)]
    tables = PrefixTables.build(digits, teacher)
    assert tables.home.tolist() == [int(piece[:1]) for piece in teacher]
    # After 7 come 70, ..., 79, each with the ten groups of three that begin so; its last digit completes it.
    found = read(tables, 7)
    assert len(found) == 10
    for members, completing in found.items():
        texts = sorted((teacher[i] for i in members), key=len)
        assert len(texts) == 11 and len(texts[0]) == 2 and completing == {int(texts[0][1:])}
    # Without groups of two, no one digit completes a group of three.
    only_threes = PrefixTables.build(digits, [piece for piece in teacher if len(piece) != 2])
    assert not (only_threes.group_stop > only_threes.group_begin).any()


def test_double_spellings_and_routes():
    student, teacher = [b"a", b"a", b"b", None, None], [b"ab", b"b", None, None, b"b"]
    tables = PrefixTables.build(student, teacher, special_routes={2: 4, 4: 3}, canonical={b"a": 1})
    assert tables.home.tolist() == [1, 2, 4, 5, 3]  # a route comes before the bytes
    assert tables.routed.tolist() == [False, True, True, True, True]
    assert read(tables, 0) == read(tables, 1) == {(0,): {2}}  # either spelling of a may have been sampled
    assert PrefixTables.build(student, teacher).home[0] == 0
    routed = PrefixTables.build(student, teacher, special_routes={0: 3})
    assert read(routed, 0) == {}  # a student token stands for ab


@pytest.mark.parametrize("long", [b"a" * 6000, random.Random(0).randbytes(6000)], ids=["one letter", "random"])
def test_a_long_token_does_not_cost_its_cube(long):
    student, teacher = [b"a", long, b"b", long[3:]], [long, long[:-1], long[1:] + b"b", b"a"]
    begun = time.process_time()
    tables = PrefixTables.build(student, teacher)
    assert time.process_time() - begun < 5  # some hundredths, where every prefix of every suffix takes minutes
    for token, piece in enumerate(teacher):
        for at in [n for n in (0, 1, 3, 5990) if n < len(piece)]:
            home = _home(piece[at:], student)
            assert tables.suffix_home[int(tables.teacher_first[token]) + at] == (4 if home is None else home)
    place = int(tables.teacher_first[1]) + 5
    longer = sum(piece.startswith(long[:5]) and len(piece) > 5 for piece in teacher)
    assert tables.continued_stop[place] - tables.continued_begin[place] == longer


def test_to():
    tables = PrefixTables.build([b"a", None], [b"ab"])
    moved = tables.to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
    assert moved.home.dtype == torch.int64 and (moved.student_size, moved.teacher_size) == (2, 1)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (([], [b"a"]), {}, "student_bytes must be a list with the bytes of each token, got an empty one"),
        (([b"a"], b"ab"), {}, "teacher_bytes must be a list with the bytes of each token, got bytes"),
        (([b"a"], ["a"]), {}, r"teacher_bytes\[0\] must be bytes or None, got 'a'"),
        (([b"a"], [b"a"]), {"special_routes": {1: 0}}, "special_routes holds teacher id 1, outside the 1 ids"),
        (([b"a"], [b"a"]), {"special_routes": {0: -1}}, "special_routes holds student id -1"),
        (([b"a"], [b"a"]), {"special_routes": {0: True}}, "special_routes holds student id True"),
        (([b"a"], [b"a"]), {"special_routes": [0]}, "special_routes must be a mapping or None, got list"),
        (([b"a"], [b"a"]), {"canonical": [b"a"]}, "canonical must be a mapping or None, got list"),
        (([b"a"], [b"a"]), {"canonical": {b"b": 0}}, "canonical maps b'b' to student id 0, which spells b'a'"),
    ],
    ids=lambda value: "",
)
def test_bad_input(given, options, message):
    with pytest.raises(ValueError, match=message):
        PrefixTables.build(*given, **options)
