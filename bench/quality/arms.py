"""The study's arms: each an objective that a user can choose, as options of `simct train`."""

from __future__ import annotations

from dataclasses import dataclass, field

SIMCT_PUBLIC = {"score": "mean_logit", "alignment": "anchored"}


@dataclass(frozen=True)
class Arm:
    """`options` of `SimCTConfig`; `kind`: "distil", "strings" (the public SimpleOPD alignment) or "sft" (cross entropy on
    the teacher's own samples, as many tokens)."""

    title: str
    options: dict = field(default_factory=dict)
    kind: str = "distil"


ARMS = {
    "strict": Arm("strict full: 1:1 units", {"units": "single"}),
    "strict-top16": Arm("strict top-16", {"units": "single", "top_k": 16}),
    "strict-strings": Arm("SimpleOPD, public string alignment", {"units": "single"}, kind="strings"),
    "simct": Arm("SimCT (paper)"),
    "simct-public": Arm("SimCT, public code (mean_logit, anchored)", SIMCT_PUBLIC),
    "sum-logprob": Arm("SimCT, score=sum_logprob", {"score": "sum_logprob"}),
    "disjoint": Arm("SimCT, candidates=disjoint", {"candidates": "disjoint"}),
    "mass-floor": Arm("SimCT, teacher_mass_floor=0.5", {"teacher_mass_floor": 0.5}),
    "forward-kl": Arm("SimCT, forward KL", {"beta": 0.0}),
    "jsd": Arm("SimCT, JSD", {"beta": 0.5}),
    "merged": Arm("SimCT, units merged at random", {"units": "merged"}),
    "bpm": Arm("BPM", {"objective": "bpm"}),
    "escd": Arm("ESCD", {"objective": "escd"}),
    "uld": Arm("ULD", {"objective": "uld"}),
    "alm": Arm("ALM", {"objective": "alm"}),
    "sft": Arm("SFT on teacher samples", kind="sft"),
}
QUICK_ARMS = ("strict", "simct", "sft")
CONTROL_ARMS = ("strict", "strict-top16", "forward-kl", "jsd", "sft")  # with one vocabulary the others are one of these
RATES = (3e-5, 1e-4, 3e-4)  # each arm's learning rate is the best of these on the validation prompts
PUSHED_ARMS = (
    "strict",
    "simct",
    "sum-logprob",
    "disjoint",
    "forward-kl",
    "bpm",
    "escd",
    "sft",
)  # also at the highest of them
