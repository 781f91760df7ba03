"""The results on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .goals import Goal
from .record import Row


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def rate(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value / 1e12:.2f} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def print_results(rows: Sequence[Row], console: Console) -> None:
    """One table for each case; ratios are to the case's first method that was measured."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.case, row.axis), []).append(row)
    for (suite, case, axis), group in groups.items():
        table = Table(title=f"{suite}: {case}" + (f", by {axis}" if axis else ""), title_justify="left")
        for name in (
            "method",
            "rows",
            "K",
            "pass",
            "median",
            "20 to 80 %",
            "time",
            "peak",
            "scratch",
            "useful",
            "loss",
        ):
            table.add_column(name, justify="left" if name in ("method", "pass", "loss") else "right")
        base: dict[tuple, Row] = {}
        for row in group:
            if row.note:
                cells = escape(row.method), str(row.student_rows or ""), str(row.shared or ""), ""
                table.add_row(*cells, f"[yellow]{escape(row.note)}[/]")
                continue
            first = base.setdefault((row.student_rows, row.shared, row.scope), row)
            agrees = f"[red]{row.agrees}[/]" if row.agrees.startswith("no") else row.agrees
            table.add_row(
                escape(row.method),
                str(row.student_rows or ""),
                str(row.shared or ""),
                "" if row.scope == "forward+backward" else row.scope,
                seconds(row.median_s),
                f"{seconds(row.p20_s)} to {seconds(row.p80_s)}",
                f"{row.median_s / first.median_s:.2f}x" if row is not first and row.form else "",
                size(row.peak_bytes),
                size(row.scratch_bytes),
                rate(row.flop_per_s, "FLOP/s") or rate(row.bytes_per_s, "B/s"),
                agrees,
            )
        console.print(table)


def print_goals(goals: Sequence[Goal], console: Console) -> None:
    table = Table(title="Goals", title_justify="left")
    for name in ("goal", "at", "measured", ""):
        table.add_column(name, justify="right" if name in ("at", "measured") else "left")
    for goal in goals:
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not measured[/]"}[goal.met]
        if goal.disturbed:
            verdict = "[yellow]not judged: the machine was busy with other work[/]"
        bound = f"{'at most' if goal.at_most else 'at least'} {goal.bound:g}"
        table.add_row(goal.text, bound, "" if goal.value is None else f"{goal.value:.3g}", verdict)
    console.print(table)


def print_dicts(title: str, rows: Sequence[dict], console: Console) -> None:
    """Any rows as they are, numbers to the right."""
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
