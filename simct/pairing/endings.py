"""Which token ends the assistant's turn: read from the chat template, the generation config and the tokenizer."""

from collections.abc import Mapping, Sequence

import torch

from simct.pairing.templates import TemplateTimeout, apply_template
from simct.pairing.tokens import describe

# Used only without a generation config: some models say several of these within one answer (`<|end|>` after a thought).
_KNOWN_ENDINGS = (
    "<end_of_turn>",
    "<turn|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|return|>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
)
# What the end of the turn is among a unit's candidates: the mapped pair of ids, or the sums of all that may end one.
STOPS = ("pair", "class")
_PROBE = "simct probe of the assistant's turn"


def end_ids(tokenizer, generation_config=None, chat: bool = True) -> tuple[int, ...]:
    """Ids that end a response, the primary one (what ends the assistant's turn in the model's own chat template) first.

    Without a chat template, or with `chat=False`, the primary one is the first of the generation config's, then the tokenizer's
    `eos_token_id`, then the first known name among the special tokens. Empty if there is none at all. ValueError for a chat
    template that does not come to an end, and for an `eos_token_id` that is none.
    """
    special = _special(tokenizer)
    configured = getattr(generation_config, "eos_token_id", None)
    configured = [] if configured is None else list(configured) if isinstance(configured, Sequence) else [configured]
    if not all(isinstance(i, int) for i in configured):
        raise ValueError(f"eos_token_id of the generation configuration is {configured!r}: expected token ids")
    known = () if configured else known_ends(tokenizer)
    template = _template_ending(tokenizer, special)
    eos = tokenizer.eos_token_id
    plain = [*configured, *([] if eos is None else [eos])]
    ended = [] if template is None else [template]
    found = [*ended, *plain, *known] if chat else [*plain, *ended, *known]
    return tuple(dict.fromkeys(found))


def known_ends(tokenizer, first: Sequence[int] = ()) -> tuple[int, ...]:
    """`first`, and the ids of the special tokens that end a turn in one model or another, whatever this one's configuration says:
    an instruct model that reads plain text may end it with what ends a document."""
    special = _special(tokenizer)
    known = [name for name in _KNOWN_ENDINGS if name in special and not (name == "<|end|>" and "<|return|>" in special)]
    return tuple(dict.fromkeys([*first, *(special[name] for name in known)]))


def end_class(
    mapped: Mapping[int, int], student_ends: Sequence[int], teacher_ends: Sequence[int]
) -> tuple[dict[int, int], dict[str, torch.Tensor]]:
    """The mapped pairs of other tokens, and the one class of a SharedVocabulary that holds the ends of the turn: but what another
    token of the student is mapped to, which stays in its pair."""
    others = {student: teacher for student, teacher in mapped.items() if student not in student_ends}
    sides = {
        "student_classes": student_ends,
        "teacher_classes": [teacher for teacher in teacher_ends if teacher not in others.values()],
    }
    return others, {name: torch.tensor([(0, i) for i in ids], dtype=torch.int64) for name, ids in sides.items()}


def _special(tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _template_ending(tokenizer, special: dict[str, int]) -> int | None:
    """The special token right after an assistant message in the rendered chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
    try:
        rendered = apply_template(tokenizer, messages, tokenize=False)
    except TemplateTimeout as error:
        raise ValueError(f"{describe(tokenizer)}: {error}") from error
    except ValueError:  # it may refuse these messages: then the config decides
        return None
    _, found, rest = rendered.rpartition(_PROBE)
    rest = rest.lstrip()
    matches = [name for name in special if found and name and rest.startswith(name)]
    return special[max(matches, key=len)] if matches else None
