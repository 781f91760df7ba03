"""What the study runs, and in which order: CONTRASTS.md says it in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .arms import ARMS, CORE, FIRST, FURTHER, LADDER, QUICK_ARMS
from .judges import Scope
from .runs import Key, Plan
from .settings import QUICK_SIZES, SIZES, Size

Rows = list[dict[str, Any]]


class Task(NamedTuple):
    """`kind`: "teacher", "data" (the teacher's samples; `pair` "sharp": at the students' temperature), "student" or "run"."""

    kind: str
    pair: str = ""
    seed: int = 0
    key: Key | None = None


@dataclass(frozen=True)
class Design:
    """`stages`: a pair, and the first and the last of its seeds, in the order in which they are run; learning rates are chosen on
    seed 0. `arms`: what goes through all stages first, and what does after that."""

    stages: tuple[tuple[str, int, int], ...] = (
        ("nested", 1, 3),
        ("digits", 1, 3),
        ("nested", 4, 6),
        ("fine", 1, 6),
        ("trailing", 1, 3),
    )
    arms: tuple[tuple[str, ...], ...] = (tuple(CORE), tuple(FURTHER))
    ladder: tuple[float, ...] = LADDER
    first: tuple[int, int] = FIRST
    test: Plan = Plan()
    sizes: dict[str, Size] = field(default_factory=lambda: SIZES)
    prompts: dict[str, int] = field(default_factory=dict)  # of `make_texts`
    choice: float = 1 / 3  # of the test plan's steps, to choose a learning rate

    def plan(self, key: Key) -> Plan:
        if key.split == "test":
            return self.test
        steps = max(1, round(self.test.steps * self.choice))
        return replace(self.test, steps=steps, every=steps, last=Scope(256, self.test.last.draws, 256))

    @property
    def pairs(self) -> list[str]:
        return list(dict.fromkeys(pair for pair, _, _ in self.stages))

    def all_arms(self) -> list[str]:
        return [arm for part in self.arms for arm in part]


SMALL = Scope(sums=8, draws=2, texts=8)
QUICK = Design(
    stages=(("nested", 1, 2),), arms=(QUICK_ARMS,), ladder=LADDER[2:3], first=(0, 1),
    test=Plan(steps=3, prompts=4, tokens=16, every=1, last=replace(SMALL, whole=True), along=SMALL), sizes=QUICK_SIZES,
    prompts={"prompts": 32, "validation": 8, "sums": 8, "prose": 8},
)  # fmt: skip


def tasks(design: Design, rows: Rows) -> Iterator[Task]:
    """All of them in order, also those that are done. The learning rates of an arm's test runs are known once `rows` holds what
    they are chosen by."""
    yield Task("teacher")
    for arms in design.arms:
        for pair, first, last in design.stages:
            yield Task("student", pair, 0)
            yield from data_of(arms)
            for arm in arms:
                for rate in rates(design, rows, pair, arm)[0]:
                    yield Task("run", pair, 0, Key(pair, arm, rate, 0, "validation"))
            for seed in range(first, last + 1):
                yield Task("student", pair, seed)
                yield Task("run", pair, seed, Key(pair, "none", 0.0, seed, "test"))
                for arm in arms:
                    best = rates(design, rows, pair, arm)[1]
                    if best is not None:
                        yield Task("run", pair, seed, Key(pair, arm, best, seed, "test"))


def data_of(arms: Iterable[str]) -> list[Task]:
    """The held-out samples, at temperature 1, are everybody's."""
    sharp = any(name in ARMS and ARMS[name].data == "sharp" for name in arms)
    return [Task("data"), *([Task("data", "sharp")] if sharp else [])]


def rates(design: Design, rows: Rows, pair: str, arm: str) -> tuple[list[float], float | None]:
    """The learning rates that an arm is tried at, as far as is known, and the best of them once all have been: by the sampled
    accuracy on validation sums. While the best is on an edge, the ladder's next one is tried."""
    found = {
        float(row["learning_rate"]): float(row["accuracy"])
        for row in rows
        if (row["pair"], row["arm"], row["split"]) == (pair, arm, "validation")
    }
    low, high = design.first
    while True:
        tried = list(design.ladder[low:high])
        if any(rate not in found for rate in tried):
            return tried, None
        best = max(tried, key=found.__getitem__)
        if best == tried[0] and low > 0:
            low -= 1
        elif best == tried[-1] and high < len(design.ladder):
            high += 1
        else:
            return tried, best
