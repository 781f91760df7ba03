"""The study's plots."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from .contrasts import by_seed, interval
from .show import title
from .study import Design, Rows, rates

SHOWN = {
    "accuracy": ("128 test sums right at 0.6, %", 100),
    "forward_kl_per_byte": ("forward KL on them, nats/byte", 1),
    "sums_ended": ("sums that end, %", 100),
}


def plot_curves(rows: Rows, curves: Rows, design: Design, path: Path) -> None:
    """The judges along training, at each arm's learning rate: mean over seeds in a band of its 95 % interval."""
    pairs = [pair for pair in design.pairs if by_seed(design, rows, pair, "sft", "accuracy")]
    if not pairs:
        return
    size = (4.6 * len(SHOWN), 3.2 * len(pairs))
    figure, axes = pyplot.subplots(len(pairs), len(SHOWN), figsize=size, squeeze=False, layout="constrained")
    for line, pair in zip(axes, pairs, strict=True):
        for axis, (judge, (label, factor)) in zip(line, SHOWN.items(), strict=True):
            for number, arm in enumerate(design.all_arms()):
                rate, seeds = rates(design, rows, pair, arm)[1], by_seed(design, rows, pair, arm, "accuracy")
                own = [
                    row
                    for row in curves
                    if (row["pair"], row["arm"], row["split"]) == (pair, arm, "test")
                    and float(row["learning_rate"]) == rate
                    and row["seed"] in seeds
                ]
                if not own:
                    continue
                steps = sorted({int(row["step"]) for row in own})
                values = [[factor * float(row[judge]) for row in own if int(row["step"]) == step] for step in steps]
                found = [interval(value) for value in values]
                axis.plot(steps, [mean for mean, _ in found], color=f"C{number}", label=title(arm), lw=1.6)
                low, high = ([mean + sign * half for mean, half in found] for sign in (-1, 1))
                if factor == 100:  # shares
                    low, high = ([min(100.0, max(0.0, value)) for value in band] for band in (low, high))
                axis.fill_between(steps, low, high, color=f"C{number}", alpha=0.13, lw=0)
            axis.set_title(f"{pair}: {label}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.set_ylim(0, 103 if judge == "sums_ended" else None)
    for axis in axes[-1]:
        axis.set_xlabel("steps")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def plot_rates(rows: Rows, design: Design, path: Path) -> None:
    """What each learning rate does: seed 0, validation sums."""
    chosen = [row for row in rows if row["split"] == "validation"]
    pairs = [pair for pair in design.pairs if any(row["pair"] == pair for row in chosen)]
    if not pairs:
        return
    figure, axes = pyplot.subplots(1, len(pairs), figsize=(4 * len(pairs), 3.4), squeeze=False, layout="constrained")
    for axis, pair in zip(axes[0], pairs, strict=True):
        for number, arm in enumerate(design.all_arms()):
            own = sorted((float(r["learning_rate"]), float(r["accuracy"]), float(r["accuracy_stderr"]))
                         for r in chosen if (r["pair"], r["arm"]) == (pair, arm))  # fmt: skip
            if own:
                x, y, errors = zip(*own, strict=True)
                y, errors = ([100 * value for value in values] for values in (y, errors))
                axis.errorbar(x, y, errors, color=f"C{number}", capsize=2, label=title(arm))
        axis.set_xscale("log")
        axis.set_title(f"{pair}: validation sums right at 0.6, %", fontsize=10)
        axis.set_xlabel("learning rate")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
