"""Each loss against its rivals: time, memory, and how far from the floor by this device's own ceilings."""

from __future__ import annotations

from ..cases import Case
from ..floor import Cost
from ..measure import Measured, measure
from ..rivals import methods
from .cases import all_cases
from .device import ceilings
from .steps import Item, Run

OURS = {
    "headline": ("ours", "ours, top_k=16", "ours, beta=0.5", "ours, torch backend"),
    "one vocabulary": ("ours", "ours, beta=0.5", "ours, torch backend"),
    "logits": ("ours",),
    "logits, one vocabulary": ("ours",),
    "served": ("ours",),
}
# In this order, after all of ours: the last ones take long to compile, or to run.
RIVALS = {
    "headline": ("materialised", "loop over units", "materialised, compiled"),
    "one vocabulary": ("TRL chunked divergence", "Liger fused linear JSD", "materialised", "materialised, compiled"),
    "logits": ("materialised", "materialised, compiled"),
    "logits, one vocabulary": ("materialised", "materialised, compiled"),
    "served": ("log-sum-exp of the student alone",),
}
SLOW = ("loop over units", "compiled")
# Relative difference of the loss and of the gradient's norm; rivals round their logits.
AGREE = {"float32": 1e-3, "bfloat16": 3e-2}


def items(run: Run) -> list[Item]:
    cases = {case.name: case for case in all_cases(run.rehearse)}
    pairs = [(case, method) for case, several in OURS.items() for method in several[:1]]
    quick = [(case, method) for case, several in RIVALS.items() for method in several if not _slow(method)]
    pairs += quick + [(case, method) for case, several in OURS.items() for method in several[1:]]
    pairs += [("headline", "ours"), ("one vocabulary", "ours")]  # once more: what differs less than these is noise
    pairs += [(case, method) for case, several in RIVALS.items() for method in several if _slow(method)]
    if run.rehearse:
        pairs = [("headline", "ours"), ("headline", "materialised"), ("one vocabulary", "Liger fused linear JSD")]
    return [
        Item(
            f"{case}: {method}" + (", again" if (case, method) in pairs[:number] else ""),
            lambda case=case, method=method: compare(run, cases[case], method),
            90.0 if _slow(method) else 40.0,
        )
        for number, (case, method) in enumerate(pairs)
        if run.chooses(case, run.cases) and run.chooses(method, run.methods)
    ]


def _slow(method: str) -> bool:
    return any(word in method for word in SLOW)


def compare(run: Run, case: Case, method: str) -> None:
    found = measure(method, case, run.device, 0.6)
    if found.refused:
        run.record(what="loss", case=case.name, method=method, note=found.refused)
        return
    ms = sorted(1e3 * span for span in found.total)
    median = ms[len(ms) // 2]
    row = {
        "what": "loss", "case": case.name, "method": method, "rows": found.student_rows, "dtype": case.dtype,
        "median_ms": median, "min_ms": ms[0], "max_ms": ms[-1], "repeats": len(ms),
        "scratch_bytes": max(0, found.peak_bytes - found.gradient_bytes), "loss": found.loss,
        "gradient_norm": found.gradient_norm,
    }  # fmt: skip
    forward, backward = found.floor
    row |= _against_floor(forward + backward, median, ceilings(run))
    if case.form == "logits":
        row["forward_ms"] = sorted(1e3 * span for span in found.forward)[len(ms) // 2]
    known = methods()
    if known[method].same_loss:
        row["agrees"] = _agrees(run, case, method, found)
    run.record(**row)


def _against_floor(cost: Cost, ms: float, known: dict[str, float]) -> dict[str, float]:
    """By the products and bytes that no method can avoid, at the rates that step `device` measured."""
    found: dict[str, float] = {}
    if cost.flops:
        found["needed_tflop"], found["tflop_per_s"] = cost.flops / 1e12, cost.flops / 1e9 / ms
    if cost.moved:
        found["needed_gb"], found["gb_per_s"] = cost.moved / 1e9, cost.moved / 1e6 / ms
    times = [1e3 * cost.flops / known["product"]] if "product" in known and cost.flops else []
    times += [1e3 * cost.moved / known["copy"]] if "copy" in known and cost.moved else []
    if times:
        found["floor_ms"], found["of_floor"] = max(times), ms / max(times)
    if "copy" in known and not cost.flops:
        found["share_of_copy_rate"] = max(times) / ms
    return found


def _agrees(run: Run, case: Case, method: str, found: Measured) -> str:
    """With the first method of the same loss in this folder."""
    key = methods()[method].options
    for row in run.known("bench"):
        if row.get("case") != case.name or "loss" not in row or "agrees" not in row:
            continue
        if methods()[row["method"]].options != key or row["method"] == method:
            continue
        pairs = ((row["loss"], found.loss), (row["gradient_norm"], found.gradient_norm))
        difference = max(abs(float(a) - b) / (abs(float(a)) or 1.0) for a, b in pairs)
        return "yes" if difference <= AGREE[case.dtype] else f"no ({difference:.1e})"
    return "first"
