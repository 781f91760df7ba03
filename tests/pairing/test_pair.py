"""TokenizerPair: the shared vocabulary, the teacher's ids, and units in the cases that go wrong elsewhere."""

import random
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from simct.pairing.pair import Alignment, Cut, TokenizerPair

from .conftest import CJK, LONGER, PROSE, TEXTS, plain_byte_level

PAIRS = [
    ("qwen", "gemma"),
    ("gemma", "qwen"),
    ("deepseek", "qwen"),
    ("qwen", "deepseek"),
    ("mistral", "qwen"),
    ("qwen", "mistral"),
    ("mistral", "gemma"),
    ("llama", "deepseek"),
]


@pytest.fixture(params=PAIRS, ids="<-".join)
def real_pair(request, make_pair):
    return make_pair(*(request.getfixturevalue(name) for name in request.param))


def responses(pair, texts=TEXTS):
    """The student's responses, end-of-turn included."""
    return [[*ids, pair.end_pair[0]] for ids in pair._student.encoder(texts)]


def units_of(alignment) -> list[tuple[int, int, int, int]]:
    columns = (alignment.student_start, alignment.student_length, alignment.teacher_start, alignment.teacher_length)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def spelled(pair, alignment) -> list[tuple[bytes, bytes]]:
    """Each unit's bytes on both sides; an end-of-turn counts as `\\0end`."""
    found = []
    for s, m, t, n in units_of(alignment):
        ours, theirs = alignment.student_tokens[s : s + m].tolist(), alignment.teacher_tokens[t : t + n].tolist()
        if ours[0] in pair.student_end_ids:
            assert m == n == 1 and theirs[0] in pair.teacher_end_ids
            found.append((b"\0end", b"\0end"))
        else:
            found.append((b"".join(pair.student_pieces(ours)), b"".join(pair.teacher_pieces(theirs))))
    return found


def byte_ids(text: bytes | str) -> list[int]:
    """Ids in a toy vocabulary, where id = byte."""
    return list(text.encode() if isinstance(text, str) else text)


# Real tokenizers


