"""Rows of results: a JSON object a line, written the moment it is known. And errors, said in few words."""

from __future__ import annotations

import csv
import json
import math
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "rows.jsonl"
REPOSITORY = Path(__file__).parent.parent.parent
OURS = re.compile(re.escape(f"{REPOSITORY}/") + r"((?:simct_kernels|simct|bench|tests)/.+)")
OUT_OF_MEMORY, MISSING, FAILED = "out of memory", "missing", "failed"


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a process that dies may leave half of one."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows in one table: a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def status_of(error: BaseException) -> str:
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    return MISSING if isinstance(error, ImportError) else FAILED


def short(error: BaseException, length: int = 400) -> str:
    """The error in one line. A compiler's message has its reason at the end, most others at the beginning."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    if status_of(error) == OUT_OF_MEMORY and (asked := re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))):
        return f"asked for {asked[1]}"
    text = " | ".join(lines[:1] + lines[-1:] if len(lines) > 3 else lines)
    if error.__cause__ is not None:  # Triton's errors name the kernel's line, their cause what is wrong with it
        text += f" <- {short(error.__cause__, length)}"
    return f"{type(error).__name__}: {text}"[:length]


def where(error: BaseException) -> str:
    """The last line of this repository that it passed."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if OURS.match(frame.filename)]
    return f"{OURS.match(ours[-1].filename)[1]}:{ours[-1].lineno}" if ours else ""


def breaks_device(error: BaseException | str) -> bool:
    """After an illegal access, say, every later call of the process on the device fails too."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return bool(re.search(r"CUDA error|HIP error|AcceleratorError|CUBLAS_STATUS_EXECUTION|Triton Error \[CUDA\]", text))
