import json

import pytest

from simct.data.prompts import prompt_of, render_prompt
from simct.data.records import read_prompts

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_reads_strings_messages_and_conversations(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write(
        tmp_path / "data.jsonl", {"prompt": "Hi", "answer": "4"}, {"prompt": turns[:1]}, "", {"messages": turns}
    )
    records = read_prompts(path)
    assert [r["prompt"] for r in records] == ["Hi", turns[:1], turns[:1]]
    assert records[0]["answer"] == "4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: expected a JSON object, got list"),
        ({"text": "x"}, r"line 2: expected a field 'prompt' or 'messages', found only \['text'\]"),
        ({"prompt": ""}, "line 2: field 'prompt' is an empty string"),
        ({"prompt": 3}, "line 2: field 'prompt' is 3: expected text or a non-empty list"),
        ({"messages": []}, "line 2: field 'messages' is"),
        ({"messages": [{"role": "user"}]}, "line 2: field 'messages', message 0"),
        ({"messages": [{"role": "assistant", "content": "alone"}]}, "line 2: field 'messages'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / "data.jsonl", {"prompt": "fine"}, line))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(write(tmp_path / "data.jsonl", ""))


def test_each_model_reads_its_own_template(demo_tokenizers):
    student, teacher = demo_tokenizers
    teacher = type(teacher)(tokenizer_object=teacher.backend_tokenizer, chat_template=CHAT)
    messages = [{"role": "user", "content": "Name three colours"}]
    assert teacher.decode(render_prompt(messages, teacher)) == "<user>Name three colours<assistant>"
    assert teacher.decode(render_prompt("Name three colours", teacher)) == "<user>Name three colours<assistant>"
    assert teacher.decode(render_prompt("Name three colours", teacher, "text")) == "Name three colours"
    assert student.decode(render_prompt(messages, student)) == "<bos>Name three colours\n"
    with pytest.raises(ValueError, match="has no chat template"):
        render_prompt(messages, student, "chat")
    with pytest.raises(ValueError, match="prompt_format is 'markdown'"):
        render_prompt(messages, student, "markdown")


def test_a_prompt_without_tokens_starts_the_text(demo_tokenizers):
    _, teacher = demo_tokenizers
    assert render_prompt([{"role": "user", "content": ""}], teacher, "text") == teacher("\n")["input_ids"]
    assert render_prompt("", teacher, "text") == [teacher.eos_token_id]


def test_prompt_of_needs_a_prompt():
    with pytest.raises(ValueError, match="expected a field"):
        prompt_of({})
