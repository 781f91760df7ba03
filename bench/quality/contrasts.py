"""The two contrasts of CONTRASTS.md: paired by seed, with intervals, Holm's correction and equivalence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from .arms import ON_POLICY
from .study import Design, Rows, rates

MARGIN = 0.05  # of accuracy: within it two arms are equivalent
LEVEL = 0.05
# Of CONTRASTS.md: four pairs, two contrasts, two judges. Holm's correction counts all, whatever has been run.
TESTS = 16
SEEDS = 3  # with fewer nothing is decided
JUDGES = ("accuracy", "forward_kl_per_byte")


@dataclass(frozen=True)
class Contrast:
    """`arm` minus `baseline`, paired by seed; `low`, `high`: the 95 % interval of the mean difference; `holm`: its p value as
    Holm's method adjusts it; `equivalence`: p of the two one-sided tests against ±MARGIN (accuracy alone)."""

    pair: str
    name: str
    judge: str
    arm: str
    baseline: str
    seeds: tuple[str, ...]
    mean: float
    low: float
    high: float
    p: float
    equivalence: float
    holm: float = math.nan

    @property
    def df(self) -> int:
        return len(self.seeds) - 1

    @property
    def verdict(self) -> str:
        found = []
        if len(self.seeds) < SEEDS:
            return "not decided"
        if self.holm < LEVEL:
            better = (self.mean > 0) == (self.judge == "accuracy")
            found.append("better" if better else "worse")
        if self.equivalence < LEVEL:
            found.append(f"equivalent within ±{100 * MARGIN:.0f} points")
        return ", ".join(found) or "not decided"


def of_study(design: Design, rows: Rows) -> list[Contrast]:
    """Those of each pair that at least two seeds have the runs of."""
    found = []
    for pair in design.pairs:
        best = best_on_policy(design, rows, pair)
        for name, arm, baseline in (("best on-policy - SFT", best, "sft"), ("SimCT - strict", "simct", "strict")):
            for judge in JUDGES:
                ours, theirs = by_seed(design, rows, pair, arm, judge), by_seed(design, rows, pair, baseline, judge)
                seeds = tuple(sorted(ours.keys() & theirs.keys()))
                if len(seeds) > 1:
                    differences = [ours[seed] - theirs[seed] for seed in seeds]
                    margin = MARGIN if judge == "accuracy" else math.nan
                    found.append(Contrast(pair, name, judge, arm, baseline, seeds, *paired(differences, margin)))
    return [replace(one, holm=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def best_on_policy(design: Design, rows: Rows, pair: str) -> str:
    """The arm on the student's samples with the highest validation accuracy, each at its best rate; "" before all have one."""
    found = {}
    for arm in ON_POLICY:
        rate = rates(design, rows, pair, arm)[1]
        if rate is not None:
            found[arm] = next(
                float(row["accuracy"])
                for row in rows
                if (row["pair"], row["arm"], row["split"]) == (pair, arm, "validation")
                and float(row["learning_rate"]) == rate
            )
    asked = [arm for arm in ON_POLICY if arm in design.all_arms()]
    return max(found, key=found.__getitem__) if asked and len(found) == len(asked) else ""


def by_seed(design: Design, rows: Rows, pair: str, arm: str, judge: str) -> dict[str, float]:
    """A judge of the test runs at the arm's chosen rate."""
    rate = 0.0 if arm == "none" else rates(design, rows, pair, arm)[1]
    return {
        row["seed"]: float(row[judge])
        for row in rows
        if (row["pair"], row["arm"], row["split"]) == (pair, arm, "test") and float(row["learning_rate"]) == rate
    }


def paired(differences: Sequence[float], margin: float) -> tuple[float, float, float, float, float]:
    """Mean, 95 % interval (two numbers), p of the t test against 0, and p of equivalence within ±margin."""
    values = np.asarray(differences, dtype=float)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    one_sided = (
        stats.ttest_1samp(values, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(values, margin, alternative="less").pvalue,
    )
    p = test.pvalue if values.any() else 1.0  # 0/0 where nothing differs at all
    return float(values.mean()), float(low), float(high), float(p), float(max(one_sided))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values among TESTS, or more: below a level where its step-down method rejects at that level."""
    found, largest = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (max(len(p), TESTS) - place) * p[i]))
        found[i] = largest
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval over seeds; NaN for the second of one seed."""
    n = len(values)
    if n < 2:
        return (float(values[0]) if n else math.nan), math.nan
    half = stats.t.ppf(0.975, n - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)
