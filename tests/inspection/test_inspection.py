"""What an inspection says of a pair and of responses, and the page that it becomes."""

import base64
import hashlib
import inspect
import io
import re
from collections import Counter

import pytest
import torch
from inspect_html import Page
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.quality.settings import Spelling
from bench.texts import spell
from simct.inspection.advice import advise
from simct.inspection.page import LOSS_STEPS, bucket, bucket_names, html_page
from simct.inspection.report import REASONS, Answer, Scored, inspect_answers
from simct.inspection.scripts import SCRIPTS, script_of
from simct.inspection.terminal import print_inspection
from simct.pairing.pair import TokenizerPair

CODE = inspect.getsource(inspect.getsource) + "\tx = 12345 * 67\r\n"
MIXED = "naïve café 深度学习 カタカナ 한국어 😀👩‍👩‍👧 Ünïcödé שלום\n\n  \\frac{12345}{678} <b>&amp;</b>"


def byte_level(longer=(), special=("<eos>",), eos="<eos>", normalizer=None):
    """The 256 bytes, longer tokens that only a model says, and special ones."""
    vocabulary = {spell(token): i for i, token in enumerate([*(bytes([b]) for b in range(256)), *longer])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


PAIRS = {}


def looked_at(sides, *given, note="", **options):
    """Pair, answers, inspection and parsed page of texts (strings) or responses (student ids)."""
    key = tuple(map(id, sides))
    _, pair = PAIRS[key] = PAIRS.get(key) or (
        sides,
        TokenizerPair(*sides),
    )  # with its sides, whose ids would be others' else
    student = [pair.encode_student([one])[0] if isinstance(one, str) else one for one in given]
    rows = zip(student, pair.encode_teacher(student), strict=True)
    answers = [Answer(*row, f"text {i}") for i, row in enumerate(rows)]
    inspection = inspect_answers(pair, *sides, answers)
    html = html_page(inspection, advise(inspection, pair, *sides, answers), note=note, **options)
    return pair, answers, inspection, Page(html)


@pytest.mark.parametrize(
    "names",
    [
        ("demo", "demo"),
        *(pytest.param(names, marks=pytest.mark.slow) for names in (("qwen", "deepseek"), ("deepseek", "qwen"))),
    ],
)
def test_every_token_and_byte_is_on_the_page_once(request, names):
    if names[0] == "demo":
        sides = request.getfixturevalue("demo_tokenizers")
    else:
        sides = [request.getfixturevalue(name) for name in names]
    pair, answers, inspection, page = looked_at(sides, CODE, MIXED)
    assert len(page.texts) == 2
    for i, text in enumerate((CODE, MIXED)):
        ids = (answers[i].student_ids, answers[i].teacher_ids)
        for row in range(2):
            line = page.line(i, row)
            assert [token for token, _, _ in line] == ids[row]
            assert b"".join(piece for _, piece, _ in line) == text.encode()
        units = pair.align(*ids)
        lengths = [(len(unit.rows[0]), len(unit.rows[1])) for unit in page.texts[i] if unit.kind != "unsupervised"]
        assert lengths == list(zip(units.student_length.tolist(), units.teacher_length.tolist(), strict=True))
        assert {unit.kind for unit in page.texts[i]} == {"single", "longer"}
        for unit in page.texts[i]:
            assert unit.kind == ("single" if len(unit.rows[0]) == len(unit.rows[1]) == 1 else "longer")
            for token, piece, _ in unit.rows[0] + unit.rows[1]:
                spelled = piece.hex(" ") if piece else "special"
                assert re.search(rf" {token}  .*  {spelled}$", unit.title, re.MULTILINE)
    share = inspection.coverage.rules["simct"].longer
    assert f"{share:.1%}" in page.words
    # Both tokenizers' pieces of a character are seen as bytes, blanks by stand-ins.
    shown = [shown for _, _, shown in page.line(1, 0)]
    assert any("\\x" in piece for piece in shown) and not any(re.search(r"[ \n\t\r]", piece) for piece in shown)


def test_nothing_from_a_text_or_a_tokenizer_is_markup():
    bad = "</script><script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "<eos>&lt;", "'`--x`"
    student = byte_level([piece.encode() for piece in bad], ["<eos>", bad[1]])
    teacher = byte_level([bad[0].encode()], [bad[1], bad[2]], eos=bad[2])
    student.name_or_path, teacher.name_or_path = f"a/{bad[1]}", "<svg onload=alert(3)>"
    pair = TokenizerPair(student, teacher)
    ids = [256, 257, 258, 259, student.convert_tokens_to_ids(bad[1]), *pair.encode_student(["".join(bad)])[0]]
    answer = Answer(ids, pair.encode_teacher([ids])[0], "<script>alert(4)</script>", prompt="</pre><script>alert(5)")
    inspection = inspect_answers(pair, student, teacher, [answer])
    html = html_page(inspection, advise(inspection, pair, student, teacher, [answer]), note="<script>alert(6)</script>")
    page = Page(html)
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "svg", "link", "iframe", "b>"})
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.elements)
    assert b"".join(piece for _, piece, _ in page.line(0, 0)) == ("".join(bad) * 2).encode()
    for text in (bad[0], bad[1], answer.title, answer.prompt, "<svg onload=alert(3)>"):
        assert text in page.words
    # Should a tag slip through after all: the page's policy runs its own script alone.
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_a_name_of_a_token_forges_no_line():
    name = "<a\nloss 0 nats\x1b[31m\u202e>"
    student, teacher = byte_level([], ["<eos>", name]), byte_level([], ["<eos>", name])
    ids = [97, student.convert_tokens_to_ids(name), 98]
    pair, answers, inspection, page = looked_at((student, teacher), ids)
    (unit,) = (unit for unit in page.texts[0] if unit.kind == "unsupervised")
    assert "\nloss" not in unit.title and "\x1b" not in unit.title and "\u202e" not in unit.title
    assert len(unit.title.splitlines()) == 3  # what it is, its one token, why
    console = Console(width=200, file=io.StringIO())
    print_inspection(console, inspection, advise(inspection, pair, student, teacher, answers))
    output = console.file.getvalue()
    assert "<a\\nloss 0 nats\\x1b[31m\\u202e>" in output and not {"\x1b", "\u202e"} & set(output)


