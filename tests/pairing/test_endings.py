"""Which token ends the assistant's turn."""

import pytest
from transformers import GenerationConfig

from simct.pairing.endings import end_ids
from simct.pairing.pair import TokenizerPair

from .conftest import plain_byte_level

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tokenizer(special, eos="<|endoftext|>", template=None):
    made = plain_byte_level(eos=eos, special=special)
    made.chat_template = template
    return made


def names(made, config=None):
    return made.convert_ids_to_tokens(end_ids(made, config))


def test_the_chat_template_decides():
    made = tokenizer(["<|im_start|>", "<|im_end|>"], template=CHATML)
    assert names(made) == ["<|im_end|>", "<|endoftext|>"]


def test_without_a_template_the_generation_config_decides():
    made = tokenizer(["<|eot_id|>", "<|im_end|>"])
    assert names(made) == ["<|endoftext|>", "<|im_end|>", "<|eot_id|>"]
    end = made.convert_tokens_to_ids("<|eot_id|>")
    assert names(made, GenerationConfig(eos_token_id=end)) == ["<|eot_id|>", "<|endoftext|>"]
    assert names(made, GenerationConfig(eos_token_id=[end, made.eos_token_id])) == ["<|eot_id|>", "<|endoftext|>"]


def test_a_token_that_closes_a_thought_is_no_ending():
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    template += "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}"
    special = ["<|start|>", "<|message|>", "<|end|>", "<|return|>"]
    assert names(tokenizer(special, template=template)) == ["<|return|>", "<|endoftext|>"]


def test_a_template_that_fails_or_does_not_close_the_turn_is_passed_over():
    assert names(tokenizer([], template="{{ raise_exception('no') }}")) == ["<|endoftext|>"]
    assert names(tokenizer([], template="{% for m in messages %}{{ m.content }}. {% endfor %}")) == ["<|endoftext|>"]


def test_pair_and_explicit_mapping():
    student = tokenizer(["<|im_start|>", "<|im_end|>", "<tool>"], template=CHATML)
    teacher = tokenizer(["<call>", "<|eot_id|>"], eos="<eos>")
    s, t = student.convert_tokens_to_ids, teacher.convert_tokens_to_ids
    auto = TokenizerPair(student, teacher)
    assert auto.end_pair == (s("<|im_end|>"), t("<eos>"))
    assert auto.student_end_ids == (s("<|im_end|>"), s("<|endoftext|>"))
    assert auto.teacher_end_ids == (t("<eos>"), t("<|eot_id|>"))

    mapping = {"<|im_end|>": "<|eot_id|>", s("<|endoftext|>"): "<eos>", "<tool>": t("<call>")}
    pair = TokenizerPair(student, teacher, mapping)
    assert pair.end_pair == (s("<|im_end|>"), t("<|eot_id|>"))
    assert pair.teacher_end_ids == (t("<|eot_id|>"), t("<eos>"))
    shared = dict(zip(pair.shared.student_ids.tolist(), pair.shared.teacher_ids.tolist(), strict=True))
    assert len(shared) == 256 + 3 and shared[s("<tool>")] == t("<call>") and shared[s("<|im_end|>")] == t("<|eot_id|>")
    assert pair.encode_teacher([[s("<|endoftext|>")], [s("<|im_end|>")]]) == [[t("<eos>")], [t("<|eot_id|>")]]

    # A mapping that leaves the primary ending out adds it; one that takes the teacher's primary ending replaces it.
    assert TokenizerPair(student, teacher, {"<tool>": "<call>"}).end_pair == auto.end_pair
    taken = TokenizerPair(student, teacher, {"<|endoftext|>": "<eos>"})
    assert taken.end_pair == (s("<|endoftext|>"), t("<eos>")) and s("<|im_end|>") in taken.student_end_ids


def test_the_ends_of_the_turn_as_a_class():
    student = tokenizer(["<|im_start|>", "<|im_end|>", "<tool>"], template=CHATML)
    teacher = tokenizer(["<call>", "<|eot_id|>"], eos="<eos>")
    s, t = student.convert_tokens_to_ids, teacher.convert_tokens_to_ids
    pair = TokenizerPair(student, teacher, {"<tool>": "<call>"}, stop="class")
    assert pair.shared.student_classes.tolist() == [[0, s("<|im_end|>")], [0, s("<|endoftext|>")]]
    assert pair.shared.teacher_classes.tolist() == [[0, t("<eos>")], [0, t("<|eot_id|>")]]
    assert len(pair.shared) == 256 + 1 and s("<tool>") in pair.shared.student_ids.tolist()
    # Whichever ends a response, both sides compare all of them; no other candidate overlaps with it.
    for end in s("<|im_end|>"), s("<|endoftext|>"):
        for other in t("<eos>"), t("<|eot_id|>"):
            units = pair.align([97, end], [97, other], disjoint=True)
            assert not units.has_continuation(pair.shared).any() and len(units) == 2 and not len(units.left_out)
    assert TokenizerPair(student, teacher).align([end], [other], disjoint=True).left_out.tolist() != []
    # What ends a response is what the configuration says; what may be a teacher's end is known by its name as well.
    configured = GenerationConfig(eos_token_id=t("<eos>"))
    pair = TokenizerPair(student, teacher, stop="class", teacher_generation_config=configured)
    assert pair.teacher_end_ids == (t("<eos>"),) and pair.stop_ids[1] == (t("<eos>"), t("<|eot_id|>"))
    assert pair.shared.teacher_classes[:, 1].tolist() == list(pair.stop_ids[1])
    pair = TokenizerPair(teacher, student, stop="class", student_generation_config=configured)
    assert pair.stop_ids[0] == pair.student_end_ids == (t("<eos>"),) and len(pair.shared.student_classes) == 1
    # What is mapped to another token of the student's stays its pair.
    pair = TokenizerPair(student, teacher, {"<tool>": "<|eot_id|>"}, stop="class")
    assert pair.shared.teacher_classes.tolist() == [[0, t("<eos>")]]
    with pytest.raises(ValueError, match='stop must be "pair" or "class", got \'both\''):
        TokenizerPair(student, teacher, stop="both")


def test_a_mapped_token_with_bytes_keeps_one_partner(qwen, gemma, make_pair):
    newline = gemma.convert_tokens_to_ids("\n")
    pair = TokenizerPair(qwen, gemma, {"<think>": newline})
    teacher = pair.shared.teacher_ids.tolist()
    assert teacher.count(newline) == 1
    assert pair.shared.student_ids[teacher.index(newline)] == qwen.convert_tokens_to_ids("<think>")


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"<nope>": "<eos>"}, "'<nope>', which the student's tokenizer does not have"),
        ({"<|endoftext|>": 10**6}, "1000000, which the teacher's tokenizer does not have"),
        ({"<|endoftext|>": "<eos>", "<tool>": "<eos>"}, "one to one"),
        ("none", "special_tokens must be"),
    ],
)
def test_bad_mappings(mapping, message):
    student, teacher = tokenizer(["<tool>"]), tokenizer([], eos="<eos>")
    with pytest.raises(ValueError, match=message):
        TokenizerPair(student, teacher, mapping)


def test_no_ending_at_all():
    bare = plain_byte_level(eos="<stop>")
    bare.eos_token = None
    with pytest.raises(ValueError, match="the student's tokenizer has no end-of-turn token"):
        TokenizerPair(bare, plain_byte_level())
    assert TokenizerPair(bare, plain_byte_level(), {"<stop>": "<|im_end|>"}).end_pair == (256, 256)
