"""The study's tables: means over seeds with their standard errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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


def best_rate(rows: list[dict[str, Any]], setting: str, arm: str) -> float:
    """The learning rate with the least KL in both directions on the validation prompts."""
    found = [r for r in rows if (r["setting"], r["arm"], r["split"]) == (setting, arm, "validation")]
    best = min(found, key=lambda r: float(r["reverse_kl_per_byte"]) + float(r["forward_kl_per_byte"]))
    return float(best["learning_rate"])


def tested(rows: list[dict[str, Any]], setting: str, arm: str, rate: float | None = None) -> list[dict[str, Any]]:
    """The test runs of an arm at a learning rate: its best if none is given."""
    own = [r for r in rows if (r["setting"], r["arm"], r["split"]) == (setting, arm, "test")]
    if own and rate is None:
        rate = best_rate(rows, setting, arm)
    return [row for row in own if float(row["learning_rate"]) == rate]


def summarize(rows: list[dict[str, Any]], settings: list[str], arms: list[str], rate: float | None = None) -> Summary:
    """By setting and arm: for each judge (mean over seeds, its standard error), the seeds and the learning rate (the arm's best if
    none is given). Arm "none" is the student before, whose error is that over prompts."""
    found: Summary = {}
    for setting in settings:
        for arm in ("none", *arms):
            own = tested(rows, setting, arm, 0.0 if arm == "none" else rate)
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
    for row in (*tested(rows, setting, arm), *tested(rows, setting, baseline)):
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


def write_markdown(rows: list[dict[str, Any]], settings: list[str], arms: list[str], high: float, path: Path) -> None:
    """Each setting's table at the arms' best learning rates, what each arm changes against the first of them, and what becomes of
    them at the learning rate `high`."""
    summary, pushed = summarize(rows, settings, arms), summarize(rows, settings, arms, high)
    baseline, *others = arms
    lines = []
    for setting in settings:
        lines += [f"## {setting}", ""]
        shares = [m for (own, _), m in summary.items() if own == setting and m["tokens_longer"] > 0]
        if shares:
            lines.append(
                f"Of the response tokens that the student samples at first, {shares[0]['tokens_single']:.0%} are in 1:1 units,"
            )
            lines.append(f"{shares[0]['tokens_longer']:.0%} in longer ones.")
        lines += ["Mean over seeds ± standard error, test prompts, each arm at its best learning rate:", ""]
        lines += _rows(summary, setting)
        lines += ["", f'Less "{title(baseline)}", by seed:', ""]
        lines.append("| arm | " + " | ".join(JUDGES[name][0] for name in COMPARED) + " |")
        lines.append("|---" * (len(COMPARED) + 1) + "|")
        for arm in (arm for arm in others if (setting, arm) in summary):
            lines.append(f"| {title(arm)} | " + " | ".join(differences(rows, setting, arm, baseline)) + " |")
        lines += ["", f"At learning rate {high:g}, where a collapse shows:", "", *_rows(pushed, setting), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _rows(summary: Summary, setting: str) -> list[str]:
    lines = ["| arm | " + " | ".join(t for t, _, _ in JUDGES.values()) + " | learning rate |"]
    lines.append("|---" * (len(JUDGES) + 2) + "|")
    for (own, arm), means in summary.items():
        if own == setting:
            lines.append(f"| {title(arm)} | " + " | ".join(cells(means)) + f" | {means['learning_rate']} |")
    return lines
