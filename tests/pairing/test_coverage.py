"""The coverage report, and the public rules it compares with."""

import random

import pytest

from simct.pairing.coverage import greedy_single, shared_by_string, without_markers

from .conftest import CJK, CODE, PROSE

RULES = ["simpleopd_public", "simct_public", "simpleopd", "simct"]


def two_pointers(student, teacher):
    """The public rule as it is written: both sides' texts put together until they are equal."""
    i = j = 0
    single = []
    while i < len(student) and j < len(teacher):
        a, b, m, n = student[i], teacher[j], 1, 1
        while a != b:
            if len(a) < len(b) and b.startswith(a) and i + m < len(student):
                a, m = a + student[i + m], m + 1
            elif len(b) < len(a) and a.startswith(b) and j + n < len(teacher):
                b, n = b + teacher[j + n], n + 1
            else:
                return single
        if m == n == 1:
            single.append((i, j))
        i, j = i + m, j + n
    return single


def test_the_greedy_rule_is_the_public_one():
    draw = random.Random(0)

    def cut(text: str) -> list[str]:
        tokens = []
        while text:
            size = draw.randint(0, min(3, len(text)))  # a marker alone is an empty string
            tokens.append(text[:size])
            text = text[size:]
        return tokens

    found = 0
    for _ in range(5000):
        text = "".join(draw.choices("ab", k=draw.randint(0, 10)))
        other = text if draw.random() < 0.7 else "".join(draw.choices("ab", k=draw.randint(0, 10)))
        student, teacher = cut(text), cut(other)
        assert greedy_single(student, teacher) == two_pointers(student, teacher), (student, teacher)
        found += len(two_pointers(student, teacher))
    assert found > 2000


@pytest.mark.parametrize(
    "student, teacher, single",
    [
        (["a", "b", "c"], ["a", "b", "c"], 3),
        (["a", "bc", "d"], ["ab", "c", "d"], 1),  # rejoined by "d"
        (["a", "\n", "b"], ["a", "Ċ", "b"], 1),  # never rejoined
        (["a", "b"], ["a", "bc"], 1),
        ([], ["a"], 0),
        (["", "a"], ["a"], 0),
    ],
)
def test_greedy_single(student, teacher, single):
    found = greedy_single(student, teacher)
    assert len(found) == single
    assert all(student[i] == teacher[j] for i, j in found)


def test_strings_without_markers():
    assert without_markers(["Ġthe", "▁the", "▁▁", "Ċ"]) == ["the", "the", "", "Ċ"]
    assert shared_by_string(["Ġthe", "x", "Ċ"], ["▁the", "x", "\n"]) == 2


def test_rules_are_ordered_by_what_they_keep(qwen, gemma, make_pair):
    pair = make_pair(gemma, qwen)
    report = pair.coverage([PROSE, CODE[:8000], CJK])
    assert report.texts == 3 and report.text_bytes == len((PROSE + CODE[:8000] + CJK).encode())
    assert report.shared == len(pair.shared.student_ids) and 0 < report.shared_by_string < report.shared
    assert list(report.rules) == RULES
    for rule in report.rules.values():
        assert rule.single + rule.longer + rule.lost == pytest.approx(1)
        assert sum(rule.dropped.values()) == round(rule.lost * report.student_tokens)
    public, anchored, single, ours = report.rules.values()
    assert ours.lost == anchored.lost == 0 and ours.dropped == {}
    assert single.single == ours.single > anchored.single and single.longer == public.longer == 0
    assert single.dropped == {"longer_unit": round(ours.longer * report.student_tokens)}
    assert report.to_dict()["rules"]["simct"]["single"] == ours.single


def test_the_public_rule_ends_at_the_first_newline_of_a_sentencepiece_student(qwen, gemma, make_pair):
    report = make_pair(gemma, qwen).coverage(["one\n" + PROSE.replace("\n", " ") * 20])
    assert report.rules["simpleopd_public"].single < 0.01 < 0.3 < report.rules["simpleopd"].single


def test_between_byte_level_tokenizers_the_public_rule_is_close(qwen, deepseek, make_pair):
    rules = make_pair(qwen, deepseek).coverage([PROSE, CODE[:8000]]).rules
    assert rules["simpleopd_public"].single == pytest.approx(rules["simpleopd"].single, abs=0.02)


def test_normalised_text_is_dropped_by_reason(deepseek, qwen, make_pair):
    rules = make_pair(deepseek, qwen).coverage(["plain, then cafe\u0301, then plain"]).rules
    assert rules["simct"].dropped == {"text_differs": pytest.approx(2, abs=2)} and rules["simct"].lost > 0


def test_no_texts(toy_pair):
    report = toy_pair.coverage([])
    assert report.student_tokens == 0 and report.rules["simct"].lost == 0
