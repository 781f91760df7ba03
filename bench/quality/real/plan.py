"""What is run, how large it is, and what each part may take."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .models import Size

ARMS = ("sft", "strict", "simct", "escd")
DIRECTIONS = ("qwen<-deepseek", "deepseek<-qwen")  # student <- teacher
PACE_STEPS = 5, 15  # between which an arm's pace is taken


class Task(NamedTuple):
    """`kind`: "learn" (`name`: that of a folder of the models) or "arm"."""

    kind: str
    name: str
    direction: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """Times are in seconds. What is sampled at `temperature` is from the whole distribution, without a nucleus: looking for one in
    150,000 tokens takes longer than all else that a draw needs. Learning rates were fixed beforehand, on models for a CPU."""

    device: str = "cuda"
    begin: float = field(default_factory=time.time)
    seconds: float = 480.0
    arms: tuple[str, ...] = ARMS
    directions: tuple[str, ...] = DIRECTIONS
    seeds: int = 2
    teacher: Size = Size(640, 6)
    student: Size = Size(384, 5)
    documents: int = 120_000
    prompts: int = 4096
    held_out: int = 2000
    along: int = 500  # held-out problems of a curve
    learn_batch: int = 512
    learn_steps: int = 100_000
    learn_share: float = 0.18  # of `seconds`, for a model's training, from when it begins
    learn_latest: float = 0.36  # of `seconds`: no model is trained beyond it
    learn_every: int = 10  # steps after which a student is asked
    target: float = 0.4  # accuracy of the students before
    batch: int = 256
    steps: int = 150
    every: int = 25
    new_tokens: int = 40
    temperature: float = 0.6
    rate: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ARMS, 3e-4))
    chunk_rows: int = 256
    tokens_per_batch: int = 4096
    memory_share: float = 0.055  # of the GPU, for one arm's process: 16 of them are side by side
    judge_share: float = 0.12  # of `seconds`, kept for what is judged behind the last step

    @property
    def end(self) -> float:
        """Of everything but the summary."""
        return self.begin + self.seconds - min(10.0, 0.05 * self.seconds)

    def learn_end(self, now: float) -> float:
        """Of a training that begins now."""
        return min(now + self.learn_share * self.seconds, self.begin + self.learn_latest * self.seconds)

    @property
    def train_end(self) -> float:
        return self.end - self.judge_share * self.seconds

    def tasks(self) -> list[Task]:
        """The models' first, teachers before students."""
        sides = [direction.split("<-") for direction in self.directions]
        seeds = range(1, self.seeds + 1)
        names = [f"teacher-{teacher}" for _, teacher in sides]
        names += [student_name(student, seed) for student, _ in sides for seed in seeds]
        arms = itertools.product(seeds, self.directions, self.arms)
        return [Task("learn", name) for name in dict.fromkeys(names)] + [
            Task("arm", arm, direction, seed) for seed, direction, arm in arms
        ]

    def affordable_steps(self, seconds_a_step: float, now: float) -> int:
        """All, or a multiple of `every` that the slowest arm will have done in time, of which it has done `PACE_STEPS[1]`."""
        left = 0.85 * (self.train_end - now) / max(seconds_a_step, 1e-9)
        most = min(float(self.steps), PACE_STEPS[1] + left)
        return self.steps if most >= self.steps else max(self.every, self.every * math.floor(most / self.every))

    def write(self, folder: Path) -> None:
        (folder / "study.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Study:
        found: dict[str, Any] = json.loads((folder / "study.json").read_text())
        found |= {name: Size(**found[name]) for name in ("teacher", "student")}
        return cls(**found | {name: tuple(found[name]) for name in ("arms", "directions")})


def student_name(vocabulary: str, seed: int) -> str:
    return f"student-{vocabulary}-{seed}"


def small() -> dict[str, Any]:
    """A rehearsal's sizes: one direction, one seed, on a CPU."""
    return dict(
        device="cpu", seconds=3000.0, directions=DIRECTIONS[:1], seeds=1, teacher=Size(32, 1, 16, 2e-2),
        student=Size(16, 1, 16), documents=64, prompts=16, held_out=8, along=4, learn_batch=4, learn_steps=60,
        learn_every=30, batch=4, steps=2, every=1, new_tokens=12,
    )  # fmt: skip