def test_shared_vocabulary(real_pair):
    shared = real_pair.shared
    ours, theirs = (real_pair._student.pieces, real_pair._teacher.pieces)
    pairs = list(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    assert pairs == sorted(pairs) and len({t for _, t in pairs}) == len(pairs)
    special = [(s, t) for s, t in pairs if ours[s] is None]
    assert special == [real_pair.end_pair]
    assert all(ours[s] == theirs[t] != b"" for s, t in pairs if (s, t) != real_pair.end_pair)
    spelled_by_both = {piece for piece in ours if piece} & {piece for piece in theirs if piece}
    assert len(pairs) == len(spelled_by_both) + 1


def test_of_several_ids_the_tokenizers_own_is_shared(qwen, gemma, make_pair):
    shared = make_pair(qwen, gemma).shared
    partner = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    newline, broken = qwen.convert_tokens_to_ids("Ċ"), qwen.convert_tokens_to_ids("ð")
    assert partner[newline] == gemma.convert_tokens_to_ids("\n") != gemma.convert_tokens_to_ids("<0x0A>")
    assert partner[broken] == gemma.convert_tokens_to_ids("<0xF0>")


def test_real_text_is_covered_whole(real_pair):
    student = responses(real_pair)
    teacher = real_pair.encode_teacher(student)
    alignment = real_pair.align_batch(student, teacher)
    assert alignment.student_covered == alignment.teacher_covered == 1.0 and alignment.dropped == {}
    for ours, theirs in spelled(real_pair, alignment):
        assert ours == theirs
    assert [ours for ours, _ in spelled(real_pair, alignment)].count(b"\0end") == len(TEXTS)
    bounds = units_of(alignment)
    assert all(a[0] + a[1] == b[0] and a[2] + a[3] == b[2] for a, b in zip(bounds, bounds[1:], strict=False))


def test_encode_teacher_adds_nothing(real_pair):
    student = responses(real_pair)
    for text, ids in zip(TEXTS, real_pair.encode_teacher(student), strict=True):
        assert ids[-1] == real_pair.end_pair[1]
        assert b"".join(real_pair.teacher_pieces(ids[:-1])) == text.encode()
    assert real_pair.encode_teacher([]) == []


def test_batch_is_the_concatenation_of_its_responses(real_pair):
    """Mixed cases in one batch: whole, cut in a character, empty, no end, special inside, behind the end."""
    whole = responses(real_pair)
    end = real_pair.end_pair[0]
    batch = [*whole, whole[3][:-3], [], [end], whole[2][:-1], [*whole[2][:9], end, *whole[2][9:20]]]
    batch.append([*whole[2][:5], *real_pair._student._tokenizer.all_special_ids[-1:], *whole[2][5:12]])
    teacher = real_pair.encode_teacher(batch)
    assert teacher == [real_pair.encode_teacher([ids])[0] for ids in batch]
    together = real_pair.align_batch(batch, teacher, disjoint=True)
    one_by_one = Alignment.concatenate(
        [real_pair.align(s, t, disjoint=True) for s, t in zip(batch, teacher, strict=True)]
    )
    assert isinstance(one_by_one, Alignment) and one_by_one.dropped == together.dropped
    for name in ("student_start", "student_length", "teacher_start", "teacher_length", "student_tokens", "left_out"):
        assert torch.equal(getattr(together, name), getattr(one_by_one, name)), name


def test_alignment_survives_the_base_class(qwen, gemma, make_pair):
    pair = make_pair(qwen, gemma)
    student = responses(pair, [CJK])[0][:-2]
    alignment = pair.align(student, pair.encode_teacher([student])[0])
    single = alignment.single().to("cpu")
    assert isinstance(single, Alignment) and len(single) < len(alignment) and single.dropped == alignment.dropped


def test_normalised_text_is_aligned_around_the_difference(deepseek, qwen, make_pair):
    """Qwen's NFC composes what DeepSeek wrote in two code points."""
    pair = make_pair(deepseek, qwen)
    text = "Before it, cafe\u0301 and after it.\n\nThe A\u030angstro\u0308m is short; the end."
    (student,) = responses(pair, [text])
    (teacher,) = pair.encode_teacher([student])
    assert b"".join(pair.teacher_pieces(teacher[:-1])) == unicodedata.normalize("NFC", text).encode()
    alignment = pair.align(student, teacher)
    found = b"".join(ours for ours, theirs in spelled(pair, alignment) if ours == theirs)
    for kept in (b"Before it,", b" and after it.\n\nThe", b" is short; the end.\0end"):
        assert kept in found
    lost = len(student) - int(alignment.student_length.sum())
    assert alignment.dropped == {"text_differs": lost} and 0 < lost < 12


def test_teacher_with_its_own_prefix_space(qwen, llama, make_pair):
    pair = make_pair(qwen, llama)
    (student,) = responses(pair, ["the other"])
    prefixed = [*llama.encode("the other", add_special_tokens=False), pair.end_pair[1]]
    assert pair.teacher_pieces(prefixed)[0] == b" the"
    assert pair.encode_teacher([student]) != [prefixed]
    alignment = pair.align(student, prefixed)
    assert alignment.dropped == {"text_differs": 1}
    assert b"".join(ours for ours, _ in spelled(pair, alignment)) == b" other\0end"


def test_one_tokenizer_with_itself(qwen, make_pair):
    pair = make_pair(qwen, qwen)
    assert torch.equal(pair.shared.student_ids, pair.shared.teacher_ids)
    student = responses(pair)
    assert pair.encode_teacher(student) == student
    alignment = pair.align_batch(student, student)
    assert len(alignment) == sum(map(len, student)) and not alignment.has_continuation(pair.shared).any()


def test_text_that_spells_a_special_token(real_pair):
    end = real_pair._teacher._tokenizer.eos_token
    student = responses(real_pair, [f"Write {end} and <|im_end|><end_of_turn></s> to stop."])
    (teacher,) = real_pair.encode_teacher(student)
    assert [i for i in teacher if i in real_pair.teacher_end_ids] == [real_pair.end_pair[1]]
    assert real_pair.align(student[0], teacher).student_covered == 1.0


def test_character_split_over_tokens(qwen, llama, make_pair):
    """Llama spells rare characters in bytes, Qwen in a few pieces or one: no unit ends where only one side has a boundary."""
    for pair in (make_pair(qwen, llama), make_pair(llama, qwen)):
        (student,) = responses(pair, ["a 👩‍👩‍👧‍👦 b ḹ 𒀀 c"])
        alignment = pair.align(student, pair.encode_teacher([student])[0])
        assert alignment.student_covered == alignment.teacher_covered == 1.0
        assert all(ours == theirs for ours, theirs in spelled(pair, alignment))
        assert any(None is _decoded(piece) for piece in pair.student_pieces(student) if piece)


def _decoded(piece):
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


# Toy vocabularies: ids are bytes


def test_response_cut_inside_a_character(toy_pair):
    student = byte_ids("né")[:-1]
    (teacher,) = toy_pair.encode_teacher([student])
    assert teacher == byte_ids("n")
    alignment = toy_pair.align(student, teacher)
    assert units_of(alignment) == [(0, 1, 0, 1)] and alignment.dropped == {"invalid_utf8": 1}


def test_broken_bytes_inside_a_response(toy_pair):
    end, teacher_end = toy_pair.end_pair
    student = [*byte_ids(b"ab\xc3\xffcd\xe3\x81"), end]
    (teacher,) = toy_pair.encode_teacher([student])
    assert teacher == [*byte_ids("abcd"), teacher_end]
    alignment = toy_pair.align(student, teacher)
    assert units_of(alignment) == [(0, 1, 0, 1), (1, 1, 1, 1), (4, 1, 2, 1), (5, 1, 3, 1), (8, 1, 4, 1)]
    assert alignment.dropped == {"invalid_utf8": 4}
    # A teacher that does spell the same bytes is taken at its word.
    assert toy_pair.align(student, [*byte_ids(b"ab\xc3\xffcd\xe3\x81"), teacher_end]).dropped == {}


def test_a_token_with_broken_bytes_and_text_takes_its_unit_along():
    student = plain_byte_level([b"b\xc3"])
    pair = TokenizerPair(student, plain_byte_level([b"ab"]))
    alignment = pair.align([97, 256, 99], byte_ids("abc"))
    assert units_of(alignment) == [(0, 1, 0, 1), (2, 1, 2, 1)] and alignment.dropped == {"invalid_utf8": 1}
    alignment = pair.align([97, 256, 99], [256, 99])  # the teacher's "ab" holds what is left of the broken token
    assert units_of(alignment) == [(2, 1, 1, 1)] and alignment.dropped == {"invalid_utf8": 2}


def test_empty_responses_and_missing_ends(toy_pair):
    end, teacher_end = toy_pair.end_pair
    assert toy_pair.encode_teacher([[], [end], byte_ids("ab")]) == [[], [teacher_end], byte_ids("ab")]
    assert len(toy_pair.align([], [])) == 0 and len(toy_pair.align_batch([], [])) == 0
    assert units_of(toy_pair.align([end], [teacher_end])) == [(0, 1, 0, 1)]
    # No end-of-turn because the budget ran out.
    assert units_of(toy_pair.align(byte_ids("ab"), byte_ids("ab"))) == [(0, 1, 0, 1), (1, 1, 1, 1)]
    cut = toy_pair.align([*byte_ids("ab"), end], byte_ids("ab"))
    assert units_of(cut) == [(0, 1, 0, 1), (1, 1, 1, 1)] and cut.dropped == {"no_teacher_end": 1}
    assert toy_pair.align(byte_ids("ab"), [*byte_ids("ab"), teacher_end]).dropped == {}
    assert toy_pair.align([*byte_ids("ab"), end], []).dropped == {"no_teacher_tokens": 3}
    assert toy_pair.align([], byte_ids("ab")).dropped == {}


def test_padding_that_is_the_end_of_turn(toy_pair):
    end, teacher_end = toy_pair.end_pair
    student = [*byte_ids("ab"), end, end, end]
    (teacher,) = toy_pair.encode_teacher([student])
    assert teacher == [*byte_ids("ab"), teacher_end]
    alignment = toy_pair.align_batch([student, byte_ids("c")], [[*teacher, teacher_end], byte_ids("c")])
    assert units_of(alignment) == [(0, 1, 0, 1), (1, 1, 1, 1), (2, 1, 2, 1), (5, 1, 4, 1)]
    assert alignment.dropped == {"after_end": 2}


def test_a_second_ending_means_the_teachers_first(toy_pair):
    second = toy_pair.student_end_ids[1]
    assert second != toy_pair.end_pair[0]
    student = [*byte_ids("a"), second]
    (teacher,) = toy_pair.encode_teacher([student])
    assert teacher == [97, toy_pair.end_pair[1]]
    alignment = toy_pair.align(student, teacher, disjoint=True)
    assert units_of(alignment) == [(0, 1, 0, 1), (1, 1, 1, 1)]
    # Not a shared pair: a continuation, which means what the shared end-of-turn means.
    assert alignment.has_continuation(toy_pair.shared).tolist() == [False, True]
    ((unit, k),) = alignment.left_out.tolist()
    assert unit == 1 and toy_pair.shared.student_ids[k] == toy_pair.end_pair[0]


def test_special_tokens_inside_a_response(toy_pair):
    tool = toy_pair._student._tokenizer.convert_tokens_to_ids("<tool>")
    image = toy_pair._teacher._tokenizer.convert_tokens_to_ids("<image>")
    student = [97, tool, 98, 99]
    assert toy_pair.encode_teacher([student]) == [byte_ids("abc")]
    alignment = toy_pair.align(student, byte_ids("abc"))
    assert units_of(alignment) == [(0, 1, 0, 1), (2, 1, 1, 1), (3, 1, 2, 1)]
    assert alignment.dropped == {"special_token": 1}
    # Inside a unit it takes the unit along, on either side.
    pair = TokenizerPair(plain_byte_level([b"bc"], special=["<tool>"]), plain_byte_level([b"ab"], special=["<image>"]))
    tool = pair._student._tokenizer.convert_tokens_to_ids("<tool>")
    alignment = pair.align([97, tool, 98, 99], [256, 99])
    assert units_of(alignment) == [(3, 1, 1, 1)] and alignment.dropped == {"special_token": 3}
    image = pair._teacher._tokenizer.convert_tokens_to_ids("<image>")
    alignment = pair.align([97, 256, 100], [97, 98, image, 99, 100])
    assert units_of(alignment) == [(0, 1, 0, 1), (2, 1, 4, 1)] and alignment.dropped == {"special_token": 1}


def test_anchored_alignment():
    """The public rule: what is cut differently joins the equal pair after it, the end-of-turn included."""
    student, teacher = plain_byte_level([b"bc", b"de"]), plain_byte_level([b"cd"])
    ids = [97, 98, 99, 100, 101, 256 + 2]
    (theirs,) = TokenizerPair(student, teacher).encode_teacher([ids])
    for alignment, expected in (
        ("bytes", [(0, 1, 0, 1), (1, 1, 1, 1), (2, 2, 2, 1), (4, 1, 3, 1), (5, 1, 4, 1)]),
        ("anchored", [(0, 1, 0, 1), (1, 1, 1, 1), (2, 3, 2, 2), (5, 1, 4, 1)]),
    ):
        pair = TokenizerPair(student, teacher, alignment=alignment)
        assert units_of(pair.align(ids, [97, 98, 256, 101, theirs[-1]])) == expected
    assert units_of(pair.align([97, 256, 258], [97, 98, 99, 257])) == [(0, 1, 0, 1), (1, 2, 1, 3)]
    tail = pair.align([97, 256], [97, 98, 99])
    assert units_of(tail) == [(0, 1, 0, 1)] and tail.dropped == {"anchored_tail": 1}


def test_teacher_that_replaces_characters():
    pair = TokenizerPair(plain_byte_level(), plain_byte_level(normalizer=normalizers.NFKC()))
    student = byte_ids("one ﬁ two ½ three")
    (teacher,) = pair.encode_teacher([student])
    assert bytes(teacher).decode() == "one fi two 1⁄2 three"
    alignment = pair.align(student, teacher)
    assert alignment.dropped == {"text_differs": len("ﬁ ½".encode())}  # " 1" is a word of its own


def test_bad_input(toy_pair):
    with pytest.raises(ValueError, match=r"student id 999 is outside the student's vocabulary of \d+ ids"):
        toy_pair.align([1, 999], [1])
    with pytest.raises(ValueError, match="teacher id -1 is outside"):
        toy_pair.align([1], [-1])
    with pytest.raises(ValueError, match="flat sequence of integers, got float64"):
        toy_pair.align([1.5], [1])
    with pytest.raises(ValueError, match="flat sequence of integers"):
        toy_pair.encode_teacher([[[1, 2]]])
    with pytest.raises(ValueError, match="2 student responses, but 1"):
        toy_pair.align_batch([[1], [2]], [[1]])
    with pytest.raises(ValueError, match='alignment must be "bytes" or "anchored"'):
        TokenizerPair(plain_byte_level(), plain_byte_level(), alignment="greedy")


def test_arrays_and_tensors_are_ids(toy_pair):
    expected = units_of(toy_pair.align([97, 98], [97, 98]))
    for kind in (np.array, torch.tensor, tuple, lambda ids: torch.tensor(ids, dtype=torch.int32)):
        assert units_of(toy_pair.align(kind([97, 98]), kind([97, 98]))) == expected
    assert toy_pair.encode_teacher(torch.tensor([[97, 98], [98, 99]])) == [[97, 98], [98, 99]]


def test_cut_shows_both_sides():
    pair = TokenizerPair(plain_byte_level(), plain_byte_level(normalizer=normalizers.NFKC()))
    assert pair.cut("aﬁb") == [
        Cut((b"a",), (b"a",), aligned=True),
        Cut((b"\xef", b"\xac", b"\x81"), (b"f", b"i"), aligned=False),
        Cut((b"b",), (b"b",), aligned=True),
    ]


# Random responses


def random_cut(pieces: list[bytes | None], text: bytes, choose: random.Random) -> list[int]:
    """Ids that spell `text`, cut at random."""
    by_bytes = {piece: i for i, piece in enumerate(pieces) if piece}
    ids, at = [], 0
    while at < len(text):
        fitting = [i for piece, i in by_bytes.items() if text.startswith(piece, at)]
        ids.append(choose.choice(fitting))
        at += len(pieces[ids[-1]])
    return ids


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "é", " ", "ab", "あ"]), max_size=30), st.randoms(), st.booleans())
def test_random_cuts_of_a_text(toy_pair, letters, choose, disjoint):
    text = "".join(letters).encode()
    student = [*random_cut(toy_pair._student.pieces, text, choose), toy_pair.end_pair[0]]
    teacher = [*random_cut(toy_pair._teacher.pieces, text, choose), toy_pair.end_pair[1]]
    alignment = toy_pair.align(student, teacher, disjoint=disjoint)
    assert alignment.student_covered == alignment.teacher_covered == 1.0

    def boundaries(pieces):
        return set(np.cumsum([len(piece or b"$") for piece in pieces]).tolist())

    common = boundaries(toy_pair.student_pieces(student)) & boundaries(toy_pair.teacher_pieces(teacher))
    found = spelled(toy_pair, alignment)
    assert all(ours == theirs for ours, theirs in found) and len(found) == len(common)
    assert b"".join(ours for ours, _ in found) == text + b"\0end"
    if disjoint:
        check_left_out(toy_pair, alignment)


