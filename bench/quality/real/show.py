"""The study's table and its picture, of the rows that there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu import rows
from bench.quality.arms import ARMS
from bench.quality.means import mean_with_error

PICTURE = "study.png"
JUDGES = {
    "accuracy": "at 0.6", "accuracy_greedy": "greedy", "forward_kl_per_byte": "forward KL", "ended": "ended",
    "length": "tokens",
}  # fmt: skip
CONTRASTS = (("strict", "sft"), ("simct", "sft"), ("escd", "sft"), ("simct", "strict"), ("escd", "strict"))
Row = dict[str, Any]


def write(path: Path) -> str:
    """The table; the picture is written beside the rows, as `study.png`."""
    found = rows.read(path)
    text = "\n".join(lines(found))
    try:
        plot(found, path.with_name(PICTURE))
    except Exception as error:  # the numbers are what counts
        text += f"\nno picture: {rows.short(error)}"
    return text


def title(arm: str) -> str:
    return "before" if arm == "none" else ARMS[arm].title


def lines(found: list[Row]) -> Iterator[str]:
    for row in found:
        if row.get("what") == "model":
            yield (
                f"{row['arm']:20} {row['body_parameters'] / 1e6:5.1f} M parameters + {row['vocabulary']} tokens, "
                f"{row['step']} steps, {row['time']:.0f} s"
            )
    for row in found:
        if row.get("what") == "teacher":
            yield f"{row['arm']:20} {row['judge']:16} {row['mean']:.1%} ± {row['stderr']:.1%}"
    for row in found:
        if row.get("what") == "plan":
            yield (
                f"{row['steps']} of {row['wanted']} steps for every arm: the slowest of {row['paces']} took "
                f"{row['seconds_a_step']:.2f} s a step"
            )
    judged = [row for row in found if row.get("what") == "judged"]
    for direction in dict.fromkeys(row["direction"] for row in judged):
        yield f"\n{direction}: each seed's value"
        yield f"{'arm':36} {'steps':>9} " + " ".join(f"{name:>17}" for name in JUDGES.values())
        for arm, own in _by_arm([row for row in judged if row["direction"] == direction]):
            steps = "/".join(str(row["step"]) for row in own)
            cells = [" / ".join(_cell(name, row[name]) for row in own) for name in JUDGES]
            yield f"{title(arm):36} {steps:>9} " + " ".join(f"{cell:>17}" for cell in cells)
        yield from contrasts([row for row in judged if row["direction"] == direction])
    errors = [row for row in found if row.get("what") == "error"]
    for row in errors:
        yield f"! {row['item']}: {row['error']} at {row['where']}"


def contrasts(judged: list[Row]) -> Iterator[str]:
    """Sampled accuracy of one arm less another's, on the same problems with the same student: by seed, with the standard error over
    problems, and over all seeds. It knows nothing of what another seed would give: two seeds do not say."""
    for one, other in CONTRASTS:
        values: list[int] = []
        shown = []
        for seed in sorted({row["seed"] for row in judged}):
            both = [_last(judged, arm, seed) for arm in (one, other)]
            if None in both or both[0]["step"] != both[1]["step"]:
                continue
            bits = [f"{int(row['right'], 16):0{row['problems']}b}" for row in both]
            differences = [int(a) - int(b) for a, b in zip(*bits, strict=True)]
            shown.append(mean_with_error(differences)[0])
            values += differences
        if values:
            mean, error = mean_with_error(values)
            seeds = ", ".join(f"{100 * value:+.1f}" for value in shown)
            yield f"{one} - {other}: {100 * mean:+.1f} ± {100 * error:.1f} points (over problems; by seed {seeds})"


def _last(judged: list[Row], arm: str, seed: int) -> Row | None:
    own = [row for row in judged if (row["arm"], row["seed"]) == (arm, seed)]
    return own[-1] if own else None


def _by_arm(judged: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    for arm in ("none", *ARMS):
        if own := sorted((row for row in judged if row["arm"] == arm), key=lambda row: row["seed"]):
            yield arm, own


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float | int):  # a NaN is text
        return str(value)
    return f"{value:.1f}" if name == "length" else f"{value:.3f}" if name.startswith("forward") else f"{value:.1%}"


def plot(found: list[Row], path: Path) -> None:
    """Accuracy by step, a panel for each direction: the mean of the seeds, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [row for row in found if row.get("what") == "curve"]
    directions = list(dict.fromkeys(row["direction"] for row in curves))
    figure, axes = pyplot.subplots(
        1, max(1, len(directions)), figsize=(5.2 * max(1, len(directions)), 3.8), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, direction in zip(axes[0], directions, strict=False):
        own = [row for row in curves if row["direction"] == direction]
        for number, arm in enumerate(ARMS):
            steps, low, mean, high = band([row for row in own if row["arm"] == arm])
            if steps:
                axis.plot(steps, mean, color=f"C{number}", label=title(arm))
                axis.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, lw=0)
        teacher = [
            row["mean"] for row in found
            if row.get("what") == "teacher" and row["judge"] == "accuracy"
            and row["arm"] == f"teacher-{direction.split('<-')[1]}"
        ]  # fmt: skip
        for value in teacher:
            axis.axhline(value, color="gray", ls=":", label="teacher")
        axis.set_title(direction.replace("<-", " learns from "), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out problems right, sampled at 0.6")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def band(curve: list[Row]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all seeds have, and over the seeds the lowest, the mean and the highest accuracy at each."""
    seeds = {row["seed"] for row in curve}
    by_step = {
        step: [row["accuracy"] for row in group]
        for step, group in itertools.groupby(sorted(curve, key=lambda r: r["step"]), key=lambda r: r["step"])
    }
    whole = {step: values for step, values in by_step.items() if len(values) == len(seeds)}
    columns = [(min(v), math.fsum(v) / len(v), max(v)) for v in whole.values()]
    low, mean, high = ([column[i] for column in columns] for i in range(3))
    return list(whole), low, mean, high
