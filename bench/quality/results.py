"""results.csv, a row a run, and curves.csv, a row for each judgement along one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from simct.files import replaced

from .runs import Key

KEY = Key._fields


class Results:
    """Both files of a folder, whole after every run."""

    def __init__(self, folder: Path) -> None:
        self.paths = folder / "results.csv", folder / "curves.csv"
        self.rows, self.curves = (_read(path) for path in self.paths)

    def has(self, key: Key) -> bool:
        return any(tuple(row[name] for name in KEY) == tuple(map(str, key)) for row in self.rows)

    def add(self, found: list[dict[str, Any]]) -> None:
        """What `run` returns."""
        for row in found:
            row = {name: _text(value) for name, value in row.items()}
            (self.curves if row.pop("curve") == "True" else self.rows).append(row)
        for path, rows in zip(self.paths, (self.rows, self.curves), strict=True):
            rows.sort(key=lambda row: ([row[name] for name in KEY], int(row.get("step", 0))))
            names = list(dict.fromkeys(name for row in rows for name in row))
            with replaced(path, newline="") as file:
                writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) and value else str(value)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