def check_left_out(pair, alignment):
    shared = [pair._student.pieces[i] for i in pair.shared.student_ids.tolist()]
    expected = []
    texts = [ours for ours, _ in spelled(pair, alignment)]
    for unit in alignment.has_continuation(pair.shared).nonzero().flatten().tolist():
        text = texts[unit]
        expected += [[unit, k] for k, s in enumerate(shared) if s and (text.startswith(s) or s.startswith(text))]
    assert alignment.left_out.tolist() == expected


def test_left_out_on_real_text(qwen, gemma, make_pair):
    pair = make_pair(qwen, gemma)
    student = responses(pair, [PROSE])
    alignment = pair.align_batch(student, pair.encode_teacher(student), disjoint=True)
    assert alignment.has_continuation(pair.shared).any() and len(alignment.left_out)
    check_left_out(pair, alignment)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255 + 35 + 3), max_size=20), min_size=1, max_size=4), st.randoms())
def test_random_ids_never_crash_and_every_token_is_accounted_for(toy_pair, batch, choose):
    """Broken bytes, special tokens, several endings, in any order; a teacher that says what we encode, or something else."""
    for teacher in (
        toy_pair.encode_teacher(batch),
        [choose.choices(range(256 + len(LONGER) - 20), k=9) for _ in batch],
    ):
        alignment = toy_pair.align_batch(batch, teacher)
        rows = sum(map(len, batch))
        assert int(alignment.student_length.sum()) + sum(alignment.dropped.values()) == rows
        assert all(ours == theirs for ours, theirs in spelled(toy_pair, alignment))
        special = [i for i, piece in enumerate(toy_pair._student.pieces) if piece is None]
        inside = set(special) - set(toy_pair.student_end_ids)
        covered = [t for s, m, *_ in units_of(alignment) for t in alignment.student_tokens[s : s + m].tolist()]
        assert not inside & set(covered)


def test_paths_and_texts_are_no_tokenizers_and_no_ids(demo_tokenizers):
    with pytest.raises(ValueError, match="student_tokenizer is 'a/folder': expected a tokenizer"):
        TokenizerPair("a/folder", demo_tokenizers[1])
    pair = TokenizerPair(*demo_tokenizers)
    for batch in ["text"], "text":
        with pytest.raises(
            ValueError, match="must be token ids, got the text 'text': expected what pair.encode_student"
        ):
            pair.encode_teacher(batch)
