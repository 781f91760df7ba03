"""Random merging and masking of units: properties over random batches of responses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simct.pairing.ablations import MASKED, mask_longer, merge_randomly
from simct.pairing.pair import Alignment, TokenizerPair

END = 7  # the student's end-of-turn
LENGTH = st.tuples(st.integers(1, 3), st.integers(1, 3))
# A response: units (student tokens, teacher tokens), None for a row of the student alone that is in no unit; whether it ended.
RESPONSE = st.tuples(st.lists(st.one_of(LENGTH, st.just(None)), max_size=12), st.booleans())


def build(responses) -> tuple[Alignment, list[int], list[Alignment]]:
    """The packed batch, its responses' student lengths, and the responses apart."""
    parts = []
    for units, ended in responses:
        columns, tokens, teacher_rows, dropped = [], [], 0, 0
        for unit in [*units, *([(1, 1)] if ended else [])]:
            if unit is None:
                tokens.append(0)
                dropped += 1
                continue
            columns.append((len(tokens), unit[0], teacher_rows, unit[1]))
            tokens += [1] * unit[0]
            teacher_rows += unit[1]
        if ended:
            tokens[-1] = END
        columns = torch.tensor(columns, dtype=torch.int64).reshape(-1, 4).T
        parts.append(
            Alignment(
                *(column.contiguous() for column in columns),
                torch.tensor(tokens, dtype=torch.int64),
                torch.zeros(teacher_rows, dtype=torch.int64),
                dropped={"text_differs": dropped} if dropped else {},
            )
        )
    return Alignment.concatenate(parts), [len(part.student_tokens) for part in parts], parts


def rows(units: Alignment, side: str) -> list[int]:
    start, length = getattr(units, f"{side}_start").tolist(), getattr(units, f"{side}_length").tolist()
    return [row for a, n in zip(start, length, strict=True) for row in range(a, a + n)]


def bounds(units: Alignment) -> list[tuple[int, int]]:
    return list(zip(units.student_start.tolist(), units.teacher_start.tolist(), strict=True))


def columns(units: Alignment) -> list[list[int]]:
    names = ("student_start", "student_length", "teacher_start", "teacher_length")
    return [getattr(units, name).tolist() for name in names]


