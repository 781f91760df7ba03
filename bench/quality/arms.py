"""The study's arms: each an objective that a user can choose, as options of `simct train`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """`options` of `SimCTConfig`; `data`: "student" (its own samples), or the teacher's, as many: "teacher" at temperature 1,
    "sharp" as students sample, at 0.6; `sft`: cross entropy on them instead of a comparison of distributions."""

    title: str
    options: dict = field(default_factory=dict)
    data: str = "student"
    sft: bool = False


CORE = {  # what the contrasts of CONTRASTS.md need, and what its addendum describes beside them
    "sft": Arm("SFT on the teacher's samples", data="teacher", sft=True),
    "sft-sharp": Arm("SFT on its samples at 0.6", data="sharp", sft=True),
    "strict": Arm("strict: 1:1 units", {"objective": "simct", "units": "single"}),
    "simct": Arm("SimCT (paper)", {"objective": "simct"}),
    "escd": Arm("ESCD", {"objective": "escd"}),
}
FURTHER = {
    "kd": Arm(
        "off-policy KD: forward KL", {"objective": "simct", "beta": 0.0, "on_policy_fraction": 0.0}, data="teacher"
    ),
    "strict-top16": Arm("strict, top 16", {"objective": "simct", "units": "single", "top_k": 16}),
    "disjoint": Arm("SimCT, disjoint", {"objective": "simct", "candidates": "disjoint"}),
}
ARMS = CORE | FURTHER
QUICK_ARMS = ("sft", "strict", "simct")
ON_POLICY = tuple(name for name, arm in CORE.items() if arm.data == "student")  # of the first contrast
LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # learning rates
FIRST = 1, 4  # from and to: those that every arm is tried at; the next one is while the best is on an edge
