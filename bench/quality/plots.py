"""The study's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from .means import mean_with_error
from .show import COMPARED, JUDGES, Summary, tested, title


def plot_summary(summary: Summary, settings: list[str], path: Path) -> None:
    """Each judge of each arm, setting by setting, with its standard error."""
    arms = list(dict.fromkeys(arm for _, arm in summary))
    size = (5 * len(COMPARED), (0.6 + 0.28 * len(arms)) * len(settings))
    figure, axes = pyplot.subplots(len(settings), len(COMPARED), figsize=size, squeeze=False, layout="constrained")
    for line, setting in zip(axes, settings, strict=True):
        own = [arm for arm in arms if (setting, arm) in summary]
        for axis, judge in zip(line, COMPARED, strict=True):
            means, errors = zip(*(summary[setting, arm][judge] for arm in own), strict=True)
            colours = [
                "gray" if arm == "none" else "tab:blue" if arm.startswith("strict") else "tab:orange" for arm in own
            ]
            axis.barh(range(len(own)), means, xerr=errors, color=colours, ecolor="black", capsize=2)
            axis.set_yticks(range(len(own)), [title(arm) for arm in own] if axis is line[0] else [])
            axis.invert_yaxis()
            axis.set_title(f"{setting}: {JUDGES[judge][0]}", fontsize=10)
            axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_curves(
    results: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    settings: list[str],
    arms: list[str],
    path: Path,
    rate: float | None = None,
) -> None:
    """What a collapse shows in, along training, at a learning rate (each arm's best if none is given): means over seeds, each in a
    band of its standard error."""
    shown = {
        "reverse_kl_per_byte": "reverse KL, nats/byte",
        "response_whitespace": "white space",
        "response_length": "response length, tokens",
        "response_ended": "ended",
    }
    figure, axes = pyplot.subplots(
        len(settings), len(shown), figsize=(4.5 * len(shown), 3 * len(settings)), squeeze=False, layout="constrained"
    )
    for line, setting in zip(axes, settings, strict=True):
        for axis, (name, label) in zip(line, shown.items(), strict=True):
            for number, arm in enumerate(arms):
                runs = {(row["learning_rate"], row["seed"]) for row in tested(results, setting, arm, rate)}
                own = [
                    row
                    for row in curves
                    if (row["setting"], row["arm"], row["split"]) == (setting, arm, "test")
                    and (row["learning_rate"], row["seed"]) in runs
                    and row.get(name)
                ]
                steps = sorted({int(row["step"]) for row in own})
                found = [mean_with_error([float(r[name]) for r in own if int(r["step"]) == step]) for step in steps]
                style, colour = "-" if number < 10 else "--", f"C{number % 10}"
                axis.plot(steps, [mean for mean, _ in found], style, color=colour, label=title(arm))
                low, high = ([m + sign * e for m, e in found] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            axis.set_title(f"{setting}: {label}", fontsize=10)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def plot_rates(results: list[dict[str, Any]], settings: list[str], arms: list[str], path: Path) -> None:
    """What each learning rate of the grid does: one seed, validation prompts; the error is over prompts."""
    figure, axes = pyplot.subplots(
        len(settings),
        len(COMPARED),
        figsize=(5 * len(COMPARED), 3 * len(settings)),
        squeeze=False,
        layout="constrained",
    )
    for line, setting in zip(axes, settings, strict=True):
        for axis, judge in zip(line, COMPARED, strict=True):
            for number, arm in enumerate(arms):
                own = [r for r in results if (r["setting"], r["arm"], r["split"]) == (setting, arm, "validation")]
                own.sort(key=lambda row: float(row["learning_rate"]))
                rates, means, errors = (
                    [float(row[name]) for row in own] for name in ("learning_rate", judge, f"{judge}_stderr")
                )
                style = "-" if number < 10 else "--"
                axis.errorbar(rates, means, errors, ls=style, color=f"C{number % 10}", capsize=2, label=title(arm))
            axis.set_xscale("log")
            ticks = sorted({float(row["learning_rate"]) for row in results if row["split"] == "validation"} - {0.0})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.set_title(f"{setting}: {JUDGES[judge][0]}", fontsize=10)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
