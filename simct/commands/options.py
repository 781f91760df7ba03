"""Options from YAML files, put before those of the command line."""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml


def with_option_files(argv: list[str], positional: str | None = None) -> list[str]:
    """The command line with the options of `--recipe NAME` and `--config FILE.yaml` put before it, so that its own win (and a
    config file's over a recipe's). `positional`: the option that the command takes as a word without a name.

    ValueError for a recipe that does not exist, a file that is no mapping.
    """
    files, rest = option_files(argv)
    options: dict[str, Any] = {}
    for found in files:
        options.update(found)
    words = []
    if positional in options:
        value = str(options.pop(positional))
        if not rest or rest[0].startswith("-"):
            words.append(value)
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    # A word without a name comes first: after a list of values it would be one of them.
    named = [] if not words or words[0].startswith("-") else [words.pop(0)]
    leading = [rest.pop(0)] if positional and rest and not rest[0].startswith("-") else []
    return [*named, *leading, *words, *rest]


def option_files(argv: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The options in the files that a command line names, weakest first, and the command line without them."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(argv)
    files = []
    if found.recipe is not None:
        from simct.commands.recipe import find_recipe, recipe_options

        files.append(recipe_options(find_recipe(found.recipe)))
    if found.config is not None:
        files.append(_read(found.config))
    return files, rest


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"config file {path!r} does not exist")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path!r} is not YAML: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"config file {path!r} holds {type(options).__name__}: expected a mapping of options")
    return options
