"""Padded batches of other trainers, packed: held to what the trainer itself reads."""

import pytest
import torch

from simct import TokenizerPair
from simct.models.hidden import PackedSequences, response_hidden_states
from simct.pairing.padded import PaddedBatch, padded_to_packed
from simct_kernels import LMHead, linear_simct_loss

TEXTS = ["Return the codec's name.", "", "naïve 12\n\nof it"]
PROMPTS = ["Called by", "Get the integer value of", "The"]


@pytest.fixture(scope="module")
def pair(demo_tokenizers):
    return TokenizerPair(*demo_tokenizers)


@pytest.fixture(scope="module")
def sides(pair, demo_tokenizers):
    """Prompts and responses of both sides; the second response is empty."""
    student, teacher = demo_tokenizers
    ours = [student(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ours[2].append(pair.end_pair[0])
    return ([student(p)["input_ids"] for p in PROMPTS], ours), (
        [teacher(p)["input_ids"] for p in PROMPTS],
        pair.encode_teacher(ours),
    )


def padded(prompts, responses, padding: str, fill: int = 3) -> PaddedBatch:
    """`padding`: "left" or "right" of the whole sequence, or "both": of prompts on the left and of responses on the right."""
    width = [max(map(len, part)) for part in (prompts, responses)]
    rows = []
    for p, r in zip(prompts, responses, strict=True):
        if padding == "both":
            left, right = width[0] - len(p), width[1] - len(r)
        else:
            empty = sum(width) - len(p) - len(r)
            left, right = (empty, 0) if padding == "left" else (0, empty)
        rows.append([[fill] * left + p + r + [fill] * right, left, len(p), len(r)])
    ids = torch.tensor([row[0] for row in rows])
    place = torch.arange(ids.shape[1])
    attention = torch.stack([(place >= left) & (place < left + p + r) for _, left, p, r in rows])
    response = torch.stack([(place >= left + p) & (place < left + p + r) for _, left, p, r in rows])
    return PaddedBatch(ids, response, attention.long())


def hidden(model, batch: PaddedBatch):
    return model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_packed_rows_and_units_are_those_of_the_trainer(padding, pair, sides, demo_student, demo_teacher):
    (prompts, responses), (teacher_prompts, teacher_responses) = sides
    ours, theirs = padded(prompts, responses, padding), padded(teacher_prompts, teacher_responses, padding)
    with torch.no_grad():
        packed = padded_to_packed(pair, ours, hidden(demo_student, ours), theirs, hidden(demo_teacher, theirs))
        expected = [
            response_hidden_states(model, PackedSequences.build(*side))
            for model, side in zip((demo_student, demo_teacher), sides, strict=True)
        ]
    assert packed.student_hidden.shape == (sum(map(len, responses)), demo_student.config.hidden_size)
    torch.testing.assert_close(packed.student_hidden, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.teacher_hidden, expected[1], rtol=1e-4, atol=1e-4)
    assert ours.responses == responses and responses[1] == []
    units = pair.align_batch(responses, teacher_responses)
    for name in ("student_start", "student_length", "teacher_start", "teacher_length", "student_tokens"):
        assert torch.equal(getattr(packed.units, name), getattr(units, name))
    assert packed.units.dropped == {} and len(packed.units) > 5


def test_gradients_reach_only_what_predicts_a_response(pair, sides, demo_student, demo_teacher):
    ours, theirs = (padded(*side, "left") for side in sides)
    states = torch.randn(*ours.input_ids.shape, demo_student.config.hidden_size, requires_grad=True)
    with torch.no_grad():
        teacher_states = hidden(demo_teacher, theirs)
    packed = padded_to_packed(pair, ours, states, theirs, teacher_states)
    heads = LMHead.from_model(demo_student), LMHead.from_model(demo_teacher)
    linear_simct_loss(
        packed.student_hidden, heads[0], packed.teacher_hidden, heads[1], packed.units, pair.shared
    ).backward()
    reached = states.grad.abs().sum(dim=2) > 0
    predicts = torch.zeros_like(reached)
    predicts[:, :-1] = ours.response_mask[:, 1:]
    assert not reached[~predicts].any()
    assert reached[predicts].all()


def test_rows_that_are_packed_already_pass_through(pair, sides, demo_student):
    ours, theirs = (padded(*side, "right") for side in sides)
    shipped = torch.randn(len(theirs.rows), 192)
    states = torch.randn(*ours.input_ids.shape, 128)
    packed = padded_to_packed(pair, ours, states, theirs, shipped)
    assert packed.teacher_hidden is shipped
    with pytest.raises(ValueError, match=rf"packed \[{len(theirs.rows)}, H\], got \[{len(shipped) - 1}, 192\]"):
        padded_to_packed(pair, ours, states, theirs, shipped[1:])
    with pytest.raises(ValueError, match=r"hidden_states must be .*'H'.*, got \[3, 2, 128\]"):
        ours.hidden_rows(states[:, :2])


def test_texts_that_differ_are_counted(pair, sides):
    (prompts, responses), (teacher_prompts, teacher_responses) = sides
    other = [*teacher_responses[:2], []]  # the teacher has nothing for the third
    ours, theirs = padded(prompts, responses, "right"), padded(teacher_prompts, other, "right")
    packed = padded_to_packed(pair, ours, torch.zeros(len(ours.rows), 4), theirs, torch.zeros(len(theirs.rows), 4))
    assert packed.units.dropped == {"no_teacher_tokens": len(responses[2])}
    changed = [pair.encode_teacher(responses[2:])[0][:-1], [], teacher_responses[2]]
    theirs = padded(teacher_prompts, changed, "right")
    packed = padded_to_packed(pair, ours, torch.zeros(len(ours.rows), 4), theirs, torch.zeros(len(theirs.rows), 4))
    assert 0 < packed.units.dropped["text_differs"] <= len(responses[0])
    with pytest.raises(ValueError, match="3 student responses, but 2 of the teacher's"):
        theirs = padded(teacher_prompts[::2], teacher_responses[::2], "right")
        padded_to_packed(pair, ours, torch.zeros(len(ours.rows), 4), theirs, torch.zeros(len(theirs.rows), 4))


def test_built_from_lists_is_padded_on_the_right(sides):
    (prompts, responses), _ = sides
    built, expected = PaddedBatch.build(prompts, responses, pad_id=3), padded(prompts, responses, "right")
    width = built.input_ids.shape[1]
    assert width == max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    for name in ("input_ids", "response_mask", "attention_mask"):
        assert torch.equal(getattr(built, name).long(), getattr(expected, name)[:, :width].long()), name
    with pytest.raises(ValueError, match="3 prompts and 2 responses: expected one response"):
        PaddedBatch.build(prompts, responses[:2])
    with pytest.raises(ValueError, match="0 prompts and 0 responses: expected one response"):
        PaddedBatch.build([], [])


def test_what_generate_returns():
    sequences = torch.tensor([[0, 0, 5, 6, 7, 9, 0], [4, 5, 6, 7, 8, 7, 8], [0, 3, 3, 9, 0, 0, 0]])
    prompt_mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    batch = PaddedBatch.generated(sequences, prompt_mask, end_ids=(9, 2))
    assert batch.responses == [[6, 7, 9], [7, 8, 7, 8], [9]]
    assert batch.rows.tolist() == [2, 3, 4, 9, 10, 11, 12, 16]
    assert batch.attention_mask.int().tolist() == [[0, 0, 1, 1, 1, 1, 0], [1] * 7, [0, 1, 1, 1, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"got \[3, 7\] and \[2, 3\]"):
        PaddedBatch.generated(sequences, prompt_mask[:2], end_ids=(9,))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input_ids=torch.ones(2, 4)), r"input_ids must be int64 \[B, T\], got torch.float32 \[2, 4\]"),
        (dict(response_mask=torch.ones(2, 3).long()), r"response_mask must be \[2, 4\] as input_ids"),
        (dict(attention_mask=torch.ones(4).long()), r"attention_mask must be \[2, 4\] as input_ids"),
        (dict(response_mask=torch.ones(2, 4)), "response_mask must be bool or integer, got torch.float32"),
        (dict(response_mask=torch.tensor([[-100, -100, 7, 8]] * 2)), "response_mask must hold 0 and 1, got -100"),
        (dict(response_mask=torch.zeros(2, 4).long()), "response_mask marks none of the 8 tokens"),
        (dict(response_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])), "row 1: the response begins at position 0"),
        (dict(attention_mask=torch.tensor([[1] * 4, [0, 0, 1, 1]])), "row 1: the response begins at position 2"),
        (dict(attention_mask=torch.tensor([[1] * 4, [1, 1, 1, 0]])), "row 1: marks positions 2 to 3.*padding"),
        (dict(response_mask=torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])), "row 1: position 2 is a gap"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_packed(change, message):
    good = dict(
        input_ids=torch.ones(2, 4).long(),
        response_mask=torch.tensor([[0, 0, 1, 1]] * 2),
        attention_mask=torch.ones(2, 4).long(),
    )
    assert PaddedBatch(**good).responses == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match=message):
        PaddedBatch(**{**good, **change})


def test_the_teachers_side_of_a_batch(pair, sides, demo_tokenizers):
    """The same responses behind the teacher's own prompts, ends of turn included; a batch says what a model is called with."""
    (prompts, responses), (teacher_prompts, teacher_responses) = sides
    ours = PaddedBatch.build(prompts, responses)
    theirs = ours.for_teacher(pair, teacher_prompts, pad_id=7)
    assert theirs.responses == teacher_responses
    expected = PaddedBatch.build(teacher_prompts, teacher_responses, pad_id=7)
    for name in "input_ids", "response_mask", "attention_mask", "rows":
        assert torch.equal(getattr(theirs, name), getattr(expected, name)), name
    assert set(theirs.inputs) == {"input_ids", "attention_mask"}
    bare = PaddedBatch(ours.input_ids, ours.response_mask)
    assert set(bare.inputs) == {"input_ids"} and bare.to("cpu").attention_mask is None
    with pytest.raises(ValueError, match="expected one response to each prompt"):
        ours.for_teacher(pair, teacher_prompts[1:])
