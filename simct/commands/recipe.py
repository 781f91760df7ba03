"""The recipes that ship with the package: option files for `simct train --recipe` and its neighbours, by name.

A recipe is a YAML file in `simct/recipes/PAIR/`; its name is `PAIR/STEP`, such as `qwen2.5-7b_gemma-2-2b/distil`.
"""

import difflib
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from simct.secrets import shown_text

FOLDER = Path(__file__).parent.parent / "recipes"
OWN = "simct://"  # of a file in this package
STEPS = ("answers", "sft", "distil", "distil-public", "eval")  # in the order of the work
COMMANDS = {
    "answers": "simct answers",
    "sft": "trl sft --config",
    "distil": "simct train --recipe",
    "distil-public": "simct train --recipe",
    "eval": "simct eval",
}


def list_recipes() -> list[str]:
    """All names, pair by pair, in the order in which their steps are run."""
    names = [f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.yaml")]
    return sorted(names, key=lambda name: (_pair(name), STEPS.index(_step(name)) if _step(name) in STEPS else 99, name))


def find_recipe(name: str) -> Path:
    """The file of a recipe of this package, or a YAML file of the user's own by its path.

    Raises ValueError for any other name; the message names what there is.
    """
    known = list_recipes()
    if name in known:
        return FOLDER / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"recipe {name!r} does not exist{hint}: expected a YAML file or one of {', '.join(known)}")


def read_options(path: str | Path, kind: str = "recipe") -> dict[str, Any]:
    """The options in a YAML file by name. ValueError for a file that is no mapping, or that names an option twice; `kind` says in
    the message what the file is."""
    name = f"{kind} {str(path)!r}"
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_NoRepeats)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a number of 5,000 digits
        raise ValueError(f"{name} is not YAML: {shown_text(error)}") from None  # it quotes the file
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"{name} holds {type(options).__name__}: expected a mapping of options")
    options = {key: _ours(value) for key, value in options.items()}
    spelled = [key.replace("-", "_") for key in options]
    if twice := next((key for key in spelled if spelled.count(key) > 1), None):
        raise ValueError(f"{name}: option {twice!r} is there twice, with a dash and without")
    return options


def _ours(value: Any) -> Any:
    """A value with the path of a file that ships with this package, written `simct://demo/assets/student`."""
    if isinstance(value, str) and value.startswith(OWN):
        return str(FOLDER.parent / value.removeprefix(OWN))
    return value


def recipe_summary(path: str | Path) -> str:
    """The comment in a recipe's first line."""
    first = Path(path).read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def recipe_table() -> Table:
    """What `simct recipes` shows."""
    table = Table(
        title="Recipes, in the order of the work (simct recipes NAME: the file, whose first line says what it is)"
    )
    table.add_column("run")
    table.add_column("name", no_wrap=True)
    for _, names in groupby(list_recipes(), _pair):
        pair = list(names)
        runs = (COMMANDS.get(_step(name), "") for name in pair)
        table.add_row("\n".join(runs), "\n".join(pair), end_section=True)
    return table


def _pair(name: str) -> str:
    return name.split("/")[0]


def _step(name: str) -> str:
    return name.split("/")[-1]


class _NoRepeats(yaml.SafeLoader):
    """Refuses a key that comes twice: of two `units:` the file would silently mean the second."""

    def construct_mapping(self, node, deep=False):
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"option {key!r} is there twice")
        return super().construct_mapping(node, deep)
