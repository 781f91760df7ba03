"""`python -m bench.quality`: trains the pairs, runs every arm on each, and writes CSV, tables and plots. Run again, it goes on.

CONTRASTS.md says what is asked, docs/evidence.md what came out. Hours of two cores; a run is one thread.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench.record import REPOSITORY

from . import plots, show
from .processes import Study
from .results import Results
from .settings import STUDENTS
from .study import QUICK, Design
from .texts import make_texts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--output", type=Path, help="default: bench/results/quality")
    parser.add_argument("--pairs", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, help="at most, of the test runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--show", action="store_true", help="run nothing: tables and plots of what is there")
    parser.add_argument(
        "--quick", action="store_true", help="tiny: shows that everything runs, its numbers mean nothing"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be fetched
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))  # of the processes to come
    folder = options.output or REPOSITORY / "bench" / "results" / "quality"
    if options.quick and options.output is None:
        parser.error("--quick needs --output: its numbers are not to be kept beside real ones")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if os.isatty(1) else 200)
    design = QUICK if options.quick else Design()
    most = options.seeds if options.seeds is not None else max(last for _, _, last in design.stages)
    stages = [(pair, first, min(last, most)) for pair, first, last in design.stages if pair in options.pairs]
    design = replace(design, stages=tuple(stage for stage in stages if stage[1] <= stage[2]))
    results = Results(folder)
    if not options.show:
        texts = make_texts(**design.prompts)
        Study(folder, design, texts, results, console).finish(options.workers)
    for pair in design.pairs:
        console.print(show.table(design, results.rows, pair))
    show.write_markdown(results.rows, design, folder)
    plots.plot_curves(results.rows, results.curves, design, folder / "curves.png")
    plots.plot_rates(results.rows, design, folder / "rates.png")
    console.print(f"results: {folder}", highlight=False)


if __name__ == "__main__":
    main()
