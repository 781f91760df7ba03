"""The suite `cost`: what the kernels and products do, counted without a GPU, beside the floor; and predicted times.

    python -m bench --suite cost

Runs in a process of its own, where Triton's interpreter executes the kernels on small shapes: bytes by launch
(`bench.traffic`) and torch's products (`torch.utils.flop_counter`). For the real shapes the floor is
put against ceilings measured on an H100 and an H200: a prediction, with a column for what the first run on one measures.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from simct_kernels import AlignedUnits
from simct_kernels.options import LossOptions

from . import floor, record
from .cases import GEMMA, PHI, QWEN, SERVED_K, Case, Model, Problem, make_shared, make_units
from .rivals import ours
from .suites import pair

CEILINGS = {"H100": (3.0e12, 800e12), "H200": (4.3e12, 790e12)}  # bytes/s of a copy, bf16 FLOP/s of a product

STUDENT, TEACHER = Model("", 1900, 24), Model("", 1700, 20)
SINGLE = Case("single units", STUDENT, TEACHER, 1150, 24, single=1.0, dtype="float32")
SMALL = (
    SINGLE,
    SINGLE.replace(name="75 % in single units", single=0.75),
    SINGLE.replace(name="one vocabulary", teacher=Model("", 1900, 20), shared=1900),
)


def run(folder: Path, seconds: float) -> tuple[list[dict], list[dict], list[dict], str]:
    """The launches, the products and the predictions, and why something is missing. Writes a CSV file of each."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.cost", str(folder)]
    try:
        done = subprocess.run(
            command, env=environment, cwd=record.REPOSITORY, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
        note = "" if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1]}"
    except subprocess.TimeoutExpired:
        note = "left out: no time left"
    return *(_read(folder / f"{name}.csv") for name in ("launches", "products", "predictions")), note


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def launches() -> Iterator[dict]:
    """Every launch of `simct_loss` on the small cases, and the sums of its passes beside the floor's bytes."""
    from bench.traffic import count_traffic

    for case in SMALL:
        problem = Problem(case.replace(form="logits"), torch.device("cpu"))
        call = ours.prepare(problem, backend="triton")
        call().backward()  # tables that are kept are made
        problem.clear()
        with count_traffic() as forward:
            loss = call()
        with count_traffic() as backward:
            loss.backward()
        floors = problem.floor(LossOptions())
        for name, traffic, least in zip(("forward", "backward"), (forward, backward), floors, strict=True):
            for launch in traffic.launches:
                yield _launch(case, name, launch.kernel, launch.programs, [launch], None)
            yield _launch(case, name, "all", sum(n.programs for n in traffic.launches), traffic.launches, least)


def _launch(case: Case, scope: str, kernel: str, programs: int, of: Sequence, least: floor.Cost | None) -> dict:
    """ "asked" counts an element as often as it is read or written; "distinct" once a launch: the rest caches may serve."""
    accesses = [access for launch in of for side in (launch.read, launch.written) for access in side.values()]
    asked, distinct = (sum(getattr(access, name) for access in accesses) for name in ("bytes", "distinct"))
    row = {
        "case": case.name,
        "pass": scope,
        "kernel": kernel,
        "programs": programs,
        "read": sum(access.bytes for launch in of for access in launch.read.values()),
        "written": sum(access.bytes for launch in of for access in launch.written.values()),
        "distinct": distinct,
        "sectors": sum(access.sectors for access in accesses),
    }
    if least is None:
        return row | {"floor": "", "asked / floor": "", "distinct / floor": ""}
    return row | {
        "floor": least.moved,
        "asked / floor": f"{asked / least.moved:.3f}",
        "distinct / floor": f"{distinct / least.moved:.3f}",
    }


def products() -> Iterator[dict]:
    """The products of `linear_simct_loss` on the small cases, by backend, beside the restricted floor."""
    backends = ["torch"] + ["triton"] * (find_spec("triton") is not None)
    for case in SMALL:
        for top_k in (None, 16):
            for backend in backends:
                yield _products(case, backend, top_k)


def _products(case: Case, backend: str, top_k: int | None) -> dict:
    problem = Problem(case, torch.device("cpu"))
    run = ours.prepare(problem, backend=backend, top_k=top_k)
    with FlopCounterMode(display=False) as counter:
        run().backward()
    counted = counter.get_total_flops()
    least, whole = (problem.floor(LossOptions(top_k=chosen))[0].flops for chosen in (top_k, None))
    return {
        "case": case.name,
        "backend": backend,
        "top_k": "" if top_k is None else top_k,
        "flops": counted,
        "floor": least,
        "flops / floor": f"{counted / least:.3f}",
        "flops / all candidates' floor": f"{counted / whole:.3f}",
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
    model = Model("", 128_256, 4096)
    for case in (
        first,
        pair(PHI, QWEN, 98_863, 8192),
        pair(GEMMA, PHI, 123_099, 8192),
        Case("one vocabulary", model, model, 128_256, 8192),
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
                for device, (copy, product) in CEILINGS.items()
            },
            "measured_ms": "",
        }


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("python -m bench --suite cost starts this with Triton's interpreter (TRITON_INTERPRET=1)")
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    record.write(folder / "predictions.csv", list(predictions()))
    with np.errstate(all="ignore"):  # a GPU does 0 * inf in silence
        record.write(folder / "products.csv", list(products()))
        if find_spec("triton") is None:
            raise SystemExit("triton is not installed: its launches are not counted")
        record.write(folder / "launches.csv", list(launches()))


if __name__ == "__main__":
    main()
