"""`python -m bench.quality.probe`: one shortened run of the study with any options of `SimCTConfig`, beside its arms.

Where `python -m bench.quality` has made the models; appends to probes.csv there. Of the selection seed (0), judged on validation
sums, a third of a test run's steps: what an arm's learning rates are chosen by. For a look at an idea, not for a claim.

    python -m bench.quality.probe --pair digits --rate 1e-4 --set score=sum_logprob
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from bench.record import REPOSITORY

from .arms import ARMS, Arm
from .runs import Data, Key, run
from .settings import STUDENTS
from .study import QUICK, Design
from .texts import make_texts

COLUMNS = ("pair", "options", "learning_rate", "accuracy", "accuracy_stderr", "forward_kl_per_byte", "commit")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.probe", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "bench" / "results" / "quality", help="the study's")
    parser.add_argument("--pair", choices=list(STUDENTS), required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of SimCTConfig; values as JSON, or text"
    )
    parser.add_argument("--quick", action="store_true", help="of a study that was made with --quick")
    options = parser.parse_args(arguments)
    design = QUICK if options.quick else Design()
    given = dict(read_option(each) for each in options.set)
    ARMS["probe"] = Arm("probe", {"objective": "simct", **given})
    key = Key(options.pair, "probe", options.rate, 0, "validation")
    drawn = json.loads((options.folder / "teacher_samples.json").read_text())
    texts, models = make_texts(**design.prompts), options.folder / "models"
    data = Data(texts.train, texts.validation, drawn["train"], drawn["validation"])
    row = run(key, models / f"{options.pair}-0", models / "teacher", data, design.plan(key))[0]
    row |= {"options": " ".join(options.set)}
    path = options.folder / "probes.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{column} {row[column]}" for column in COLUMNS))


def read_option(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(f"--set {text}: expected OPTION=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
