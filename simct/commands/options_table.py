"""The options of a run that differ from the defaults, as a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from simct.console import printable
from simct.secrets import NAMES, redact, without_secrets


def options_table(run, config, recipe: Mapping[str, Any]) -> Table:
    """The options that differ from the defaults, and whether the recipe or the command line set them."""
    table = Table(title="Options that differ from the defaults")
    for column in "option", "value", "default", "set by":
        table.add_column(column, overflow="fold")
    default = type(config)(output_dir=config.output_dir, use_cpu=config.use_cpu)
    rows = [(field.name, getattr(run, field.name), field.default) for field in dataclasses.fields(run)]
    rows += [
        (field.name, getattr(config, field.name), getattr(default, field.name))
        for field in dataclasses.fields(config)
        if field.init and field.name not in NAMES
    ]
    for name, value, usual in rows:
        if name == "activation_checkpointing" and value == config.gradient_checkpointing:
            continue  # the same option under its new name
        needed = usual is dataclasses.MISSING
        if not needed and value == usual and not (name == "output_dir" and name in recipe):
            continue
        given = recipe.get(name)
        origin = "recipe" if name in recipe and _same(value, given) else "command line"
        if name in config.unsaid:
            origin = "chosen by the device"
        if origin == "command line" and name in recipe:
            origin += f" (recipe: {_show(without_secrets(name, given))})"
        shown = redact(_show(without_secrets(name, value)))
        row = (name, shown, "" if needed else _show(usual), redact(origin))
        table.add_row(*(Text(printable(text)) for text in row))
    return table


def _same(value, given) -> bool:
    return _show(value) == _show(given) or (isinstance(value, float) and _number(given) == value)


def _number(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _show(value) -> str:
    return str(getattr(value, "value", value))
