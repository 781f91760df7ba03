"""What each model reads before a response: a record's prompt, as one side wants it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from simct.data.prompts import Prompt, prompt_of, render_prompt

CONTEXT = "teacher_context"  # the column of what only the teacher sees


@dataclass(frozen=True)
class Renderer:
    """Renders records for one model, with its own template.

    `template_options` reach the chat template. A teacher's has two things that the student does not see: `system_prompt`, which
    takes the place of the record's own, and with `context=True` the record's `teacher_context`, after the last message.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_format: str = "auto"
    template_options: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    context: bool = False

    def __call__(self, record: dict[str, Any]) -> list[int]:
        """The token ids of the prompt. ValueError for a record without a prompt, or one that the tokenizer refuses."""
        prompt = prompt_of(record)
        extra = record.get(CONTEXT) if self.context else None
        if extra is not None and not isinstance(extra, str):
            raise ValueError(f"field {CONTEXT!r} is {extra!r}: expected text")
        if extra:
            prompt = _append(prompt, extra)
        if self.system_prompt:
            prompt = _under_system_prompt(prompt, self.system_prompt)
        return render_prompt(prompt, self.tokenizer, self.prompt_format, self.template_options)

    def check(self, side: str) -> None:
        """ValueError if the chat template loses what the user says (some want other field names, or keep only some roles)."""
        probe = "simct probe 4711 of the user"
        if self.prompt_format == "text" or not self.tokenizer.chat_template:
            return
        rendered = self({"prompt": probe})
        if probe not in self.tokenizer.decode(rendered):
            raise ValueError(
                f"the {side}'s chat template drops the prompt: expected {probe!r} in {self.tokenizer.decode(rendered)!r} "
                "(prompt_format='text' goes without a template)"
            )


def _append(prompt: Prompt, text: str) -> Prompt:
    if isinstance(prompt, str):
        return f"{prompt}\n\n{text}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{text}"}]


def _under_system_prompt(prompt: Prompt, text: str) -> Prompt:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": text}, *(m for m in messages if m["role"] != "system")]