def test_what_is_without_supervision_is_shown_with_its_reason():
    student = byte_level([b"ab"], ["<eos>", "<tool>"])
    teacher = byte_level([], ["<end>"], eos="<end>", normalizer=normalizers.Replace("Q", "q"))
    eos, tool = student.convert_tokens_to_ids(["<eos>", "<tool>"])
    a, q, c3 = ord("a"), ord("Q"), 0xC3
    ids = [a, a, tool, a, q, a, c3, a, eos, a]
    pair, answers, inspection, page = looked_at((student, teacher), ids)
    (answer,) = answers
    expected = pair.align(answer.student_ids, answer.teacher_ids).dropped
    assert set(expected) == {"special_token", "text_differs", "invalid_utf8", "after_end"}
    assert inspection.dropped() == expected
    assert inspection.tokens("unsupervised") == sum(expected.values()) == 4
    assert [token for token, _, _ in page.line(0, 0)] == ids
    assert [token for token, _, _ in page.line(0, 1)] == answer.teacher_ids
    for reason in expected:
        units = [unit for unit in page.texts[0] if f"without supervision: {REASONS[reason]}" in unit.title]
        assert units and all(unit.kind == "unsupervised" for unit in units)
        assert page.words.count(REASONS[reason]) == 1  # in the table
    assert "1 of 10 response tokens without supervision: text differs" in page.words


def test_reasons_are_those_that_the_alignment_counts(demo_tokenizers):
    pair = TokenizerPair(*demo_tokenizers)
    draw = torch.Generator().manual_seed(0)
    seen = Counter()
    for _ in range(30):
        ids = torch.randint(0, len(demo_tokenizers[0]), (40,), generator=draw).tolist()
        teacher_ids = pair.encode_teacher([ids])[0]
        reasons, units = pair.reasons(ids, teacher_ids), pair.align(ids, teacher_ids)
        assert Counter(reason for reason in reasons if reason) == units.dropped
        covered = [reason is None for reason in reasons]
        assert sum(covered) == int(units.student_length.sum())
        seen.update(units.dropped)
    assert {"invalid_utf8", "special_token"} <= set(seen)


