"""The study's tables and plots: means over seeds with their standard errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from rich.table import Table

from .arms import ARMS
from .means import mean_with_error

JUDGES = {  # name: title, format, whether more is better (None: neither)
    "reverse_kl_per_byte": ("reverse KL, nats/byte", ".3f", False),
    "forward_kl_per_byte": ("forward KL, nats/byte", ".3f", False),
    "accuracy": ("sums right", ".1%", True),
    "entropy": ("entropy, nats/byte", ".3f", None),
    "response_bytes": ("bytes", ".1f", None),
    "ended": ("ended", ".1%", None),
    "whitespace": ("white space", ".1%", None),
}
COMPARED = "reverse_kl_per_byte", "forward_kl_per_byte", "accuracy"
Summary = dict[tuple[str, str], dict[str, Any]]


def summarize(rows: list[dict[str, Any]], settings: list[str], arms: list[str]) -> Summary:
    """By setting and arm: for each judge (mean over seeds, standard error of it), the seeds and the learning rate. Arm "none" is
    the student before, whose error is that over prompts."""
    found: Summary = {}
    for setting in settings:
        for arm in ("none", *arms):
            own = [r for r in rows if (r["setting"], r["arm"], r["split"]) == (setting, arm, "test")]
            if not own:
                continue
            means: dict[str, Any] = {"seeds": len(own), "learning_rate": own[0]["learning_rate"]}
            for name in JUDGES:
                values = [float(row[name]) for row in own]
                if arm == "none":
                    means[name] = values[0], float(own[0][f"{name}_stderr"])
                else:
                    means[name] = mean_with_error(values)
            for name in ("tokens_single", "tokens_longer"):
                values = [float(row[name]) for row in own if row.get(name)]
                means[name] = sum(values) / len(values) if values else math.nan
            found[setting, arm] = means
    return found


def differences(rows: list[dict[str, Any]], setting: str, arm: str, baseline: str) -> list[str]:
    """Of each of COMPARED, `arm` less `baseline`: mean over seeds ± standard error. The same seed has the same prompts in the same
    order in both, so that what the seeds have in common cancels."""
    by_seed: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if (row["setting"], row["split"]) == (setting, "test") and row["arm"] in (arm, baseline):
            by_seed.setdefault(row["seed"], {})[row["arm"]] = row
    both = [pair for pair in by_seed.values() if len(pair) == 2]
    found = []
    for name in COMPARED:
        mean, error = mean_with_error([float(pair[arm][name]) - float(pair[baseline][name]) for pair in both])
        form = JUDGES[name][1]
        found.append(f"{mean:+{form}} ± {error:{form}}")
    return found


def title(arm: str) -> str:
    return "before training" if arm == "none" else ARMS[arm].title


def cells(means: dict[str, Any]) -> list[str]:
    return [f"{means[n][0]:{form}} ± {means[n][1]:{form}}" for n, (_, form, _) in JUDGES.items()]


def table(summary: Summary, setting: str) -> Table:
    shown = Table(title=f"{setting}: test prompts, mean over seeds ± standard error")
    shown.add_column("arm")
    for name, _, _ in JUDGES.values():
        shown.add_column(name, justify="right")
    shown.add_column("learning rate", justify="right")
    for (own, arm), means in summary.items():
        if own == setting:
            shown.add_row(title(arm), *cells(means), means["learning_rate"])
    return shown


def write_markdown(rows: list[dict[str, Any]], settings: list[str], arms: list[str], path: Path) -> None:
    """Each setting's table, and what each arm changes against the first of them."""
    summary = summarize(rows, settings, arms)
    baseline, *others = arms
    lines = []
    for setting in settings:
        lines += [f"## {setting}", ""]
        shares = [m for (own, _), m in summary.items() if own == setting and m["tokens_longer"] > 0]
        if shares:
            lines.append(
                f"Of the response tokens that the student samples at first, {shares[0]['tokens_single']:.0%} are in 1:1 units,"
            )
            lines += [
                f"{shares[0]['tokens_longer']:.0%} in longer ones. Mean over seeds ± standard error, test prompts:",
                "",
            ]
        lines.append("| arm | " + " | ".join(t for t, _, _ in JUDGES.values()) + " | learning rate |")
        lines.append("|---" * (len(JUDGES) + 2) + "|")
        for (own, arm), means in summary.items():
            if own == setting:
                lines.append(f"| {title(arm)} | " + " | ".join(cells(means)) + f" | {means['learning_rate']} |")
        lines += ["", f'Less "{title(baseline)}", by seed:', ""]
        lines.append("| arm | " + " | ".join(JUDGES[name][0] for name in COMPARED) + " |")
        lines.append("|---" * (len(COMPARED) + 1) + "|")
        for arm in (arm for arm in others if (setting, arm) in summary):
            lines.append(f"| {title(arm)} | " + " | ".join(differences(rows, setting, arm, baseline)) + " |")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


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


def plot_curves(curves: list[dict[str, Any]], settings: list[str], arms: list[str], path: Path) -> None:
    """What a collapse shows in, along training: the test runs' mean over seeds."""
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
                own = [
                    r for r in curves if (r["setting"], r["arm"], r["split"]) == (setting, arm, "test") and r.get(name)
                ]
                steps = sorted({int(row["step"]) for row in own})
                means = [mean_with_error([float(r[name]) for r in own if int(r["step"]) == step])[0] for step in steps]
                style = "-" if number < 10 else "--"
                axis.plot(steps, means, style, color=f"C{number % 10}", label=title(arm))
            axis.set_title(f"{setting}: {label}", fontsize=10)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
