"""Files that are there whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replaced(path: str | Path, **options) -> Iterator[TextIO]:
    """A text file (UTF-8) to write, renamed into its place at the end: a run that dies leaves the old file, or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", **options) as target:
            yield target
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, **options) -> None:
    with replaced(path, errors="surrogatepass") as target:
        json.dump(content, target, **{"indent": 1, "default": str, **options})
        target.write("\n")


def check_file(path: str | Path) -> None:
    """ValueError unless the file could be written; its folder is made if it is not there."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}")
        with probe.open("w"):
            pass
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output {str(path)!r} cannot be written: {error}") from error
