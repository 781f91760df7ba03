"""What a step is: a list of items, worked through in order. And the table of the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import rows

# Seconds of a step when the whole run has nine minutes; what one leaves over is the later ones'. The first one
# pays for the first import of torch from a cold disk.
STEPS = {"device": 60, "oracle": 100, "tests": 110, "memcheck": 100, "profile": 60, "bench": 140, "step": 70}
EXTRA = {"sweep": 100, "study": 480}  # those that run only if they are named
TOGETHER = {"oracle", "tests", "memcheck"}  # they measure no time: side by side they take as long as the longest
# Processes among which a step's items are dealt out: the oracle waits for one compilation after the other.
SHARDS = {"oracle": 4}


@dataclass(frozen=True)
class Item:
    name: str
    run: Callable[[], object]
    seconds: float = 30.0  # after which it is given up


@dataclass
class Run:
    """What a step's items are given."""

    step: str
    folder: Path  # of the results
    device: str  # "cuda", or "cpu" in a rehearsal
    end: float  # time.time() at which the step must be done
    rehearse: bool = False
    cases: tuple[str, ...] = ()  # only cases and methods with one of these in their names; none: all
    methods: tuple[str, ...] = ()
    item: str = field(default="", init=False)

    def left(self) -> float:
        return self.end - time.time()

    def record(self, **row: Any) -> None:
        row = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        rows.append(self.folder / rows.NAME, {"step": self.step, "item": self.item, **row})

    def known(self, step: str) -> list[dict[str, Any]]:
        """The rows that an earlier step left."""
        return [row for row in rows.read(self.folder / rows.NAME) if row["step"] == step]

    def chooses(self, name: str, among: tuple[str, ...]) -> bool:
        return not among or any(part in name for part in among)
