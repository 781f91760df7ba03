"""Prompts: taken from a record (`records` reads those), and rendered for one model with that model's own chat template.

A record has a `prompt`: a string, or a list of messages (`{"role": ..., "content": ...}`) that ends with the user's turn. A record
with `messages` instead is a whole conversation; its last assistant turn, if it ends with one, is left out.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from simct.console import error_line
from simct.pairing.templates import apply_template

Prompt = str | list[dict[str, str]]
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
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"field {name!r}, message {i} is {short(message)}: expected strings 'role' and 'content'")
    # A table gives every message every key that one of them has: templates would take an empty one for given.
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


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

    Raises ValueError for an unknown format, a missing template, or a prompt that the template or the tokenizer refuses.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"prompt_format is {prompt_format!r}: expected one of {', '.join(PROMPT_FORMATS)}")
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise ValueError(f"prompt_format is 'chat', but the tokenizer {tokenizer.name_or_path!r} has no chat template")
    chat = prompt_format != "text" and tokenizer.chat_template
    try:
        if chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            options = {"add_generation_prompt": True, "return_dict": True, **(template_options or {})}
            return list(apply_template(tokenizer, messages, **options)["input_ids"])
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


def short(value: Any, limit: int = 60) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
