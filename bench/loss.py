"""Time and memory of the linear SimCT loss, forward and backward, against the materialised algorithm in plain PyTorch.

    python -m bench.loss                    # about a minute on two cores; prints a table, writes bench/results/loss-<device>.csv
    python -m bench.loss --rows 4096        # other sizes: --rows, --shared, --student-vocabulary ...

Random weights; three quarters of the student's rows are in single units, the others in units of 2:1 and 2:2 tokens. Every method
runs in a process of its own, so that its peak memory is its own. Memory is that above the inputs, weights included.
"""

import argparse
import csv
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from simct.metrics import peak_memory_gb
from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss


class Problem:
    """Inputs of one loss call, the same for every method."""

    def __init__(self, sizes: argparse.Namespace) -> None:
        draw = torch.Generator().manual_seed(0)
        student_v, teacher_v = sizes.student_vocabulary, sizes.teacher_vocabulary
        self.shared = SharedVocabulary(
            torch.randperm(student_v, generator=draw)[: sizes.shared].sort().values,
            torch.randperm(teacher_v, generator=draw)[: sizes.shared],
        )
        lengths = torch.tensor([(1, 1)] * 12 + [(2, 1), (2, 2)]).repeat(sizes.rows // 16, 1)
        student_length, teacher_length = lengths.T.contiguous()
        student_start = student_length.cumsum(0) - student_length
        teacher_start = teacher_length.cumsum(0) - teacher_length
        student_tokens = torch.randint(student_v, (int(student_length.sum()),), generator=draw)
        teacher_tokens = torch.randint(teacher_v, (int(teacher_length.sum()),), generator=draw)
        single = (student_length == 1) & (teacher_length == 1)
        pairs = torch.randint(sizes.shared, (int(single.sum()),), generator=draw)
        student_tokens[student_start[single]] = self.shared.student_ids[pairs]
        teacher_tokens[teacher_start[single]] = self.shared.teacher_ids[pairs]
        self.units = AlignedUnits(
            student_start, student_length, teacher_start, teacher_length, student_tokens, teacher_tokens
        )

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw) / 5

        self.student_hidden = normal(len(student_tokens), sizes.student_width).requires_grad_()
        self.teacher_hidden = normal(len(teacher_tokens), sizes.teacher_width)
        self.student_head = LMHead(normal(student_v, sizes.student_width).requires_grad_())
        self.teacher_head = LMHead(normal(teacher_v, sizes.teacher_width))

    def ours(self, **options) -> Tensor:
        return linear_simct_loss(
            self.student_hidden,
            self.student_head,
            self.teacher_hidden,
            self.teacher_head,
            self.units,
            self.shared,
            **options,
        ).sum()

    def materialised(self) -> Tensor:
        """Eq. 7 to 9, vectorised, with both sides' whole logits and autograd."""
        units = self.units
        has_continuation = units.has_continuation(self.shared)

        def log_q(logits: Tensor, side: str) -> Tensor:
            start, length, tokens = (getattr(units, f"{side}_{part}") for part in ("start", "length", "tokens"))
            logprobs = logits.log_softmax(1)
            unit = torch.repeat_interleave(torch.arange(len(units)), length)
            realised = logprobs.gather(1, tokens[:, None]).squeeze(1)
            continuation = torch.zeros(len(units)).index_add(0, unit, realised) / length
            continuation = torch.where(has_continuation, continuation, -torch.inf)
            shared = logprobs[start][:, getattr(self.shared, f"{side}_ids")]
            return torch.cat([shared, continuation[:, None]], 1).log_softmax(1)

        student = log_q(self.student_head.logits(self.student_hidden), "student")
        with torch.no_grad():
            teacher = log_q(self.teacher_head.logits(self.teacher_hidden), "teacher")
        return (student.exp() * (student - teacher).masked_fill(~student.isfinite(), 0)).sum()


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "materialised, vectorised": Problem.materialised,
    "ours": Problem.ours,
    "ours, reduction=none": lambda problem: problem.ours(reduction="none"),
    "ours, beta=0.5": lambda problem: problem.ours(beta=0.5),
    "ours, top_k=16": lambda problem: problem.ours(top_k=16),
}


def measure(name: str, sizes: argparse.Namespace) -> dict:
    problem = Problem(sizes)
    before = peak_memory_gb(torch.device("cpu"))
    seconds = []
    for _ in range(sizes.repeats + 1):
        problem.student_hidden.grad = problem.student_head.weight.grad = None
        started = time.perf_counter()
        loss = METHODS[name](problem)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    return {
        "method": name,
        "median_s": statistics.median(seconds[1:]),  # the first one warms up
        "best_s": min(seconds[1:]),
        "peak_gb": peak_memory_gb(torch.device("cpu")) - before,
        "loss": loss.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 1024), ("student-width", 640), ("teacher-width", 576), ("student-vocabulary", 50_000),
        ("teacher-vocabulary", 40_000), ("shared", 25_000), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loss-cpu.csv")
    sizes = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    results = []
    for name in track(METHODS, description="measuring", transient=True):
        with spawn.Pool(1) as pool:
            results.append(pool.apply(measure, (name, sizes)))
    common = {
        **{key: value for key, value in vars(sizes).items() if key != "output"},
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    sizes.output.parent.mkdir(parents=True, exist_ok=True)
    with sizes.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*results[0], *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in results)

    table = Table(title=f"Loss, forward and backward, float32, {sizes.rows} rows; {common['device']}")
    for column in "method", "median s", "best s", "peak GB", "time against materialised", "memory":
        table.add_column(column, justify="left" if column == "method" else "right")
    base = results[0]
    for row in results:
        ratios = f"{row['median_s'] / base['median_s']:.2f}", f"{row['peak_gb'] / base['peak_gb']:.2f}"
        table.add_row(row["method"], *(f"{row[k]:.2f}" for k in ("median_s", "best_s", "peak_gb")), *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
