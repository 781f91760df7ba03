"""`simct train --help`: what to start with; by group with `--help GROUP`, all of it with `--help all`."""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator

from simct.training.groups import EXAMPLE, FIRST, GROUPS, HIDDEN

INHERITED = "transformers"


def asked(argv: list[str]) -> str | None:
    """What help a command line asks for: "" for the first page, a group's name, "all"; None if it asks for none."""
    for place, word in enumerate(argv):
        if word in ("-h", "--help"):
            following = argv[place + 1 : place + 2]
            return following[0] if following and not following[0].startswith("-") else ""
        if word.startswith("--help="):
            return word.removeprefix("--help=")
    return None


def help_text(topic: str) -> str:
    """ValueError for a topic that is none. Only the first page does without PyTorch."""
    if not topic:
        return "\n".join(first_page())
    names = (*GROUPS, INHERITED, "all")
    if topic not in names:
        raise ValueError(f"--help is {topic!r}: expected one of {', '.join(names)}")
    shown = names[:-1] if topic == "all" else (topic,)
    return "\n\n".join("\n".join(group_page(name)) for name in shown)


def first_page() -> Iterator[str]:
    yield "usage: simct train --student MODEL --teacher MODEL --data FILE --output_dir FOLDER [options]"
    yield ""
    yield "Distils a teacher into a student with another tokenizer. To start with:"
    yield ""
    for name, value, text in FIRST:
        yield f"  {f'--{name} {value}'.rstrip():<34} {text}"
    yield ""
    yield "Example:"
    yield from (f"  {line}" for line in EXAMPLE)
    yield ""
    yield "All options by subject (simct train --help SUBJECT, or --help all):"
    yield ""
    for name, group in GROUPS.items():
        first = ", ".join(group.own[:3])
        yield f"  {name:<13} {group.title}: {first}{' ...' if len(group.own) > 3 else ''}"
    yield f"  {INHERITED:<13} everything else of transformers.TrainingArguments"


def group_page(name: str) -> Iterator[str]:
    fields = options()
    grouped = [option for group in GROUPS.values() for option in (*group.own, *group.inherited)]
    if name == INHERITED:
        title = "Inherited from transformers.TrainingArguments"
        members: Iterable[str] = [option for option in fields if option not in grouped and option not in HIDDEN]
    else:
        group = GROUPS[name]
        title, members = group.title, (*group.own, *group.inherited)
    yield f"{title} ({name})"
    for option in members:
        default, text = fields[option]
        yield f"  --{option}" + ("" if default is None else f"  [{default}]")
        yield from textwrap.wrap(text, 96, initial_indent="      ", subsequent_indent="      ")


def options() -> dict[str, tuple[object, str]]:
    """Of each option its default (None if there is none) and the first sentences of what it is."""
    from simct.commands.train import RunArguments
    from simct.training.config import SimCTConfig

    found = {}
    for field in (*dataclasses.fields(RunArguments), *dataclasses.fields(SimCTConfig)):
        if field.init:
            text = " ".join(str(field.metadata.get("help", "")).split())
            default = None if field.default is dataclasses.MISSING else getattr(field.default, "value", field.default)
            found[field.name] = (default, textwrap.shorten(text, 400, placeholder=" ..."))
    return found
