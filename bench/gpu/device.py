"""The device and its ceilings: versions, the copy rate, and the products of the losses at their real shapes.

16-bit operands into a float32 result is what the losses ask cuBLAS for. Each product is checked on a part of its result
against float64 before it is timed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from . import rows
from .steps import Item, Run
from .timing import times

# A head's columns (K shared ones padded to a multiple of 64, as they are, or a whole vocabulary), its width, and the rows
# of a chunk: first the ceiling. An odd number of columns takes cuBLAS off its fast path, whatever the rows.
HEADS = {
    "Gemma K padded": (97_728, 2304, (8192, 512, 1024, 2048, 4096)),
    "Gemma V": (256_000, 2304, (8192, 512, 2048)),
    "Qwen K padded": (97_728, 3584, (8192, 512, 2048)),
    "Qwen V": (152_064, 3584, (8192, 512, 2048)),
    "one vocabulary": (128_256, 4096, (8192, 512, 1024, 2048, 4096)),
    "Gemma K": (97_675, 2304, (8192, 512)),
}
RESULTS = rows.REPOSITORY / "bench" / "results"
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "rich",
    "hypothesis", "datasets", "trl", "liger-kernel", "cut-cross-entropy", "httpx", "tokenizers",
)  # fmt: skip


def items(run: Run) -> list[Item]:
    heads = {"toy": (200, 32, (16, 8))} if run.rehearse else HEADS
    made = [
        Item("versions", lambda: versions(run)),
        Item("copy", lambda: copies(run)),
        Item("launches", lambda: launches(run)),
    ]
    return made + [Item(f"products, {name}", lambda name=name: products(run, name, *heads[name])) for name in heads]


def versions(run: Run) -> None:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    found = {package: version(package) for package in PACKAGES}
    if run.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": getattr(properties, "L2_cache_size", 0) / 1e6,
            "cuda": torch.version.cuda,
            "free_gb": torch.cuda.mem_get_info()[0] / 1e9,
        }
    tf32 = torch.backends.cuda.matmul.allow_tf32
    run.record(what="versions", python=platform.python_version(), tf32=tf32, **found)


def copies(run: Run) -> None:
    size = 1 << 32 if run.device == "cuda" else 1 << 20  # bytes
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=run.device)
    target = torch.empty_like(source)
    spans = times(lambda: target.copy_(source), run.device, seconds=0.2)
    run.record(what="copy", **spans.row(), bytes_per_s=2e3 * size / spans.median)
    wide = source.view(torch.int32)[: size // 8].float()  # a head's gradient is added up like this
    total = torch.zeros_like(wide)
    spans = times(lambda: total.add_(wide), run.device, seconds=0.2)
    run.record(what="fp32 +=", **spans.row(), bytes_per_s=3e3 * wide.nbytes / spans.median)


def launches(run: Run) -> None:
    """How fast the host can launch: a loss of many small calls is bounded by it."""
    small = torch.ones(1, device=run.device)

    def thousand() -> None:
        for _ in range(1000):
            small.add_(1)

    spans = times(thousand, run.device, seconds=0.1)
    run.record(what="launch", **spans.row(), microseconds=spans.median)


def products(run: Run, name: str, columns: int, width: int, heights: tuple[int, ...]) -> None:
    gpu = run.device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32  # a CPU has no product with out_dtype
    draw = torch.Generator(run.device).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=run.device).uniform_(-1, 1, generator=draw)

    weight, all_hidden = uniform(columns, width), uniform(heights[0], width)
    all_gradient = uniform(heights[0], columns)
    total = torch.zeros(columns, width, device=run.device)
    for height in heights:
        hidden, gradient = all_hidden[:height], all_gradient[:height]
        logits = torch.empty(height, columns, device=run.device)
        made: dict[str, tuple[Tensor, Tensor, Callable[[], Tensor]]] = {
            "logits": (hidden, weight.T, lambda h=hidden: _mm(h, weight.T)),
            "logits, out": (hidden, weight.T, lambda h=hidden, out=logits: _mm(h, weight.T, out=out)),
            "logits, 16 bits": (hidden, weight.T, lambda h=hidden: torch.mm(h, weight.T)),
            "hidden": (gradient, weight, lambda g=gradient: _mm(g, weight)),
            "head": (gradient.T, hidden, lambda g=gradient, h=hidden: _mm(g.T, h)),
            "head, addmm": (gradient.T, hidden, lambda g=gradient, h=hidden: _addmm(total, g.T, h)),
            "head, addmm out": (
                gradient.T,
                hidden,
                lambda g=gradient, h=hidden: _addmm(total, g.T, h, out=total),
            ),
        }
        for kind, (left, right, call) in made.items():
            if run.left() < 3:
                raise TimeoutError("no time left in its step")
            common = dict(what="product", head=name, product=kind, columns=columns, width=width, height=height)
            try:
                total.zero_()
                error = _error(call(), left, right)
                total.zero_()
                spans = times(call, run.device, seconds=0.05, most=7)
            except torch.OutOfMemoryError:
                raise
            except Exception as failure:
                run.record(**common, status=rows.status_of(failure), error=rows.short(failure))
                if gpu and rows.breaks_device(failure):
                    raise
                continue
            rate = 2e3 * height * columns * width / spans.median
            bound = 1e-2 if kind == "logits, 16 bits" else 1e-3  # a sum of 256,000 products in float32: 2e-4
            run.record(**common, **spans.row(), flop_per_s=rate, relative_error=error, passed=error < bound)


def _mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left, right, out=out)


def _addmm(total: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if left.is_cuda:
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=out)
    return torch.addmm(total, left, right, out=out)


def _error(found: Tensor, left: Tensor, right: Tensor) -> float:
    """Relative, of the first and last rows and columns."""
    worst = 0.0
    for part in (slice(0, 64), slice(-64, None)):
        exact = left[part].double() @ right[:, part].double()
        worst = max(worst, float((found[part, part].double() - exact).norm() / exact.norm()))
    return worst


def ceilings(run: Run) -> dict[str, float]:
    """Measured in this run, else kept of the same device: "copy" in bytes a second, "product" in FLOPs a second."""
    found = _rates(run.known("device"))
    if found or run.device != "cuda":
        return found
    for path in sorted(RESULTS.glob("gpu-*/**/results.csv"), reverse=True):
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["step"] == "device"]
        if any(row.get("device") == torch.cuda.get_device_name() for row in kept):
            return _rates(kept)
    return {}


def _rates(found: list[dict]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for row in found:
        if row.get("what") == "copy":
            rates["copy"] = float(row["bytes_per_s"])
        if row.get("what") == "product" and row.get("flop_per_s") and row["product"] != "logits, 16 bits":
            rates["product"] = max(rates.get("product", 0.0), float(row["flop_per_s"]))
    return rates
