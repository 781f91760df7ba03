"""What the losses are to reach, as ratios of rows that were measured in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .record import Row

QUIET = 0.1  # cores: with more of them busy with other work, a CPU's times are no evidence


@dataclass(frozen=True)
class Goal:
    text: str
    bound: float
    at_most: bool
    value: float | None  # None: not measured
    disturbed: bool = False  # by other work on the machine: neither met nor missed

    @property
    def met(self) -> bool | None:
        if self.value is None or self.disturbed:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def goals(rows: Sequence[Row], device: str) -> list[Goal]:
    found = {(row.suite, row.case, row.method, row.scope): row for row in rows if row.median_s is not None}

    def of(case: str, method: str, scope: str = "forward+backward") -> Row | None:
        return found.get(("kernels", case, method, scope))

    def ratio(one: Row | None, other: Row | None, read: Callable[[Row], float | None]) -> float | None:
        if one is None or other is None or read(one) is None or not read(other):
            return None
        return read(one) / read(other)

    def time(row: Row) -> float:
        return row.median_s

    def scratch(row: Row) -> float:
        return row.scratch_bytes

    def faster(text: str, case: str, rival: str, bound: float) -> Goal:
        return Goal(text, bound, False, ratio(of(case, rival), of(case, "ours"), time))

    def at_most(text: str, bound: float, case: str, one: str, other: str, read=time) -> Goal:
        of_both = of(case, one), of(case, other)
        disturbed = device == "cpu" and read is time and any(row and (row.other_load or 0) > QUIET for row in of_both)
        return Goal(text, bound, True, ratio(*of_both, read), disturbed)

    first, one = "Gemma-2-2B <- Qwen2.5-7B", "one vocabulary"
    trl, liger, plain = "TRL chunked divergence", "Liger fused linear JSD", "materialised"
    if device == "cpu":
        return [
            at_most("one vocabulary: time, of TRL's", 0.35, one, "ours", trl),
            at_most(f"{first}, few rows: time, of materialised", 0.6, first, "ours", plain),
            at_most(f"{first}, few rows: scratch memory, of materialised", 0.1, first, "ours", plain, scratch),
        ]

    def share_of(method: str, row: Row | None, read: Callable[[Row], float | None]) -> float | None:
        return ratio(row, found.get(("kernels", "ceiling", method, "")), read)

    useful = share_of("product, bfloat16", of(first, "ours"), lambda row: row.flop_per_s)
    compiled = "materialised, compiled"
    return [
        faster(f"{first}: times as fast as a loop over units", first, "loop over units", 20),
        faster(f"{first}: times as fast as compiled", first, compiled, 2.5),
        at_most(f"{first}: peak memory, of compiled", 0.1, first, "ours", compiled, lambda row: row.peak_bytes),
        at_most(
            f"{first}: peak memory, of the loop", 0.1, first, "ours", "loop over units", lambda row: row.peak_bytes
        ),
        Goal(f"{first}: time, of the floor's products at the ceiling", 1.4, True, 1 / useful if useful else None),
        *(
            Goal(
                f"{first}, logits: share of the copy's bandwidth, {scope}",
                0.8,
                False,
                share_of("copy", of(f"{first}, logits", "ours", scope), lambda row: row.bytes_per_s),
            )
            for scope in ("forward", "backward")
        ),
        at_most("one vocabulary: time, of TRL's", 0.65, one, "ours", trl),
        at_most("one vocabulary: scratch memory, of TRL's", 1.0, one, "ours", trl, scratch),
        faster("one vocabulary: times as fast as Liger", one, liger, 2.5),
        at_most("one vocabulary: scratch memory, of Liger's", 0.25, one, "ours", liger, scratch),
        at_most(
            "served, k = 64: time, of the log-sum-exp alone",
            1.15,
            f"{first}, served",
            "ours",
            "log-sum-exp of the student alone",
        ),
        at_most("single units: time of top_k=16, of all", 0.35, f"{first}, single units", "ours, top_k=16", "ours"),
    ]
