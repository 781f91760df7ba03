"""The study's tables: means over seeds with 95 % intervals, and the contrasts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.table import Table

from simct.files import replaced

from . import contrasts
from .arms import ARMS
from .contrasts import Contrast, by_seed, interval
from .study import Design, Rows, rates

JUDGES = {  # name: title, factor, format
    "accuracy": ("sums right at 0.6, %", 100, ".1f"),
    "forward_kl_per_byte": ("forward KL, nats/byte", 1, ".3f"),
    "reverse_kl_per_byte": ("reverse KL, nats/byte", 1, ".3f"),
    "logp_solution": ("log p of the right response", 1, ".2f"),
    "ended": ("ended, %", 100, ".0f"),
}
PLUS_MINUS = "the half of the 95 % interval over seeds"


def title(arm: str) -> str:
    return "before training" if arm == "none" else ARMS[arm].title


def cells(design: Design, rows: Rows, pair: str) -> list[list[str]]:
    """A row for each arm that has a test run: its title, seeds, learning rate, and the judges."""
    found = []
    for arm in ("none", *design.all_arms()):
        seeds = by_seed(design, rows, pair, arm, "accuracy")
        if seeds:
            rate = "" if arm == "none" else _rate(design, rows, pair, arm)
            shown = []
            for judge, (_, factor, form) in JUDGES.items():
                mean, half = interval([factor * v for v in by_seed(design, rows, pair, arm, judge).values()])
                shown.append(f"{mean:{form}}" + (f" ± {half:{form}}" if len(seeds) > 1 else ""))
            found.append([title(arm), str(len(seeds)), rate, *shown])
    return found


def _rate(design: Design, rows: Rows, pair: str, arm: str) -> str:
    best = rates(design, rows, pair, arm)[1]
    edge = len(design.ladder) > 1 and best in (design.ladder[0], design.ladder[-1])
    return f"{best:g}" + " (edge)" * edge


HEADINGS = ["arm", "seeds", "rate", *(name for name, _, _ in JUDGES.values())]


def table(design: Design, rows: Rows, pair: str) -> Table:
    shown = Table(title=f"{pair}: test prompts, mean over seeds ± {PLUS_MINUS}")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in cells(design, rows, pair):
        shown.add_row(*row)
    return shown


def contrast_cells(one: Contrast) -> list[str]:
    _, factor, form = JUDGES[one.judge]
    unit = " points" if one.judge == "accuracy" else ""
    mean, low, high = (f"{factor * value:+{form}}" for value in (one.mean, one.low, one.high))
    equal = "" if one.equivalence != one.equivalence else f"{one.equivalence:.3g}"
    what = f"{title(one.arm)} − {title(one.baseline)}"
    found = f"{mean}{unit} [{low}, {high}]"
    return [one.pair, what, one.judge, found, str(one.df), f"{one.p:.2g}", f"{one.holm:.2g}", equal, one.verdict]


CONTRAST_HEADINGS = ["pair", "contrast", "judge", "difference [95 %]", "df", "p", "Holm", "p of ±5", "verdict"]


def write_markdown(rows: Rows, design: Design, folder: Path) -> None:
    """tables.md: each pair's arms, the contrasts, the learning rates, and the students."""
    lines = [
        "# Tables of the study",
        "",
        "Made by `python -m bench.quality --show` of results.csv; see docs/evidence.md.",
        "",
    ]
    for pair in design.pairs:
        found = cells(design, rows, pair)
        if found:
            lines += [
                f"## {pair}",
                "",
                f"Test prompts, mean over seeds ± {PLUS_MINUS}; edge: of the grid of rates:",
                "",
            ]
            lines += [*markdown(HEADINGS, found), ""]
    tests = contrasts.of_study(design, rows)
    if tests:
        lines += [
            "## Contrasts",
            "",
            f"As written down before the runs (CONTRASTS.md). Holm counts {contrasts.TESTS} tests, these {len(tests)} among them; "
            "intervals and the p of equivalence are not corrected.",
            "",
        ]
        lines += [*markdown(CONTRAST_HEADINGS, map(contrast_cells, tests)), ""]
    lines += [
        "## Learning rates",
        "",
        "Validation sums right at 0.6 (%), seed 0, shorter runs; the chosen rate in bold:",
        "",
    ]
    lines += [*markdown(["pair", "arm", *(f"{rate:g}" for rate in design.ladder)], _rates(design, rows)), ""]
    models = _models(folder)
    if models:
        lines += ["## Models", "", "Validation sums right at 0.6 (%), four draws each:", ""]
        lines += markdown(["model", "steps", "accuracy"], models)
    (folder / "tables.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _models(folder: Path) -> list[list[str]]:
    """Name, steps and accuracy of each; they are kept in models.csv, where the models themselves are not."""
    path, made = folder / "models.csv", sorted(folder.glob("models/*/made_by.json"))
    if made:
        found = [(file.parent.name, json.loads(file.read_text())) for file in made]
        with replaced(path, newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([name, one["steps"], f"{100 * one['accuracy']:.1f}"] for name, one in found)
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))


def _rates(design: Design, rows: Rows) -> list[list[str]]:
    found = []
    for pair in design.pairs:
        for arm in design.all_arms():
            own = {
                float(row["learning_rate"]): float(row["accuracy"])
                for row in rows
                if (row["pair"], row["arm"], row["split"]) == (pair, arm, "validation")
            }
            if own:
                best = rates(design, rows, pair, arm)[1]
                shown = [f"{100 * own[rate]:.1f}" if rate in own else "" for rate in design.ladder]
                shown = [
                    f"**{text}**" if rate == best else text for rate, text in zip(design.ladder, shown, strict=True)
                ]
                found.append([pair, title(arm), *shown])
    return found


def markdown(headings, rows) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
