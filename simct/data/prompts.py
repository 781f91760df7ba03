"""Prompts: taken from a record (`records` reads those), and rendered for one model with that model's own chat template.

A record has a `prompt`: a string, or a list of messages (`{"role": ..., "content": ...}`) that ends with the user's turn, or with
a tool's. A record with `messages` instead is a whole conversation; its last assistant turn, if it ends with one, is left out.
Messages are those of the OpenAI interface: a `content` is text or parts of text, and an assistant's turn may have `tool_calls`; a
record's `tools` are the functions that could be called.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from simct.console import error_line
from simct.pairing.templates import apply_template

Prompt = str | list[dict[str, Any]]
PROMPT_FORMATS = ("auto", "chat", "text")


def prompt_of(record: dict[str, Any]) -> Prompt:
    """The prompt of one record: `prompt`, or `messages` without a closing assistant turn. ValueError if there is none."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is {short(record)}: expected a mapping with a prompt or messages")
    if record.get("prompt") is not None:
        prompt, name = record["prompt"], "prompt"
    elif record.get("messages") is not None:
        prompt, name = record["messages"], "messages"
        if (
            isinstance(prompt, list)
            and prompt
            and isinstance(prompt[-1], dict)
            and prompt[-1].get("role") == "assistant"
        ):
            prompt = prompt[:-1]
    else:
        raise ValueError(f"expected a field 'prompt' or 'messages', found only {sorted(map(str, record))}")
    if isinstance(prompt, str) and name == "prompt":
        if not prompt:
            raise ValueError("field 'prompt' is an empty string: expected text")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        text_or = "text or " if name == "prompt" else ""
        raise ValueError(f"field {name!r} is {short(record[name])}: expected {text_or}a non-empty list of messages")
    return [message_of(message, f"field {name!r}, message {i}") for i, message in enumerate(prompt)]


def message_of(message: Any, place: str) -> dict[str, Any]:
    """One message with its text as one string. ValueError for what is none, or has parts that are no text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place} is {short(message)}: expected a string 'role' and a 'content'")
    # A table gives every message every key that one of them has: templates would take an empty one for given.
    found = {key: value for key, value in message.items() if value is not None}
    calls = found.pop("tool_calls", None) or []
    content = found.get("content", "" if calls else None)
    if isinstance(content, list) and content:
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError(f"{place} has a part {short(part)}: expected parts of text")
        # Most templates of text models take no list. Joined as vLLM's server does it.
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place} is {short(message)}: expected a 'content' of text, or of parts of text")
    found["content"] = content
    if calls:
        found["tool_calls"] = [_call(call, place) for call in calls]
    return found


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call of a tool, its arguments as a mapping (the interface has them as JSON): most templates write the JSON themselves."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(function["name"], str) or not isinstance(arguments, dict):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise ValueError(
            f"{place} has a tool call {short(call)}: expected a 'function' with its 'name' and 'arguments' (a mapping, or JSON)"
        ) from None
    rest = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **rest, "function": {**function, "arguments": arguments}}


def tools_of(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The functions that a record's conversation could call, None where it has none. ValueError for what is no list of them."""
    tools = record.get("tools")
    if isinstance(tools, str):  # a column of a table can hold what differs from row to row only as text
        try:
            tools = json.loads(tools)
        except ValueError:
            pass
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"field 'tools' is {short(record['tools'])}: expected a list of functions (or its JSON)")
    return tools


def render_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str = "auto",
    template_options: dict[str, Any] | None = None,
) -> list[int]:
    """The token ids of a prompt as one model wants to read it, ready for the first token of the response.

    "chat" applies the tokenizer's own template (a string is one user message); "text" encodes the plain text (of messages: their
    contents, a line break between them); "auto" is "chat" where the tokenizer has a template and "text" where it has none.
    `template_options` reach the template (`{"enable_thinking": False}`, say).
    Never empty: a plain text that encodes to nothing starts with the beginning-of-text (or end-of-text) token.

    Raises ValueError for an unknown format, a missing template, a prompt that the template or the tokenizer refuses, or tool calls
    that it leaves out.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"prompt_format is {prompt_format!r}: expected one of {', '.join(PROMPT_FORMATS)}")
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise ValueError(f"prompt_format is 'chat', but the tokenizer {tokenizer.name_or_path!r} has no chat template")
    chat = prompt_format != "text" and tokenizer.chat_template
    called = [] if isinstance(prompt, str) else [call for m in prompt for call in m.get("tool_calls") or ()]
    names = [call["function"]["name"] for call in called]
    try:
        if chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            options = {"add_generation_prompt": True, "return_dict": True, **(template_options or {})}
            ids = list(_rendered(tokenizer, messages, options, bool(called))["input_ids"])
            lost = [name for name in names if name not in tokenizer.decode(ids)] if called else []
            if lost:
                raise ValueError(f"its chat template leaves the call of {lost[0]!r} out")
            return ids
        if called:
            raise ValueError(f"it calls {names[0]!r}, and there is no chat template to write that")
        text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n"
        ids = list(tokenizer(text)["input_ids"])
    except (TypeError, ValueError) as error:  # a template may refuse a role; a lone surrogate is no text
        raise ValueError(
            f"prompt {short(prompt)} is refused by the tokenizer {tokenizer.name_or_path!r}: {error_line(error)}"
        ) from error
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text; a response must follow here
        ids.pop()
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(f"prompt {short(prompt)} has no tokens, and the tokenizer no token to begin a text with")
        ids = [start]
    return ids


def _rendered(tokenizer, messages: list[dict[str, Any]], options: dict[str, Any], called: bool):
    try:
        return apply_template(tokenizer, messages, **options)
    except ValueError:
        if not called:
            raise
        # A few templates (DeepSeek's) want the arguments of a call as JSON.
        return apply_template(tokenizer, [_arguments_as_json(message) for message in messages], **options)


def _arguments_as_json(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def short(value: Any, limit: int = 60) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
