"""Which token ends the assistant's turn: read from the chat template, the generation config and the tokenizer."""

from collections.abc import Sequence

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
_PROBE = "simct probe of the assistant's turn"


def end_ids(tokenizer, generation_config=None, chat: bool = True) -> tuple[int, ...]:
    """Ids that end a response, the primary one (what ends the assistant's turn in the model's own chat template) first.

    Without a chat template, or with `chat=False`, the primary one is the first of the generation config's, then the tokenizer's
    `eos_token_id`, then the first known name among the special tokens. Empty if there is none at all. ValueError for a chat
    template that does not come to an end, and for an `eos_token_id` that is none.
    """
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    configured = getattr(generation_config, "eos_token_id", None)
    configured = [] if configured is None else list(configured) if isinstance(configured, Sequence) else [configured]
    if not all(isinstance(i, int) for i in configured):
        raise ValueError(f"eos_token_id of the generation configuration is {configured!r}: expected token ids")
    known = [] if configured else [special[name] for name in _KNOWN_ENDINGS if name in special]
    if "<|return|>" in special and not configured:
        known = [i for i in known if i != special.get("<|end|>")]
    template = _template_ending(tokenizer, special)
    eos = tokenizer.eos_token_id
    plain = [*configured, *([] if eos is None else [eos])]
    ended = [] if template is None else [template]
    found = [*ended, *plain, *known] if chat else [*plain, *ended, *known]
    return tuple(dict.fromkeys(found))


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
