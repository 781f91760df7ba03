"""`python -m simct.data.math_code data/math-code.jsonl`: the prompts of the recipes, 5,800 of mathematics and 4,200 of code.

Sources and counts are those of the scripts that the authors of SimCT published with the paper; which rows they drew is not known:
the draw is another one. A part of each data set is read from the hub; the column `source` says where a prompt is from, and which
licence it is under. Of GSM8K and MATH, which the paper evaluates on, the training halves are read.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from simct.console import before_work, console, printable
from simct.files import check_file, replaced

LONGEST = 3000  # characters of a prompt
SEED, BUFFER = 42, 5000
_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus",
)  # fmt: skip


class Source(NamedTuple):
    """A data set of the hub, and what is taken from it."""

    name: str
    licence: str
    count: int
    prompt: str  # the column of the question
    answer: Callable[[dict[str, Any]], str | None] = lambda row: None  # what a response is graded by
    configs: tuple[str | None, ...] = (None,)


def boxed(solution: str) -> str | None:
    """What is in the last \\boxed{...} of a solution."""
    start = solution.rfind("\\boxed{")
    depth = 0
    for place in range(start + len("\\boxed"), len(solution)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if not depth:
            return solution[start + len("\\boxed{") : place]
    return None


def after_marks(solution: str) -> str | None:
    """GSM8K's result, behind ####."""
    found = re.search(r"####\s*(.+?)\s*$", solution)
    return found[1].replace(",", "") if found else None


SOURCES = (
    Source("openai/gsm8k", "MIT", 1800, "question", lambda row: after_marks(row["answer"]), ("main",)),
    Source("microsoft/orca-math-word-problems-200k", "MIT", 2200, "question"),
    Source("nvidia/OpenMathInstruct-1", "NVIDIA License", 1000, "question", lambda row: row["expected_answer"]),
    Source("EleutherAI/hendrycks_math", "MIT", 800, "problem", lambda row: boxed(row["solution"]), _SUBJECTS),
    Source("nvidia/OpenCodeInstruct", "CC BY 4.0", 1800, "input"),
    Source("KodCode/KodCode-V1", "CC BY-NC 4.0", 900, "question"),
    Source("BAAI/TACO", "Apache-2.0", 900, "question"),
    Source("deepmind/code_contests", "CC BY 4.0", 600, "description"),
)


def prompts(source: Source, count: int) -> Iterator[dict[str, str]]:
    """`count` records of a source, drawn evenly over its parts. ValueError if it has fewer, or lacks a column."""
    from datasets import load_dataset

    given = set()
    for number, config in enumerate(source.configs):
        share = count * (number + 1) // len(source.configs) - count * number // len(source.configs)
        stream = load_dataset(source.name, config, split="train", streaming=True).shuffle(SEED, buffer_size=BUFFER)
        found = 0
        for row in stream if share else ():
            if source.prompt not in row:
                raise ValueError(f"{source.name} has the columns {', '.join(row)}: expected {source.prompt!r}")
            text = (row[source.prompt] or "").strip()
            if not text or len(text) > LONGEST or "[asy]" in text or text in given:  # [asy]: a drawing
                continue
            given.add(text)
            record = {"prompt": text, "source": f"{source.name} ({source.licence})"}
            answer = source.answer(row)
            yield record if not answer else {**record, "answer": str(answer)}
            found += 1
            if found == share:
                break
        if found < share:
            raise ValueError(
                f"{source.name} has {found:,} usable prompts{f' in {config}' if config else ''}: expected {share:,}"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m simct.data.math_code", description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--share", type=float, default=1.0, help="of each source's prompts, to try: 0.01 makes 100")
    options = parser.parse_args(arguments)
    with before_work():
        if not 0 < options.share <= 1:
            raise ValueError(f"--share is {options.share}: expected a number above 0, and 1 at most")
        check_file(options.output)
    total = 0
    with replaced(options.output) as file:
        for source in SOURCES:
            count = max(1, round(source.count * options.share))
            for record in prompts(source, count):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            total += count
            console.print(f"{count:>6,}  {source.name}, {source.licence}", highlight=False)
    console.print(f"{total:>6,}  prompts: {printable(options.output)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