def test_a_long_text_is_drawn_in_part_and_says_so(demo_tokenizers):
    _, answers, whole, page = looked_at(demo_tokenizers, CODE, MIXED)
    total = sum(len(answer.student_ids) for answer in answers)
    first = len(answers[0].student_ids)
    assert "Drawn are" not in page.words
    for limit in (50, first, first + 7, total):
        _, _, same, cut = looked_at(demo_tokenizers, CODE, MIXED, max_tokens=limit)
        assert same.coverage == whole.coverage
        drawn = [token for i in range(len(cut.texts)) for token, _, _ in cut.line(i, 0)]
        ids = [token for answer in answers for token in answer.student_ids]
        assert drawn == ids[: len(drawn)] and limit - 8 < len(drawn) <= limit
        units = [unit.rows for text in cut.texts for unit in text]
        assert units == [unit.rows for text in page.texts for unit in text][: len(units)]
        notice = f"Drawn are the first {len(drawn):,} of {total:,} student tokens"
        assert (notice in cut.words) == (limit < total)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        html_page(whole, [], max_tokens=0)


def test_one_long_unit_does_not_fill_the_page(demo_tokenizers):
    """Units are drawn whole, but one may be as long as its response: the tables show its beginning, and say what is left."""
    count = 20_000
    sides = byte_level([b"ab"]), byte_level([b"ba"])
    ab = sides[0].convert_tokens_to_ids("ab")
    ba = sides[1].convert_tokens_to_ids("ba")
    pair = TokenizerPair(*sides)
    teacher = [ord("a"), *[ba] * (count - 1), ord("b"), pair.teacher_end_ids[0]]
    answer = Answer([*[ab] * count, pair.student_end_ids[0]], teacher, "one unit")
    inspection = inspect_answers(pair, *sides, [answer])
    (longest, times) = inspection.largest()[0]
    assert (len(longest.student), len(longest.teacher), times) == (count, count + 1, 1)
    html = html_page(inspection, [], max_tokens=10)
    assert len(html) < 60_000
    page = Page(html)
    assert f"and {count - 40:,} more" in page.words and f"Drawn are the first 0 of {count + 1:,} student" in page.words
    console = Console(width=200, file=io.StringIO())
    print_inspection(console, inspection, [])
    output = console.file.getvalue()
    assert len(output) < 30_000 and f"and {count - 40:,} more" in output


def test_many_teacher_tokens_to_few_of_the_students_are_a_long_unit_too():
    sides = byte_level([b"a" * 4000]), byte_level()
    long = sides[0].convert_tokens_to_ids("a" * 4000)
    pair, answers, inspection, page = looked_at(sides, [long], max_tokens=10)
    assert len(inspection.answers[0].stretches[0].teacher) == 4000 and not page.texts
    assert "--max_tokens 500 draws everything" in page.words and "and 3,960 more" in page.words


def test_units_that_the_run_leaves_out_are_unsupervised(demo_tokenizers):
    pair = TokenizerPair(*demo_tokenizers)
    (student,) = pair.encode_student([MIXED])
    (teacher,) = pair.encode_teacher([student])
    units = pair.align(student, teacher)
    single = units.single()
    scored = Scored(*(torch.arange(len(single.student_start)) * scale for scale in (-0.25, -0.5, 0.125)))
    answer = Answer(student, teacher, "one", units=single, scored=scored)
    inspection = inspect_answers(pair, *demo_tokenizers, [answer])
    longer = int(units.student_length.sum()) - len(single.student_start)
    assert inspection.dropped() == {"left_out": longer} and longer > 5
    stretches = inspection.answers[0].stretches
    assert [s.score.loss for s in stretches if s.kind == "single"] == scored.loss.tolist()
    assert all(s.score is None for s in stretches if s.kind == "unsupervised")
    page = Page(html_page(inspection, []))
    assert [token for token, _, _ in page.line(0, 1)] == teacher
    shown = [unit for unit in page.texts[0] if unit.kind == "single"]
    assert [unit.loss for unit in shown] == pytest.approx(scored.loss.tolist(), rel=1e-3)
    for unit, loss in zip(shown, scored.loss.tolist(), strict=True):
        assert f"q{bucket(loss, LOSS_STEPS)}" in unit.classes
    (costliest, _), *_ = inspection.costliest()
    assert costliest.score.loss == float(scored.loss.max()) and inspection.mean_loss("longer") is None


