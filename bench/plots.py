"""The results as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from .record import Row

PASS = "forward+backward"


def scaling(rows: Sequence[Row], path: Path) -> bool:
    """Time and memory against rows and against K. False if there is nothing to draw."""
    measured = [row for row in rows if row.axis and row.median_s is not None]
    if not measured:
        return False
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    reads: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("seconds, forward and backward", lambda row: row.median_s),
        ("GB above inputs and weights", lambda row: row.peak_bytes / 1e9),
    )
    for column, (axis, label) in enumerate((("rows", "student rows"), ("shared", "shared vocabulary K"))):
        for line, (title, read) in enumerate(reads):
            draw(axes[line][column], [row for row in measured if row.axis == axis], axis, label, title, read)
    figure.suptitle(f"{measured[0].case}, {measured[0].dtype}; {measured[0].device}")
    return _save(figure, path)


def draw(plot: Axes, rows: Sequence[Row], axis: str, label: str, title: str, read: Callable[[Row], float]) -> None:
    for method in dict.fromkeys(row.method for row in rows):
        line = [row for row in rows if row.method == method]
        at = [row.student_rows if axis == "rows" else row.shared for row in line]
        points = plot.plot(at, [read(row) for row in line], marker="o", label=method)
        if title.startswith("seconds"):
            spread = [row.p20_s for row in line], [row.p80_s for row in line]
            plot.fill_between(at, *spread, color=points[0].get_color(), alpha=0.2)
    plot.set(xlabel=label, ylabel=title, xscale="log", yscale="log")
    ticks = sorted({row.student_rows if axis == "rows" else row.shared for row in rows})
    plot.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    plot.minorticks_off()
    plot.grid(alpha=0.3)
    if rows:
        plot.legend()


def comparison(rows: Sequence[Row], path: Path) -> bool:
    """Time and memory of the methods of each case, side by side."""
    measured = [row for row in rows if row.suite == "kernels" and row.scope == PASS and row.median_s and row.peak_bytes]
    cases = list(dict.fromkeys(row.case for row in measured))
    if not cases:
        return False
    sizes = [sum(row.case == case for row in measured) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases), 2, figsize=(12, 0.5 * sum(sizes) + 0.9 * len(cases)), squeeze=False, constrained_layout=True,
        gridspec_kw={"height_ratios": [size + 1 for size in sizes]},
    )  # fmt: skip
    for (left, right), case in zip(axes, cases, strict=True):
        group = [row for row in measured if row.case == case][::-1]
        names = [row.method for row in group]
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        left.barh(names, [row.median_s for row in group], color=colours)
        right.barh(names, [row.scratch_bytes / 1e9 for row in group], color=colours)
        left.set(title=f"{case}, {group[0].student_rows} rows, {group[0].dtype}", xlabel="seconds")
        right.set(title="memory above inputs, weights and gradients", xlabel="GB", yticks=[])
    figure.suptitle(measured[0].device)
    return _save(figure, path)


def ceilings(rows: Sequence[Row], path: Path) -> bool:
    """What each method makes of the floor's work, beside the measured copy and matrix product."""
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7), constrained_layout=True)
    drawn = False
    kinds = (
        ("flop_per_s", "product", "useful GFLOP/s: the products of the floor, by time", ("linear", "served", "text")),
        ("bytes_per_s", "copy", "useful GB/s: the bytes of the floor, by time", ("logits",)),
    )
    for plot, (name, ceiling, title, forms) in zip(axes, kinds, strict=True):
        top = next((row for row in rows if row.case == "ceiling" and row.method.startswith(ceiling)), None)
        group = [
            row for row in rows
            if row.suite == "kernels" and row.form in forms and getattr(row, name)
        ][::-1]  # fmt: skip
        labels = [f"{row.case}: {row.method}" + ("" if row.scope == PASS else f", {row.scope}") for row in group]
        rates = [getattr(row, name) / 1e9 for row in group]
        bars = plot.barh(labels, rates, color="tab:blue")
        plot.set(title=title)
        plot.tick_params(axis="y", labelsize=7)
        if top is not None:
            limit = getattr(top, name) / 1e9
            plot.axvline(limit, color="tab:red", label=f"measured {top.method}")
            plot.bar_label(bars, [f" {100 * rate / limit:.1f} %" for rate in rates], fontsize=7)
            plot.legend(loc="lower right")
        drawn |= bool(group)
    figure.suptitle(next((row.device for row in rows if row.device), ""))
    return _save(figure, path) if drawn else False


def _save(figure, path: Path) -> bool:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
