import json
import warnings

import pytest

from simct.data.prompts import prompt_of, render_prompt
from simct.data.records import load_records, read_prompts, reference_answer
from simct.data.renderer import Renderer, compare_thoughts

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


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "How is"}, {"type": "text", "text": "Bern?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "a", "tool_calls": None},
]


@pytest.fixture
def templated(demo_tokenizers):
    """A tokenizer with another template."""

    def with_template(template):
        tokenizer = demo_tokenizers[1]
        return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)

    return with_template


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None])
def test_tool_calls_and_parts_of_text_are_rendered(templated, tools):
    tokenizer = templated(WITH_TOOLS)
    rendered = tokenizer.decode(Renderer(tokenizer)({"messages": CONVERSATION, "tools": tools}))
    expected = '<user>How is\nBern?<assistant>weather{"city": "Bern"}<tool>sunny'
    assert rendered == ("[weather]" if tools else "") + expected


def test_arguments_are_json_for_a_template_that_wants_them_so(templated):
    template = WITH_TOOLS.replace("c.function.arguments | tojson", "'(' + c.function.arguments + ')'")
    tokenizer = templated(template)
    assert tokenizer.decode(Renderer(tokenizer)({"prompt": CONVERSATION})).endswith(
        'weather({"city": "Bern"})<tool>sunny'
    )


def test_tool_calls_that_would_be_lost_are_an_error(templated):
    for template, prompt_format in ((CHAT, "auto"), (WITH_TOOLS, "text")):
        with pytest.raises(
            ValueError, match="leaves the call of 'weather' out|calls 'weather', and there is no chat template"
        ):
            render_prompt(prompt_of({"prompt": CONVERSATION}), templated(template), prompt_format)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "has a part .*expected parts of text"),
        ({"role": "user", "content": []}, "expected a 'content' of text, or of parts of text"),
        ({"role": "assistant", "tool_calls": [{"name": "weather"}]}, "has a tool call .*expected a 'function'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "has a tool call"),
    ],
)
def test_messages_that_cannot_be_rendered_are_named(message, problem):
    with pytest.raises(ValueError, match=f"field 'prompt', message 0 .*{problem}"):
        prompt_of({"prompt": [message]})
    with pytest.raises(ValueError, match="field 'tools' is 7: expected a list of functions"):
        Renderer(None)({"prompt": "a", "tools": 7})


def test_conversations_with_tools_are_records(tmp_path):
    final = {"role": "assistant", "content": [{"type": "text", "text": "It is sunny."}]}
    lines = {"messages": [*CONVERSATION, final], "tools": TOOLS}, {"messages": CONVERSATION[:2]}
    records = load_records(str(write(tmp_path / "data.jsonl", *lines)))
    assert [len(record["prompt"]) for record in records] == [3, 1]
    # A text is an answer, a call of a tool is none.
    assert [reference_answer(record) for record in records] == ["It is sunny.", None]


# ---- Thoughts ----

PLAIN = "<user>{{ messages[0].content }}<assistant>"
ASKED = (
    PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)  # as Qwen3
BY_WISH = PLAIN + "{% if enable_thinking %}<think>\n{% endif %}"
ALWAYS = PLAIN + "<think>\n"  # as DeepSeek-R1


@pytest.mark.parametrize(
    ("template", "options", "thinks", "opened"),
    [
        (PLAIN, {}, False, None),
        (ASKED, {}, True, None),
        (ASKED, {"enable_thinking": False}, False, None),
        (BY_WISH, {}, False, None),
        (BY_WISH, {"enable_thinking": True}, True, "<think>"),
        (ALWAYS, {}, True, "<think>"),
        (PLAIN + "[THINK]a[/THINK]", {}, False, None),
        (PLAIN + "<|START_THINKING|>", {}, True, "<|START_THINKING|>"),
    ],
)
def test_whether_a_template_asks_for_thoughts(templated, template, options, thinks, opened):
    found = Renderer(templated(template), template_options=options).with_thinking()
    assert (found.thinks, found.opened_thought) == (thinks, opened)
    assert ("enable_thinking" in found.template_options) == found.reads_thinking  # said, whatever it is


@pytest.mark.parametrize(("template", "expected"), [(PLAIN, False), (ASKED, True), (ALWAYS, True)])
def test_a_teacher_thinks_as_its_student_does(templated, template, expected):
    student = Renderer(templated(template)).with_thinking()
    for own in ASKED, BY_WISH:
        teacher = Renderer(templated(own)).with_thinking(like=student)
        assert teacher.template_options == {"enable_thinking": expected}


@pytest.mark.parametrize(
    ("student", "teacher", "options", "told"),
    [
        (PLAIN, ALWAYS, {}, r"the teacher's chat template opens a thought \(<think>\), the student's does not"),
        (ALWAYS, PLAIN, {}, r"the student's chat template opens a thought \(<think>\), the teacher's does not"),
        (
            PLAIN,
            ASKED,
            {},
            "the teacher's chat template asks for thoughts.*enable_thinking in teacher_chat_template_kwargs",
        ),
        (PLAIN, ASKED, {"enable_thinking": False}, None),
        (PLAIN, PLAIN, {}, None),
        (ALWAYS, ALWAYS, {}, None),
    ],
)
def test_thoughts_of_one_side_alone_are_told(templated, student, teacher, options, told):
    sides = Renderer(templated(student)).with_thinking(), Renderer(templated(teacher), template_options=options)
    with pytest.warns(UserWarning, match=told) if told else warnings.catch_warnings():
        if not told:
            warnings.simplefilter("error")
        compare_thoughts(sides[0], sides[1].with_thinking())
