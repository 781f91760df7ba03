"""The short table at the end: what passed, failed or was given up, and the numbers that matter. Also all rows as CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import rows
from .steps import EXTRA, STEPS

TEXT, TABLE = "summary.txt", "results.csv"
Row = dict


def write(folder: Path) -> str:
    found = rows.read(folder / rows.NAME)
    text = "\n".join(_lines(found))
    (folder / TEXT).write_text(text + "\n", encoding="utf-8")
    rows.write_csv(folder / TABLE, found)
    return text


def _lines(found: list[Row]) -> Iterator[str]:
    sections = {"device": _device, "oracle": _oracle, "tests": _tests, "memcheck": _memcheck, "profile": _profile}
    for step, section in (sections | {"bench": _bench, "step": _step, "sweep": _sweep, "study": _study}).items():
        mine = [row for row in found if row["step"] == step]
        if mine:
            yield f"\n== {step}: {_outcome(mine)}"
            yield from section([row for row in mine if row.get("what")])
    yield "\n== steps"
    for step in STEPS | EXTRA:
        mine = [row for row in found if row["step"] == step]
        if mine:
            yield f"{step:8} {_outcome(mine)}"
    yield from _compilations(found)
    yield from _errors(found)


def _outcome(mine: list[Row]) -> str:
    """Of the items, and how the step ended."""
    items = Counter(row["status"] for row in mine if row.get("status") and row.get("item") and not row.get("what"))
    ends = [row for row in mine if not row["item"]]
    ended = f"{ends[-1]['status']} in {ends[-1]['seconds']:.0f} s" if ends else "did not end"
    return f"{ended}; items: " + (", ".join(f"{count} {status}" for status, count in items.most_common()) or "none")


def _compilations(found: list[Row]) -> Iterator[str]:
    compiling = [row for row in found if row.get("compiled")]
    for row in sorted(compiling, key=lambda row: -row["compile_seconds"])[:8]:
        yield (
            f"compiled {row['compiled']} kernels in {row['compile_seconds']:.1f} s: {row['step']}/{row['item']} "
            f"({row['compiled_kernels'][:90]})"
        )


def _errors(found: list[Row]) -> Iterator[str]:
    """Each kind once, with how often and where."""
    bad = [row for row in found if row.get("status") not in (None, "ok", "done") and row["item"] and row["step"]]
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in bad:
        kinds.setdefault((row["status"], row.get("error") or row.get("note") or ""), []).append(row)
    if kinds:
        yield "\n== what went wrong"
    for (status, error), several in list(kinds.items())[:25]:
        names = "; ".join(dict.fromkeys(f"{row['step']}/{row['item']}" for row in several))
        at = f" at {several[0]['where']}" if several[0].get("where") else ""
        yield f"{len(several)} x {status}: {error[:230]}{at} [{names[:150]}]"


def _device(mine: list[Row]) -> Iterator[str]:
    for row in mine:
        if row["what"] == "versions":
            names = (
                "device",
                "torch",
                "triton",
                "cuda",
                "transformers",
                "python",
                "tf32",
                "datasets",
                "trl",
                "liger-kernel",
            )
            yield ", ".join(f"{name} {row[name]}" for name in names if name in row)
        elif row["what"] in ("copy", "fp32 +="):
            yield f"{row['what']}: {row['bytes_per_s'] / 1e12:.2f} TB/s"
        elif row["what"] == "launch":
            yield f"launch: {row['microseconds']:.1f} us each"
    products = [row for row in mine if row["what"] == "product"]
    heights = sorted({row["height"] for row in products})
    if heights:
        yield "TFLOP/s by rows of a chunk " + " ".join(f"{height:>6}" for height in heights)
    for head, product in dict.fromkeys((row["head"], row["product"]) for row in products):
        rates = {row["height"]: row for row in products if (row["head"], row["product"]) == (head, product)}
        cells = " ".join(_rate(rates.get(height)) for height in heights)
        yield f"{head[:15]:15} {product[:16]:16} {cells}"


def _rate(row: Row | None) -> str:
    if row is None or "flop_per_s" not in row:
        return f"{'-' if row is None else 'error':>6}"
    return f"{row['flop_per_s'] / 1e12:5.0f}{' ' if row['passed'] else '!'}"


def _oracle(mine: list[Row]) -> Iterator[str]:
    errors = [row for row in mine if row["what"] == "error"]
    for backend, dtype in dict.fromkeys((row["backend"], row["dtype"]) for row in errors):
        these = [row for row in errors if (row["backend"], row["dtype"]) == (backend, dtype)]
        measured = [row for row in these if isinstance(row.get("relative_error"), float)]
        worst = max(measured, key=lambda row: row["relative_error"], default=None)
        tail = f", worst {worst['relative_error']:.1e} ({worst['variant']}: {worst['quantity']})" if worst else ""
        yield f"{backend}, {dtype}: {sum(row['passed'] for row in these)} of {len(these)} within bounds{tail}"
    for row in [row for row in errors if not row["passed"]][:20]:
        value = row.get("error") or f"{row['quantity']} {row['relative_error']} (bound {row['bound']})"
        yield f"  ! {row['variant']}, {row['dtype']}, {row['backend']}: {str(value)[:160]}"


def _tests(mine: list[Row]) -> Iterator[str]:
    for row in mine:
        if row["what"] == "tests":
            counts = ", ".join(
                f"{value} {key.removeprefix('tests_')}" for key, value in row.items() if key.startswith("tests_")
            )
            yield f"{row['note']}: {counts}"
        elif row["what"] == "test failures":
            yield f"  {row['count']} x {row['error'][:150]}"


def _memcheck(mine: list[Row]) -> Iterator[str]:
    for row in mine:
        yield f"{row['note']}, {row['calls']} calls{': ' + row['error'] if row['error'] else ''}"


def _profile(mine: list[Row]) -> Iterator[str]:
    for row in mine:
        if row["what"] == "chunk_rows":
            scratch = f", {row['scratch_bytes'] / 1e9:.2f} GB" if row.get("scratch_bytes") is not None else ""
            yield f"{row['case']}, chunk_rows {row['chunk_rows']}: {row['median_ms']:.1f} ms{scratch}"
        elif row["what"] == "profile":
            yield ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in row.items() if key not in ("step", "item", "what"))  # fmt: skip


def _bench(mine: list[Row]) -> Iterator[str]:
    losses = [row for row in mine if row["what"] == "loss"]
    measured = [row for row in losses if "median_ms" in row]
    if measured:
        yield f"{'case':22} {'method':32} {'ms':>8} {'min':>8} {'GB':>6} {'TFLOP/s':>7} {'x floor':>7} {'copy':>5} agrees"
    for case in dict.fromkeys(row["case"] for row in measured):
        for row in [row for row in measured if row["case"] == case]:
            share = f"{row['share_of_copy_rate']:.0%}" if "share_of_copy_rate" in row else ""
            floor = f"{row['of_floor']:.2f}" if "of_floor" in row else "-"
            yield (
                f"{case[:22]:22} {row['method'][:32]:32} {row['median_ms']:8.2f} {row['min_ms']:8.2f} "
                f"{row['scratch_bytes'] / 1e9:6.2f} {row.get('tflop_per_s', 0):7.0f} {floor:>7} {share:>5} "
                f"{row.get('agrees', '')}"
            )
    for row in losses:
        if "note" in row:
            yield f"{row['case']}, {row['method']}: {row['note']}"


def _step(mine: list[Row]) -> Iterator[str]:
    for case in dict.fromkeys(row["case"] for row in mine if "case" in row):
        rows_of = [row for row in mine if row.get("case") == case]
        phases = [row for row in rows_of if "median_ms" in row]
        yield f"{case}: " + ", ".join(_span(row) for row in phases)
        for row in rows_of:
            if row["what"] == "one step":
                yield _one_step(row)
            elif row["what"] == "seen":
                yield f"  {row['note']}"


def _span(row: Row) -> str:
    mean = f"mean {row['mean_ms']:.1f}, median " if "mean_ms" in row else ""
    return f"{row['method']} {mean}{row['median_ms']:.1f} ms"


def _one_step(row: Row) -> str:
    """Its phases, the longest first, and what else there was of it."""
    spans = {key.removesuffix("_ms"): value for key, value in row.items() if key.endswith("_ms") and key != "wall_ms"}
    longest = sorted((name for name in spans if spans[name] >= 1), key=lambda name: -spans[name])
    text = f"  step {row['number']}, {row['wall_ms']:.0f} ms: " + ", ".join(f"{n} {spans[n]:.0f}" for n in longest)
    asked = [f"{value} {name}" for name, value in row.items() if name.startswith("num_") and value]
    if "compiled" in row:
        asked.append(
            f"{row['compiled']} kernels compiled in {row['compile_seconds']:.1f} s ({row['compiled_kernels']})"
        )
    return "; ".join([text, *asked])


def _sweep(mine: list[Row]) -> Iterator[str]:
    for case, kernel in dict.fromkeys((row["case"], row["kernel"]) for row in mine if "kernel" in row):
        yield f"{case}, {kernel}:"
        for row in [row for row in mine if (row["case"], row.get("kernel")) == (case, kernel)]:
            yield f"  {row['ms']:8.3f} ms  {row['tile']}" if "ms" in row else f"  {row['note'][:90]}  {row['tile']}"


def _study(mine: list[Row]) -> Iterator[str]:
    for row in mine:
        if row["what"] == "study":
            yield row["table"]
