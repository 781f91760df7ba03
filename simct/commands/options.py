"""The options of a command: from its command line, over those of a YAML file (`--config`), over those of a recipe (`--recipe`)."""

import argparse
import difflib
import json
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from simct.commands.recipe import find_recipe, read_options
from simct.console import UsageError
from simct.secrets import shown_text, shown_value

FILES = ("recipe", "config")  # weakest first


class OptionParser(HfArgumentParser):
    """Dataclasses as options. Its errors are `UsageError`, on one line; a file's values are checked as those of the command line.

    (The parser of transformers reads a YAML file or a command line, not one over the other, and takes a file's values unchecked.)
    """

    def __init__(self, dataclasses, **kwargs) -> None:
        super().__init__(dataclasses, allow_abbrev=False, **kwargs)
        self.add_argument("--recipe", help="a recipe of this package (simct recipes), weaker than --config")
        self.add_argument("--config", help="YAML file with any of these options; the command line takes precedence")

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """The dataclasses, and a namespace with the options of no dataclass. ValueError or UsageError names the option."""
        given: dict[str, Any] = {}
        for source, options in option_files(argv):
            given.update(self._checked(source, options))
        for action in self._actions:
            if given.get(action.dest) is not None:  # an option that a file names without a value has its default
                action.default, action.required = given[action.dest], False
        *found, rest = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if rest:
            raise UsageError(
                f"unrecognized arguments: {shown_text(' '.join(rest))}"
                f"{self._near(rest[0].lstrip('-').split('=')[0], '--')}"
            )
        return tuple(found)

    def error(self, message: str) -> None:
        raise UsageError(message)

    def _checked(self, source: str, options: dict[str, Any]) -> dict[str, Any]:
        """A file's options as values of the parser's."""
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # of an option and its no_option the first is the option
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        found = {}
        for given, value in options.items():
            name = given.replace("-", "_")
            if name in FILES:
                raise ValueError(f"{source} names a {name}: expected --{name} on the command line")
            if name not in actions or name == "help":
                raise ValueError(f"{source}: {given!r} is no option of {self.prog}{self._near(name)}")
            if value is not None:
                value = _typed(actions[name], f"{source}: {given}", value, _takes(list, hints.get(name)))
            found[name] = value
        return found

    def _near(self, name: str, dashes: str = "") -> str:
        known = [action.dest for action in self._actions]
        close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
        return f" (did you mean {dashes}{close[0]}?)" if close else ""


def option_files(argv: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The files that a command line names, weakest first: what each is called, and its options."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in FILES:
        finder.add_argument(f"--{name}")
    try:
        given, _ = finder.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(error) from error
    found = []
    if given.recipe is not None:
        found.append((f"recipe {given.recipe!r}", read_options(find_recipe(given.recipe))))
    if given.config is not None:
        if not Path(given.config).exists():
            raise ValueError(f"config file {given.config!r} does not exist")
        found.append((f"config file {given.config!r}", read_options(given.config, "config file")))
    return found


def _typed(action: argparse.Action, name: str, value: Any, takes_list: bool) -> Any:
    """A file's value as the command line would give it. ValueError if it could not."""
    if isinstance(value, list):
        if not takes_list:
            raise ValueError(f"{name} is {shown_value(name, value)}: expected one value")
        return [_one(action, name, item) for item in value]
    if isinstance(value, dict):
        if action.type is not str:
            raise ValueError(f"{name} is {shown_value(name, value)}: expected one value")
        try:
            return json.dumps(value)
        except (TypeError, ValueError) as error:  # a date, or an alias of itself
            raise ValueError(f"{name} is {shown_value(name, value)}: expected what JSON can say ({error})") from None
    found = _one(action, name, value)
    return [found] if action.nargs == "+" else found


def _one(action: argparse.Action, name: str, value: Any) -> Any:
    kind = action.type or str
    try:
        if isinstance(value, (list, dict)):
            raise ValueError
        found = kind(str(value))
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        expected = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
        raise ValueError(
            f"{name} is {shown_value(name, value)}: expected {expected.get(kind.__name__, 'text')}"
        ) from None
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(map(str, action.choices))}")
    return found


def _takes(kind: type, hint: Any) -> bool:
    """Whether a type hint allows for values of that kind."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes(kind, part) for part in get_args(hint))
    return (get_origin(hint) or hint) is kind
