"""The options that every loss shares, checked once before any backend sees them."""

from __future__ import annotations

from dataclasses import dataclass

SCORES = ("mean_logprob", "sum_logprob", "mean_logit")
CANDIDATES = ("paper", "disjoint")
REDUCTIONS = ("none", "sum", "mean")


@dataclass(frozen=True)
class LossOptions:
    """See `simct_kernels.linear_simct_loss` for what each one means. Raises ValueError for a value out of its range."""

    beta: float = 1.0
    temperature: float = 1.0
    score: str = "mean_logprob"
    candidates: str = "paper"
    top_k: int | None = None
    teacher_mass_floor: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 and 1, got {self.beta}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        check_choice("score", self.score, SCORES)
        check_choice("candidates", self.candidates, CANDIDATES)
        if self.top_k is not None and not is_positive_int(self.top_k):
            raise ValueError(f"top_k must be a positive int or None, got {self.top_k!r}")
        if self.teacher_mass_floor is not None and not 0 <= self.teacher_mass_floor <= 1:
            raise ValueError(f"teacher_mass_floor must be between 0 and 1 or None, got {self.teacher_mass_floor}")

    @property
    def normalises(self) -> bool:
        """Whether a continuation's tokens are scored by log-probabilities, which need the rows' log-sum-exps."""
        return self.score != "mean_logit"


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
