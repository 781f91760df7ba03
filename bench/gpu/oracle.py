"""Production tiles at real widths, judged in float64 on the same inputs: values and gradients, both backends.

About a hundred rows with many longer units, so that rows are split between programs, and over a thousand so that they are not;
hidden states of 256 columns, since the widths that matter to the kernels are the vocabularies'. The exact result comes from the
oracle (backend "reference"), of over a thousand rows from the PyTorch backend in float64, which one item holds to the oracle.
Before each call free memory is filled with NaN: what is read before it is written shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss, simct_loss, topk_simct_loss

from ..cases import Case, Model, Problem
from . import rows
from .steps import Item, Run

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}
Results = dict[str, Tensor]  # "losses" by unit, and gradients by name


@dataclass(frozen=True)
class Variant:
    name: str
    form: str = "linear"
    one_vocabulary: bool = False
    rows: int = 100
    keywords: tuple[tuple[str, object], ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    classes: bool = False  # whether two candidates are sums of three ids


def variant(
    name: str,
    *,
    form="linear",
    one_vocabulary=False,
    rows=100,
    dtypes=("bfloat16", "float32"),
    classes=False,
    **keywords,
) -> Variant:
    return Variant(name, form, one_vocabulary, rows, tuple(keywords.items()), dtypes, classes)


VARIANTS = [
    variant("linear"),
    variant("logits", form="logits"),
    variant("served", form="served"),
    variant("linear, top_k 16", top_k=16),
    variant("linear, one vocabulary", one_vocabulary=True),
    variant("logits, one vocabulary", form="logits", one_vocabulary=True),
    variant("linear, 2048 rows", rows=2048),
    variant("linear, beta 0", beta=0.0),
    variant("linear, beta 0.5", beta=0.5),
    variant("linear, disjoint", candidates="disjoint"),
    variant("linear, one vocabulary, beta 0.5", one_vocabulary=True, beta=0.5),
    variant("logits, beta 0", form="logits", beta=0.0),
    variant("logits, beta 0.5, disjoint", form="logits", beta=0.5, candidates="disjoint"),
    variant("logits, one vocabulary, beta 0.5", form="logits", one_vocabulary=True, beta=0.5),
    variant("logits, 1100 rows", form="logits", rows=1100),
    variant("linear, reduction none", reduction="none"),
    variant("linear, beta 0.5, disjoint, floor", beta=0.5, candidates="disjoint", teacher_mass_floor=1e-3),
    variant("linear, mean_logit, temperature 2", score="mean_logit", temperature=2.0),
    variant("linear, classes, floor", classes=True, teacher_mass_floor=1e-3, dtypes=("bfloat16",)),
    variant("logits, classes, beta 0.5", form="logits", classes=True, beta=0.5, dtypes=("float32",)),
    variant("served, beta 0.5, disjoint", form="served", beta=0.5, candidates="disjoint"),
    # Of 16-bit logits many are equal, and which of equal ones is chosen is nobody's business.
    variant("logits, top_k 16", form="logits", top_k=16, dtypes=("float32",)),
]


def items(run: Run) -> list[Item]:
    made = [Item("oracle and torch in float64", lambda: agreement(run))]
    named = [one for one in VARIANTS if run.chooses(one.name, run.cases)]
    chosen = VARIANTS[:3] if run.rehearse else named or VARIANTS
    for one in chosen:
        for dtype in one.dtypes[-1:] if run.rehearse else one.dtypes:
            made.append(Item(f"{one.name}, {dtype}", lambda one=one, dtype=dtype: check(run, one, dtype), seconds=25.0))
    return made


@dataclass(frozen=True)
class Size:
    student: int  # vocabulary
    teacher: int
    shared: int
    one: int  # the vocabulary of both, where there is one
    widths: tuple[int, int]
    rows: int | None  # None: the variant's


SIZES = {
    "real": Size(256_000, 152_064, 97_675, 128_256, (256, 256), None),
    "tiles": Size(4401, 1203, 1101, 4401, (40, 56), 20),  # several production tiles and a rest
    "toy": Size(300, 250, 150, 300, (16, 24), 12),
}


def case_of(one: Variant, dtype: str, size: Size) -> Case:
    student = Model("", size.student, size.widths[0], softcap=30.0)
    teacher, shared = Model("", size.teacher, size.widths[1]), size.shared
    if one.one_vocabulary:
        student, teacher = Model("", size.one, size.widths[0]), Model("", size.one, size.widths[1])
        shared = size.one
    return Case(one.name, student, teacher, shared, size.rows or one.rows, single=0.5, dtype=dtype, form=one.form)


def problem_of(one: Variant, dtype: str, device: str, size: str) -> Problem:
    problem = Problem(case_of(one, dtype, SIZES[size]), torch.device(device))
    if dict(one.keywords).get("candidates") == "disjoint":
        problem.units = _with_left_out(problem.units, len(problem.shared))
    if one.classes:
        problem.shared = _with_classes(problem)
    return problem


def _with_classes(problem: Problem) -> SharedVocabulary:
    """The shared vocabulary with two classes of the first ids that it lacks, three each."""
    shared, classes = problem.shared, {}
    for side in ("student", "teacher"):
        ids = getattr(shared, f"{side}_ids")
        known = torch.isin(torch.arange(len(ids) + 6, device=ids.device), ids)
        free = (~known).nonzero().squeeze(1)[:6]
        classes[f"{side}_classes"] = torch.stack([torch.arange(6, device=ids.device) // 3, free], dim=1)
    return dataclasses.replace(shared, **classes)


def _with_left_out(units: AlignedUnits, shared: int) -> AlignedUnits:
    """Up to forty shared candidates left out of every other unit."""
    device = units.student_start.device
    index = torch.arange(0, shared, max(1, shared // 40))
    unit, index = torch.meshgrid(torch.arange(0, len(units), 2), index, indexing="ij")
    left_out = torch.stack([unit.flatten(), index.flatten()], dim=1)
    parts = (getattr(units, field.name) for field in dataclasses.fields(units)[:6])
    return AlignedUnits(*(part.cpu() for part in parts), left_out=left_out).to(device)


def results(problem: Problem, one: Variant, backend: str, dtype: torch.dtype | None = None) -> Results:
    """Of one call, forward and backward, on the problem's inputs or on these in another dtype."""

    def cast(tensor: Tensor, leaf: bool = False) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(leaf)

    keywords = {**dict(one.keywords), "backend": backend}
    if one.form == "logits":
        leaves = {"logits": cast(problem.student_logits, True)}
        arguments, function = (leaves["logits"], cast(problem.teacher_logits)), simct_loss
    else:
        leaves = {"hidden": cast(problem.student_hidden, True), "head": cast(problem.student_head.weight, True)}
        student = leaves["hidden"], LMHead(leaves["head"], softcap=problem.student_head.softcap)
        if one.form == "served":
            served = problem.teacher_topk_ids, problem.teacher_topk_logprobs, problem.teacher_token_logprobs
            arguments, function = (*student, *served), topk_simct_loss
        else:
            head = LMHead(cast(problem.teacher_head.weight), softcap=problem.teacher_head.softcap)
            arguments, function = (*student, cast(problem.teacher_hidden), head), linear_simct_loss
    loss, losses = function(*arguments, problem.units, problem.shared, return_unit_losses=True, **keywords)
    loss.sum().backward()
    return {"losses": losses.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def relative_error(found: Tensor, exact: Tensor) -> float:
    difference = (found.double() - exact.double()).norm().item()
    return difference / (exact.double().norm().item() or 1.0)


def agreement(run: Run) -> None:
    for one in VARIANTS[:4]:
        problem = problem_of(one, "float32", run.device, "toy")
        if one.form == "linear" and dict(one.keywords).get("top_k"):
            one = variant(one.name, top_k=4)
        exact = results(problem, one, "reference", torch.float64)
        _compare(run, one, "float64", "torch", results(problem, one, "torch", torch.float64), exact, 1e-10)


def check(run: Run, one: Variant, dtype: str) -> None:
    problem = problem_of(one, dtype, run.device, "toy" if run.rehearse else "real")
    judge = "torch" if one.rows > 1000 else "reference"
    exact = results(problem, one, judge, torch.float64)
    failures = []
    for backend in ("triton", "torch"):
        _poison(run.device)
        try:
            found = results(problem, one, backend)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or (run.device == "cuda" and rows.breaks_device(error)):
                raise
            failures.append(error)
            _compare_failed(run, one, dtype, backend, error)
            continue
        _compare(run, one, dtype, backend, found, exact, BOUNDS[dtype], judge)
    if failures:
        raise failures[0]


def _compare(
    run: Run,
    one: Variant,
    dtype: str,
    backend: str,
    found: Results,
    exact: Results,
    bound: float,
    judge: str = "reference",
) -> None:
    for quantity, value in found.items():
        error = relative_error(value, exact[quantity])
        finite = bool(value.isfinite().all())
        # A backend's dtype: a gradient has its input's, whose rounding is most of its error.
        run.record(
            what="error", variant=one.name, dtype=dtype, backend=backend, quantity=quantity, relative_error=error,
            bound=bound, passed=finite and error < bound, finite=finite, judge=judge,
        )  # fmt: skip


def _compare_failed(run: Run, one: Variant, dtype: str, backend: str, error: Exception) -> None:
    common = dict(what="error", variant=one.name, dtype=dtype, backend=backend, passed=False)
    run.record(**common, error=rows.short(error), where=rows.where(error))


def _poison(device: str) -> None:
    """Blocks of the allocator, small and large, that hold NaN."""
    if device != "cuda":
        return
    fill: Callable[[int], Tensor] = lambda count: torch.full((count,), float("nan"), device=device)  # noqa: E731
    blocks = [fill(1 << 18) for _ in range(64)] + [fill(1 << 28)]
    del blocks