BATCH = st.lists(RESPONSE, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(BATCH, st.floats(0, 1), st.integers(0, 99))
def test_merged_units_are_the_same_rows_with_fewer_bounds(responses, ratio, seed):
    units, lengths, _ = build(responses)
    merged = merge_randomly(units, ratio, seed, response_lengths=lengths, end_ids=[END])
    for side in "student", "teacher":
        assert rows(merged, side) == rows(units, side)
    assert set(bounds(merged)) <= set(bounds(units))
    assert merged.dropped == units.dropped and merged.student_tokens.equal(units.student_tokens)
    # No unit reaches into another response, or holds an end-of-turn with other tokens.
    starts = {sum(lengths[:r]) for r in range(len(lengths))}
    for start, length in zip(merged.student_start.tolist(), merged.student_length.tolist(), strict=True):
        assert not starts & set(range(start + 1, start + length))
        tokens = merged.student_tokens[start : start + length].tolist()
        assert END not in tokens or tokens == [END]


@settings(max_examples=30, deadline=None)
@given(BATCH, st.integers(0, 99))
def test_the_ends_of_the_ratio(responses, seed):
    units, lengths, _ = build(responses)
    assert columns(merge_randomly(units, 0, seed, response_lengths=lengths)) == columns(units)
    merged = merge_randomly(units, 1, seed, response_lengths=lengths, end_ids=[END])
    stretches = 0  # unbroken by a row in no unit, an end of turn or a new response
    for cells, ended in responses:
        broken = [None, *cells, None]
        stretches += sum(a is None and b is not None for a, b in zip(broken, broken[1:], strict=False)) + ended
    assert len(merged) == stretches


@settings(max_examples=40, deadline=None)
@given(BATCH, st.floats(0.1, 0.9), st.integers(0, 99))
def test_a_batch_cut_into_responses_draws_the_same(responses, ratio, seed):
    units, lengths, parts = build(responses)
    one, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    whole = merge_randomly(units, ratio, one, response_lengths=lengths)
    cut = [merge_randomly(p, ratio, other, response_lengths=[n]) for p, n in zip(parts, lengths, strict=True)]
    assert columns(Alignment.concatenate(cut)) == columns(whole)
    whole = mask_longer(units, ratio, one)
    masked = Alignment.concatenate([mask_longer(part, ratio, other) for part in parts])
    assert columns(masked) == columns(whole) and masked.dropped == whole.dropped


@settings(max_examples=60, deadline=None)
@given(BATCH, st.floats(0, 1), st.integers(0, 99))
def test_masking_leaves_single_units_and_counts_the_rest(responses, share, seed):
    units, _, _ = build(responses)
    masked = mask_longer(units, share, seed)
    assert bounds(masked.single()) == bounds(units.single())
    assert set(zip(*columns(masked), strict=True)) <= set(zip(*columns(units), strict=True))
    tokens = len(units.student_tokens)
    assert int(masked.student_length.sum()) + sum(masked.dropped.values()) == tokens
    longer = int(units.student_length.sum()) - len(units.single())
    if share == 0:
        assert len(masked) == len(units) and MASKED not in masked.dropped
    if share == 1:
        assert len(masked) == len(units.single()) and masked.dropped.get(MASKED, 0) == longer


def test_the_shares_are_those_asked_for():
    units, lengths, _ = build([([(2, 1)] * 2000, False)])
    assert len(mask_longer(units, 0.3, 0)) == pytest.approx(1400, abs=70)
    assert len(merge_randomly(units, 0.3, 0, response_lengths=lengths)) == pytest.approx(1400, abs=70)


def test_left_out_follows_the_units_that_stay():
    units, _, _ = build([([(1, 1), (2, 1), (1, 1)], False)])
    left_out = Alignment(*(torch.tensor(c) for c in columns(units)), units.student_tokens, units.teacher_tokens,
                         left_out=torch.tensor([[1, 4], [2, 5]]))  # fmt: skip
    assert mask_longer(left_out, 1, 0).left_out.tolist() == [[1, 5]]
    with pytest.raises(ValueError, match='merged units need candidates="paper"'):
        merge_randomly(left_out, 0.5, 0, response_lengths=[4])


def test_on_a_real_alignment(demo_tokenizers):
    student, teacher = demo_tokenizers
    pair = TokenizerPair(student, teacher)
    texts = ["Return the codec's StreamWriter for UTF-8.", "unnecessarily slow: 1024 bytes"]
    ids = [[*student(text, add_special_tokens=False).input_ids, pair.end_pair[0]] for text in texts]
    units = pair.align_batch(ids, pair.encode_teacher(ids))
    merged = merge_randomly(
        units, 1.0, 0, response_lengths=[len(response) for response in ids], end_ids=pair.student_end_ids
    )
    assert merged.student_length.tolist() == [len(ids[0]) - 1, 1, len(ids[1]) - 1, 1]
    longer = (units.student_length > 1) | (units.teacher_length > 1)
    assert longer.any() and mask_longer(units, 1.0, 0).dropped == {MASKED: int(units.student_length[longer].sum())}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, n: merge_randomly(u, 1.5, 0, response_lengths=n), r"ratio is 1.5: expected a number in \[0, 1\]"),
        (lambda u, n: merge_randomly(u, 0.5, 0, response_lengths=[3]), "response_lengths add up to 3: .* 4 student"),
        (lambda u, n: merge_randomly(u.select(torch.tensor([1, 0, 2])), 0.5, 0, response_lengths=n), "must ascend"),
        (lambda u, n: mask_longer(u, -0.1, 0), r"share is -0.1: expected a number in \[0, 1\]"),
        (lambda u, n: mask_longer(u, float("nan"), 0), "share is nan"),
    ],
)
def test_bad_input(call, message):
    units, lengths, _ = build([([(1, 1), (2, 1), (1, 1)], False)])
    with pytest.raises(ValueError, match=message):
        call(units, lengths)
