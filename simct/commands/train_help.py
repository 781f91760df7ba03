"""`simct train --help`: what to start with; by group with `--help GROUP`, all of it with `--help all`."""

import dataclasses
import textwrap
from collections.abc import Iterator

from simct.training.groups import EXAMPLE, FIRST, GROUPS, HIDDEN
from simct.training.options import INHERITED as OF_TRAINER
from simct.training.options import SimCTOptions

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
    """ValueError for a topic that is none. Only the Trainer's own options wait for PyTorch."""
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
    if name == INHERITED:
        title, options = "Inherited from transformers.TrainingArguments", inherited_options()
    else:
        group = GROUPS[name]
        known = own_options()
        title, options = group.title, {option: known[option] for option in (*group.own, *group.inherited)}
    yield f"{title} ({name})"
    for option, (default, what, when) in options.items():
        yield f"  --{option}" + ("" if default is None else f"  [{default}]")
        yield from textwrap.wrap(what, 96, initial_indent="      ", subsequent_indent="      ")
        if when:
            yield from textwrap.wrap(f"Change it: {when}", 96, initial_indent="      ", subsequent_indent="      ")


def own_options() -> dict[str, tuple[object, str, str]]:
    """Of each option of a subject its default (None if there is none), what it is and when to change it. Without PyTorch."""
    from simct.commands.train import RunArguments

    found: dict[str, tuple[object, str, str]] = {}
    for field in (*dataclasses.fields(RunArguments), *dataclasses.fields(SimCTOptions)):
        what, when = field.metadata["help"].split("\n")
        found[field.name] = (None if field.default is dataclasses.MISSING else field.default, what, when)
    return {**found, **{name: tuple(inherited) for name, inherited in OF_TRAINER.items()}}


def inherited_options() -> dict[str, tuple[object, str, str]]:
    """The Trainer's other options, with the first sentences of what it says of them; without those that are deprecated, or have no
    meaning here."""
    from simct.training.config import SimCTConfig

    found, known = {}, own_options()
    for field in dataclasses.fields(SimCTConfig):
        text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
        if field.init and field.name not in known and field.name not in HIDDEN and "eprecated" not in text:
            default = None if field.default is dataclasses.MISSING else getattr(field.default, "value", field.default)
            found[field.name] = (default, textwrap.shorten(text, 400, placeholder=" ..."), "")
    return found
