"""A result as a row of a table: what was run where, with which versions, and what came out."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from simct_kernels.options import LossOptions

from .cases import Case
from .floor import Cost
from .measure import Measured

PACKAGES = ("torch", "triton", "transformers", "trl", "liger_kernel", "cut_cross_entropy")
REPOSITORY = Path(__file__).parent.parent
# Relative difference at which two methods no longer compute the same, by the dtype of the inputs: in 16 bits the
# materialised methods round their logits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}


@dataclass
class Row:
    """One line of results.csv; docs/benchmarks.md says what the columns mean."""

    suite: str
    case: str
    method: str
    scope: str = "forward+backward"
    form: str = ""
    axis: str = ""
    dtype: str = ""
    beta: float | None = None
    top_k: int | None = None
    student_rows: int | None = None
    teacher_rows: int | None = None
    units: int | None = None
    student_vocabulary: int | None = None
    teacher_vocabulary: int | None = None
    student_width: int | None = None
    teacher_width: int | None = None
    shared: int | None = None
    repeats: int | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int | None = None
    floor_flops: int | None = None
    floor_bytes: int | None = None
    flop_per_s: float | None = None
    bytes_per_s: float | None = None
    rows_per_s: float | None = None
    loss: float | None = None
    gradient_norm: float | None = None
    agrees: str = ""
    other_load: float | None = None
    note: str = ""
    device: str = ""

    @property
    def key(self) -> tuple:
        """What other methods must agree with it on."""
        return self.suite, self.case, self.axis, self.student_rows, self.shared, self.dtype, self.beta, self.top_k

    @property
    def scratch_bytes(self) -> int | None:
        """Memory above inputs, weights and the gradients that are returned."""
        return None if self.peak_bytes is None else max(0, self.peak_bytes - (self.gradient_bytes or 0))


def timed(row: Row, seconds: Sequence[float], cost: Cost | None = None) -> Row:
    """The row with its times, and what they mean for the work of the floor."""
    p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    row = dataclasses.replace(row, repeats=len(seconds), median_s=median, p20_s=p20, p80_s=p80)
    if cost is not None:
        row.floor_flops, row.floor_bytes = cost.flops or None, cost.moved or None
        row.flop_per_s = cost.flops / median if cost.flops else None
        row.bytes_per_s = cost.moved / median if cost.moved else None
    if row.student_rows:
        row.rows_per_s = row.student_rows / median
    return row


def rows_of(suite: str, case: Case, method: str, options: LossOptions, measured: Measured | str) -> list[Row]:
    """The rows of one measurement: the two passes apart as well where a goal is about them; one with a note for none."""
    row = Row(
        suite,
        case.name,
        method,
        form=case.form,
        axis=case.axis,
        dtype=case.dtype,
        beta=options.beta,
        top_k=options.top_k,
        student_rows=case.rows,
        student_vocabulary=case.student.vocabulary,
        teacher_vocabulary=case.teacher.vocabulary,
        student_width=case.student.width,
        teacher_width=case.teacher.width,
        shared=case.shared,
    )
    note = measured if isinstance(measured, str) else measured.refused
    if note:
        return [dataclasses.replace(row, note=note)]
    for name in ("student_rows", "teacher_rows", "units", "shared", "device", "other_load"):
        setattr(row, name, getattr(measured, name))
    forward, backward = measured.floor
    whole = dataclasses.replace(
        row,
        peak_bytes=measured.peak_bytes,
        gradient_bytes=measured.gradient_bytes,
        loss=measured.loss,
        gradient_norm=measured.gradient_norm,
    )
    rows = [timed(whole, measured.total, forward + backward)]
    if case.form == "logits":
        after = [total - first for first, total in zip(measured.forward, measured.total, strict=True)]
        rows.append(timed(dataclasses.replace(row, scope="forward"), measured.forward, forward))
        rows.append(timed(dataclasses.replace(row, scope="backward"), after, backward))
    return rows


def judge(rows: Sequence[Row], comparable: set[str]) -> None:
    """Says of every row whether its loss and gradient are those of the first of its case, if it is `comparable`."""
    references: dict[tuple, Row] = {}
    for row in rows:
        if row.loss is None or row.method not in comparable:
            continue
        reference = references.setdefault(row.key, row)
        if reference is row:
            continue
        difference = max(
            abs(getattr(row, name) - getattr(reference, name)) / (abs(getattr(reference, name)) or 1.0)
            for name in ("loss", "gradient_norm")
        )
        row.agrees = "yes" if difference <= TOLERANCE[row.dtype] else f"no ({difference:.1e})"
        if not reference.agrees:
            reference.agrees = "reference"


@cache
def environment() -> dict[str, str]:
    """The columns that all rows of a run share."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "simct", "simct_kernels", "bench/*.py").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, rows: Sequence[dict]) -> None:
    """Beside its place, then renamed into it."""
    if not rows:
        return
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def as_dict(row: Row) -> dict:
    def short(value):
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {**environment(), **{key: short(value) for key, value in dataclasses.asdict(row).items()}}


def folder(device: str) -> Path:
    """Where the results of a device go: `$OUT` if it is set."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
