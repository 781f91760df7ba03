"""The options that every loss shares, checked once before any backend sees them."""

from __future__ import annotations

from dataclasses import dataclass

from simct_kernels.values import check_choice, is_number, is_positive_int

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
        if not is_number(self.beta) or not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 and 1, got {self.beta!r}")
        check_temperature(self.temperature)
        check_choice("score", self.score, SCORES)
        check_choice("candidates", self.candidates, CANDIDATES)
        if self.top_k is not None and not is_positive_int(self.top_k):
            raise ValueError(f"top_k must be a positive int or None, got {self.top_k!r}")
        floor = self.teacher_mass_floor
        if floor is not None and not (is_number(floor) and 0 <= floor <= 1):
            raise ValueError(f"teacher_mass_floor must be between 0 and 1 or None, got {floor!r}")

    @property
    def normalises(self) -> bool:
        """Whether a continuation's tokens are scored by log-probabilities, which need the rows' log-sum-exps."""
        return self.score != "mean_logit"


def check_reduction(reduction: object, return_unit_losses: object) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    if not isinstance(return_unit_losses, bool):
        raise ValueError(f"return_unit_losses must be True or False, got {return_unit_losses!r}")


def check_temperature(temperature: object) -> None:
    if not isinstance(temperature, (int, float)) or not is_number(temperature) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")


def check_chunk_rows(chunk_rows: object) -> None:
    if not is_positive_int(chunk_rows) and not (isinstance(chunk_rows, str) and chunk_rows == "auto"):
        raise ValueError(f'chunk_rows must be "auto" or a positive int, got {chunk_rows!r}')
