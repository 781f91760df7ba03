"""The suite `cost`: every byte and product of a call at the real sizes, counted without a GPU, and the time that it predicts.

    python -m bench --suite cost

A call runs on tensors without data (`bench/counting.py`), in a process of its own. Each stage's time is the longest of what
its bytes take at the rate of a copy, its products at the rate measured for products of these shapes, and what comes from the
L2 cache at that cache's. Beside it the floor at the same ceilings: each needed element once.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions

from . import floor, record
from .cases import GEMMA, PHI, QWEN, SERVED_K, Case, Model, make_shared, make_units
from .counting import Counter, Operation, Rows, pretended_gpu
from .suites import pair

# bytes/s of a copy, bf16 FLOP/s of a product, bytes/s of the L2 cache. The H100's first two were measured here (a copy at 3.02,
# products of these heads at 600 to 790 TFLOP/s), the others by others.
CEILINGS = {"H100": (3.0e12, 728e12, 5.5e12), "H200": (4.3e12, 728e12, 5.5e12)}

LLAMA = Model("Llama-3.1-8B", 128_256, 4096)
ONE_VOCABULARY = Case("one vocabulary", LLAMA, LLAMA, LLAMA.vocabulary, 8192)


def run(folder: Path, seconds: float) -> tuple[list[dict], list[dict], str]:
    """What the calls do by stage, the floors, and why something is missing. Writes a CSV file of each."""
    note = counted_apart("bench.cost", folder, seconds)
    return *(read(folder / f"{name}.csv") for name in ("counted", "predictions")), note


def counted_apart(module: str, folder: Path, seconds: float) -> str:
    """Runs `python -m MODULE FOLDER`, where launches are counted whatever Triton does in this process. Returns what went wrong."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, str(folder)]
    try:
        done = subprocess.run(
            command, env=environment, cwd=record.REPOSITORY, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        return "left out: no time left"
    return "" if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1]}"


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def counted() -> Iterator[dict]:
    """Each stage of `linear_simct_loss` and `simct_loss` with their gradients, and the whole calls."""
    first = pair(GEMMA, QWEN, 97_675, 8192)
    headline = worked_example(), make_shared(first)
    one = make_units(ONE_VOCABULARY, make_shared(ONE_VOCABULARY)), make_shared(ONE_VOCABULARY)
    for name, case, inputs in (("headline", first, headline), ("one vocabulary", ONE_VOCABULARY, one)):
        for form, count in (("linear", count_linear), ("logits", count_logits)):
            yield from _by_stage(f"{name}, {form}", *count(case, *inputs))


def count_linear(
    case: Case, units: AlignedUnits, shared: SharedVocabulary, chunk_rows: int | str = "auto", **options
) -> tuple[Counter, float]:
    """A call's operations, and the seconds of the floor on an H100."""
    from simct_kernels.triton_backend import linear_job

    sizes = [(side.vocabulary, side.width) for side in (case.student, case.teacher)]
    least = floor.total(floor.linear_floor(units, shared, *sizes, options=LossOptions(**options)))

    def call(units: AlignedUnits, shared: SharedVocabulary) -> None:
        job = linear_job(units, shared, LossOptions(**options), *heads, chunk_rows, torch.float32)
        _, (_, by_weight, _) = job.run(*hidden, (True, True, False))
        by_weight.make(torch.empty((), device="meta"), torch.bfloat16)

    heads = [
        LMHead(_empty(*size), softcap=side.softcap)
        for size, side in zip(sizes, (case.student, case.teacher), strict=True)
    ]
    heads[0].weight.requires_grad_()
    hidden = [_empty(len(tokens), size[1]) for tokens, size in zip(_tokens(units), sizes, strict=True)]
    inputs = (*hidden, *(head.weight for head in heads))
    counter = Counter(len(units.student_tokens), {size[1] for size in sizes}, inputs=inputs)
    return _count(counter, call, units, shared), _seconds(least)


def count_logits(case: Case, units: AlignedUnits, shared: SharedVocabulary, **options) -> tuple[Counter, float]:
    from simct_kernels.triton_backend.candidates import divergence
    from simct_kernels.triton_backend.columns import columns_of, tables
    from simct_kernels.triton_backend.gradient import write_gradient
    from simct_kernels.triton_backend.logits import _candidates

    settings = LossOptions(**options)
    widths = case.student.vocabulary, case.teacher.vocabulary
    least = sum(floor.logits_floor(units, shared, *widths, options=settings), floor.Cost())
    given = {}
    for side, width in zip(("teacher", "student"), reversed(widths), strict=True):
        needed = floor.needed(units, shared, side, settings)
        given[width] = Rows(needed.whole, needed.whole_first)
    logits = [_empty(len(tokens), width) for tokens, width in zip(_tokens(units), widths, strict=True)]

    def call(units: AlignedUnits, shared: SharedVocabulary) -> None:
        candidates = _candidates(*logits, units, shared, settings)
        found = divergence(candidates, settings)
        found_tables = tables(columns_of(shared.student_ids), columns_of(shared.teacher_ids), widths[0])
        write_gradient(torch.empty_like(logits[0]), found_tables, candidates, found, None, settings)

    counter = Counter(len(units.student_tokens), set(), given, tuple(logits))
    return _count(counter, call, units, shared), _seconds(least)


def _count(counter: Counter, call: Callable, units: AlignedUnits, shared: SharedVocabulary) -> Counter:
    units, shared = units.to("meta"), shared.to("meta")
    with pretended_gpu(counter), torch.no_grad(), counter:
        call(units, shared)
    return counter


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _tokens(units: AlignedUnits) -> tuple[Tensor, Tensor]:
    return units.student_tokens, units.teacher_tokens


