"""What each model reads before a response: a record's prompt, as one side wants it."""

import re
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from simct.data.prompts import Prompt, prompt_of, render_prompt, tools_of

CONTEXT = "teacher_context"  # the column of what only the teacher sees
PROBE = "simct probe 4711 of the user"
THINKING = "enable_thinking"  # the option of those templates (Qwen3, SmolLM3 ...) that have one
# How templates write the beginning and the end of a thought.
THOUGHTS = (
    (r"<([a-z_:]*(?:think|thought|reason)[a-z_:]*)>", r"</\1>"),
    (r"\[(THINK)\]", r"[/\1]"),
    (r"<\|START_(THINKING)\|>", r"<|END_\1|>"),
    (r"<\|begin_of_(thought)\|>", r"<|end_of_\1|>"),
    (r"<\|channel\|>(analysis)<\|message\|>", "<|end|>"),
)


@dataclass
class Renderer:
    """Renders records for one model, with its own template.

    `template_options` reach the chat template. A teacher's has two things that the student does not see: `system_prompt`, which
    takes the place of the record's own, and with `context=True` the record's `teacher_context`, after the last message.
    `longest`: tokens of the longest prompt so far.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_format: str = "auto"
    template_options: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    context: bool = False
    longest: int = field(default=0, init=False)

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
        tools = tools_of(record)
        options = self.template_options if tools is None else {**self.template_options, "tools": tools}
        ids = render_prompt(prompt, self.tokenizer, self.prompt_format, options)
        self.longest = max(self.longest, len(ids))
        return ids

    def check(self, side: str) -> None:
        """ValueError if the chat template loses what the user says (some want other field names, or keep only some roles)."""
        if not self._has_template:
            return
        rendered = self.tokenizer.decode(self({"prompt": PROBE}))
        if PROBE not in rendered:
            raise ValueError(
                f"the {side}'s chat template drops the prompt: expected {PROBE!r} in {rendered!r} "
                "(prompt_format='text' goes without a template)"
            )

    @property
    def _has_template(self) -> bool:
        return self.prompt_format != "text" and bool(self.tokenizer.chat_template)

    @property
    def reads_thinking(self) -> bool:
        """Whether the template asks for `enable_thinking`."""
        return self._has_template and THINKING in str(self.tokenizer.chat_template)

    @property
    def opened_thought(self) -> str | None:
        """What begins the thought that the prompt ends in; None if it ends in none."""
        if not self._has_template:
            return None
        behind = self.tokenizer.decode(self({"prompt": PROBE})).rpartition(PROBE)[2]
        for begin, end in THOUGHTS:
            *_, last = (None, *re.finditer(begin, behind))
            if last is not None and last.expand(end) not in behind[last.end() :]:
                return last[0]
        return None

    @property
    def thinks(self) -> bool:
        """Whether the model is asked to think before it answers, as far as its template can say so."""
        return bool(self.template_options.get(THINKING)) if self.reads_thinking else self.opened_thought is not None

    def with_thinking(self, like: "Renderer | None" = None) -> "Renderer":
        """The same with `enable_thinking` said, where its template asks for it and nobody has: as `like` does it, or without one as
        the template would by itself."""
        if not self.reads_thinking or THINKING in self.template_options:
            return self
        if like is not None:
            value = like.thinks
        else:
            value = self({"prompt": PROBE}) == self._thinking(True)({"prompt": PROBE})
        return self._thinking(value)

    def _thinking(self, value: bool) -> "Renderer":
        return replace(self, template_options={**self.template_options, THINKING: value})


def compare_thoughts(student: Renderer, teacher: Renderer) -> None:
    """Warns if one model is asked to think where the other is not: the teacher would score answers as thoughts, or the reverse."""
    begun = [side.opened_thought for side in (student, teacher)]
    if bool(begun[0]) == bool(begun[1]) and student.thinks == teacher.thinks:
        return
    said = [
        f"opens a thought ({beginning})" if beginning else "asks for thoughts" if side.thinks else "does not"
        for side, beginning in zip((student, teacher), begun, strict=True)
    ]
    names = [
        name
        for name, side in (("chat_template_kwargs", student), ("teacher_chat_template_kwargs", teacher))
        if side.reads_thinking
    ]
    way = f"the same {THINKING} in {' and '.join(names)}" if names else "templates that agree"
    if begun[0] or student.thinks:
        first, second = f"the student's chat template {said[0]}", f"the teacher's {said[1]}"
    else:
        first, second = f"the teacher's chat template {said[1]}", f"the student's {said[0]}"
    warnings.warn(
        f"{first}, {second}: the teacher would score responses as what they are not; expected {way}", stacklevel=3
    )


def _append(prompt: Prompt, text: str) -> Prompt:
    if isinstance(prompt, str):
        return f"{prompt}\n\n{text}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{text}"}]


def _under_system_prompt(prompt: Prompt, text: str) -> Prompt:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": text}, *(m for m in messages if m["role"] != "system")]