def test_colours_of_losses():
    values = [0.0, 0.0099, 0.01, 0.05, 0.1, 0.99, 1.0, 50.0, float("inf"), float("nan")]
    assert [bucket(value, LOSS_STEPS) for value in values] == [0, 0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert bucket_names(LOSS_STEPS) == ["< 0.01", "0.01", "0.03", "0.1", "0.3", "1", "≥ 3"]


@pytest.mark.parametrize(
    ("piece", "script"),
    [
        (b" the", "Latin"), ("ïn".encode(), "Latin"), (b"(self", "Latin"), ("привет".encode(), "Cyrillic"),
        ("λ".encode(), "Greek"), ("学习".encode(), "Chinese characters"), ("食べ".encode(), "Japanese kana"),
        ("한국".encode(), "Hangul"), ("שלום".encode(), "Hebrew"), ("हिन्दी".encode(), "Devanagari"),
        ("ქართ".encode(), "other scripts"), ("aλ".encode(), "several scripts"), (b" 123", "digits"), (b"1.5", "digits"),
        (b"});", "punctuation and symbols"), ("😀".encode(), "punctuation and symbols"), (b"\n\t  ", "white space"),
        (b"\xf0\x9f", "pieces of characters"), (None, "special tokens"),
    ],
)  # fmt: skip
def test_scripts(piece, script):
    assert script_of(piece) == script and script in SCRIPTS


def test_vocabulary_by_script_counts_every_token(qwen, deepseek):
    pair, _, inspection, page = looked_at((deepseek, qwen), "x")
    rows = {row.script: row for row in inspection.scripts}
    assert sum(row.student for row in rows.values()) == len(deepseek)
    assert sum(row.teacher for row in rows.values()) == len(qwen)
    assert sum(row.shared for row in rows.values()) == len(pair.shared.student_ids)
    assert all(row.shared <= min(row.student, row.teacher) for row in rows.values())
    assert rows["digits"].student > 1000 > 100 > rows["digits"].teacher  # groups of three against single digits
    assert "Chinese characters" in page.words and f"{rows['Latin'].shared:,}" in page.words


def advice_of(sides, *given) -> str:
    pair, answers, inspection, _ = looked_at(sides, *given)
    return "\n".join(f"{item.title}: {item.text}" for item in advise(inspection, pair, *sides, answers))


def test_advice_on_spaces():
    documents = ["the time of the year and all that is in it for a day or two at the end of the time\n"] * 20
    before, behind = Spelling(320).make(documents), Spelling(320, space="after").make(documents)
    text = "the year and the day"
    assert "The student's tokens hold the space behind a word, the teacher's the one before it" in advice_of(
        (behind, before), text
    )
    assert "Words carry" not in advice_of((before, before), text) + advice_of((behind, behind), text)


def test_advice_follows_from_the_figures(demo_tokenizers):
    documents = ["It is 314 159 265 358 979 323 84, and 123 45.\n"] * 20
    ones, threes = Spelling(320, digits=1).make(documents), Spelling(320, digits=3).make(documents)
    words = advice_of((ones, threes), "It is 12345.")
    assert "Digits are grouped differently: the student's are shorter" in words and "up to 1 digit of" in words
    words = advice_of((threes, ones), "It is 12345.")
    assert "Digits are grouped differently: the student's are longer" in words and "up to 3 digits of" in words
    words = advice_of((threes, threes), "It is 12345.")
    assert words.startswith("One vocabulary") and "Digits" not in words and "longer units" not in words
    words = advice_of(demo_tokenizers, CODE)
    assert "of the response tokens are in longer units" in words and "--candidates disjoint" in words
    assert "Matching strings would lose" in words and "after " in words and "Digits" not in words

    letters = byte_level([], ["<eos>", "<think>"]), byte_level([b"zz"], ["<eos>", "<think>", "<x>"])
    words = advice_of(letters, "plain")
    assert "1 special token of one name in both vocabularies, not mapped: `<think>`" in words
    assert "Nothing stands out" in advice_of((byte_level(), byte_level([b"zz"] * 1 + [b"qq", b"yy", b"xx"])), "plain")
    words = advice_of((byte_level(), demo_tokenizers[1]), "a long enough piece of plain English text to compare")
    assert re.search(r"0\.\d\d teacher tokens to one of the student's", words)
    few = byte_level([b"%d" % i for i in range(1000, 3000)]), byte_level()
    assert "Only 11% of the student's tokens are shared" in advice_of(few, "plain")