def _seconds(cost: floor.Cost, cached: int = 0, device: str = "H100") -> float:
    copy, product, cache = CEILINGS[device]
    return max(cost.moved / copy, cost.flops / product, cached / cache)


def _by_stage(name: str, counter: Counter, least: float) -> Iterator[dict]:
    stages: dict[str, list[Operation]] = {}
    for operation in counter.operations:
        stages.setdefault(operation.stage, []).append(operation)
    whole = 0.0
    for stage, operations in sorted(stages.items()):
        seconds = sum(_seconds(floor.Cost(each.read, each.written, each.flops), each.cached) for each in operations)
        whole += seconds
        yield _row(name, stage, operations, seconds, "", "")
    yield _row(name, "all", counter.operations, whole, f"{whole / least:.2f}", f"{counter.peak / 1e9:.2f}") | {
        "waits": counter.waits
    }


def _row(name: str, stage: str, operations: list[Operation], seconds: float, of_floor: str, peak: str) -> dict:
    flops = sum(each.flops for each in operations)
    return {
        "case": name,
        "stage": stage,
        "launches": len(operations),
        "waits": "",
        "read_GB": f"{sum(each.read for each in operations) / 1e9:.2f}",
        "written_GB": f"{sum(each.written for each in operations) / 1e9:.2f}",
        "L2_GB": f"{sum(each.cached for each in operations) / 1e9:.2f}",
        "TFLOP": f"{flops / 1e12:.2f}" if flops else "",
        "predicted_ms_H100": f"{1e3 * seconds:.2f}",
        "x floor": of_floor,
        "held_GB": peak,
    }


def worked_example() -> AlignedUnits:
    """8,192 student tokens, 75 % of them in single units; 2,050 student and 1,800 teacher rows in 900 longer units."""
    lengths = torch.tensor([(1, 1)] * 6142 + [(2, 2)] * 650 + [(3, 2)] * 250)
    case = pair(GEMMA, QWEN, 97_675, 8192)
    shared = make_shared(case)
    student, teacher = lengths.T.contiguous()
    tokens = torch.zeros(int(student.sum()), dtype=torch.int64), torch.zeros(int(teacher.sum()), dtype=torch.int64)
    starts = student.cumsum(0) - student, teacher.cumsum(0) - teacher
    tokens[0][starts[0][:6142]], tokens[1][starts[1][:6142]] = shared.student_ids[0], shared.teacher_ids[0]
    return AlignedUnits(starts[0], student, starts[1], teacher, *tokens)


def predictions() -> Iterator[dict]:
    """Each stage of the losses at real shapes: its work, and its time if it ran at the measured ceilings."""
    first = pair(GEMMA, QWEN, 97_675, 8192)
    yield from _stages("the worked example", first, worked_example())
    for case in (
        first,
        pair(PHI, QWEN, 98_863, 8192),
        pair(GEMMA, PHI, 123_099, 8192),
        ONE_VOCABULARY,
    ):
        yield from _stages(case.name, case, make_units(case, make_shared(case)))


def _stages(name: str, case: Case, units: AlignedUnits) -> Iterator[dict]:
    shared = make_shared(case)
    student, teacher = ((side.vocabulary, side.width) for side in (case.student, case.teacher))
    linear = floor.linear_floor(units, shared, student, teacher)
    of_student, of_teacher = (floor.needed(units, shared, side, LossOptions()) for side in ("student", "teacher"))
    tiles = of_student.elements(len(shared), student[0]), of_teacher.elements(len(shared), teacher[0])
    again = (of_teacher.first + of_teacher.whole_first) * len(shared)
    stages = {f"linear: product, {product}": cost for product, cost in linear.items()}
    stages["linear: all products"] = floor.Cost(flops=sum(cost.flops for cost in linear.values()))
    # The tiles of logits are float32, the gradient that is multiplied on has 16 bits.
    stages["linear: losses from the tiles"] = floor.Cost(read=4 * sum(tiles))
    stages["linear: gradient from the tiles"] = floor.Cost(read=4 * (tiles[0] + again), written=2 * tiles[0])
    rows = len(units.student_tokens), len(units.teacher_tokens)
    stages["materialised: all products"] = floor.Cost(
        flops=sum(floor.materialised_flops(*rows, student, teacher).values())
    )
    forward, backward = floor.logits_floor(units, shared, student[0], teacher[0])
    stages |= {"logits: forward": forward, "logits: backward": backward}
    if not case.one_vocabulary:
        stages[f"served, k = {SERVED_K}: all products"] = floor.Cost(
            flops=sum(cost.flops for cost in floor.served_floor(units, shared, student, SERVED_K).values())
        )
    for stage, cost in stages.items():
        # A product's own reads and writes hide behind it; what only moves bytes is as slow as a copy.
        by_flops = bool(cost.flops)
        yield {
            "case": name,
            "stage": stage,
            "TFLOP": f"{cost.flops / 1e12:.2f}" if cost.flops else "",
            "GB": f"{cost.moved / 1e9:.2f}" if cost.moved else "",
            **{
                f"predicted_ms_{device}": f"{1e3 * (cost.flops / product if by_flops else cost.moved / copy):.2f}"
                for device, (copy, product, _) in CEILINGS.items()
            },
            "measured_ms": "",
        }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    record.write(folder / "predictions.csv", list(predictions()))
    if find_spec("triton") is None:
        raise SystemExit("triton is not installed: its launches are not counted")
    record.write(folder / "counted.csv", list(counted()))


if __name__ == "__main__":
    main()
