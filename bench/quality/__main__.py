"""`python -m bench.quality`: trains the pairs, runs every arm on each, and writes CSV, tables and plots. Run again, it goes on.

Responses are sampled as in the paper (temperature 0.6, top-p 0.95) and judged at temperature 1. Each arm's learning rate is the
best of a small grid, for one seed, on the validation prompts (by the sum of both directions of the sequence KL); the table is of
other seeds, on the test prompts.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.record import REPOSITORY
from simct.files import replaced

from . import plots, show
from .arms import ARMS, CONTROL_ARMS, PUSHED_ARMS, QUICK_ARMS, RATES
from .runs import Plan, run
from .settings import QUICK_SIZES, SIZES, STUDENTS, prepare
from .texts import Texts, make_texts

KEY = ("setting", "arm", "learning_rate", "seed", "split")
QUICK = Plan(steps=4, prompts=8, tokens=24, log_every=2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--output", type=Path, help="default: bench/results/quality")
    parser.add_argument("--settings", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="of the test runs (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny: shows that everything runs, its numbers mean nothing"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be fetched
    folder = options.output or REPOSITORY / "bench" / "results" / "quality"
    if options.quick and options.output is None:
        parser.error("--quick needs --output: its numbers are not to be kept beside real ones")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if os.isatty(1) else 200)
    plan, rates, seeds = (QUICK, RATES[1:2], 2) if options.quick else (Plan(), RATES, options.seeds)
    arms = options.arms or (list(QUICK_ARMS) if options.quick else list(ARMS))
    settings = options.settings[:1] if options.quick else options.settings
    # With one vocabulary most arms are the same.
    pairs = [(setting, arm) for setting in settings for arm in arms if setting != "same" or arm in CONTROL_ARMS]
    texts = make_texts(prompts=64, held_out=16) if options.quick else make_texts()
    models = folder / "models"
    prepare(models, settings, texts, QUICK_SIZES if options.quick else SIZES, options.workers, console.print)

    write_prompts(texts, folder / "prompts.jsonl")  # for `bench.quality.gradients`

    results = Results(folder)
    common = (models, texts, plan)
    before = [(setting, "none", 0.0, 0, split) for setting in settings for split in ("validation", "test")]
    chosen = [(setting, arm, rate, 0, "validation") for setting, arm in pairs for rate in rates]
    finish(before + chosen, results, common, options.workers, console)
    high = rates[-1]  # where a collapse shows: some arms are tested there, too
    chosen = [(*pair, show.best_rate(results.rows, *pair)) for pair in pairs]
    pushed = [(*pair, high) for pair in pairs if pair[1] in PUSHED_ARMS]
    tested = [(*one, seed, "test") for seed in range(1, seeds + 1) for one in dict.fromkeys((*chosen, *pushed))]
    finish(tested, results, common, options.workers, console)
    summary = show.summarize(results.rows, settings, arms)
    for setting in settings:
        console.print(show.table(summary, setting))
    show.write_markdown(results.rows, settings, arms, high, folder / "tables.md")
    plots.plot_summary(summary, settings, folder / "summary.png")
    plots.plot_rates(results.rows, settings, arms, folder / "rates.png")
    plots.plot_curves(results.rows, results.curves, settings, arms, folder / "curves.png")
    own = [arm for arm in arms if arm in PUSHED_ARMS]
    plots.plot_curves(results.rows, results.curves, settings, own, folder / "collapse.png", high)
    console.print(f"results: {folder}", highlight=False)


def write_prompts(texts: Texts, path: Path) -> None:
    with replaced(path) as file:
        file.writelines(json.dumps({"prompt": record["prompt"]}) + "\n" for record in texts.test)


def finish(runs: list[tuple], results: Results, common: tuple, workers: int, console: Console) -> None:
    """The runs that have no result yet."""
    left = [one for one in runs if not results.has(one)]
    columns = TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn()
    context = multiprocessing.get_context("spawn")  # forked threads of torch would wait for ever
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(left))
        waiting = {pool.submit(run, *one, *common): one for one in left}
        for done in as_completed(waiting):
            results.add(done.result())
            progress.update(bar, advance=1, description=" ".join(map(str, waiting[done])))


class Results:
    """results.csv (a row a run) and curves.csv (a row a logged step), whole after every run."""

    def __init__(self, folder: Path) -> None:
        self.paths = folder / "results.csv", folder / "curves.csv"
        self.rows, self.curves = (_read(path) for path in self.paths)

    def has(self, one: tuple) -> bool:
        return any(tuple(row[name] for name in KEY) == tuple(map(str, one)) for row in self.rows)

    def add(self, found: list[dict[str, Any]]) -> None:
        judged, *curve = [{name: _text(value) for name, value in row.items()} for row in found]
        judged.pop("judged")
        self.rows.append(judged)
        self.curves += curve
        for path, rows in zip(self.paths, (self.rows, self.curves), strict=True):
            rows.sort(key=lambda row: ([row[name] for name in KEY], int(row["step"])))
            names = list(dict.fromkeys(name for row in rows for name in row))
            with replaced(path, newline="") as file:
                writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) and value else str(value)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
