"""`simct inspect`: a pair of tokenizers on a text, and with weights both models' scores of it, on the terminal and as a page."""

import argparse
from pathlib import Path

from simct.console import before_work, console, printable

# What is measured without --text: prose, code and mathematics, as students write them.
SAMPLES = {
    "Prose": "Distillation teaches a small model what a larger one knows. The two need not cut words alike: unhappiness, "
    "micro-services and na\u00efve caf\u00e9s are spelled by different pieces on either side.",
    "Code": 'def mean(values: list[float]) -> float:\n    """Arithmetic mean."""\n    if not values:\n'
    "        raise ValueError('empty')\n    return sum(values) / len(values)\n",
    "Mathematics": "Let x = 12345. Then 3x + 7 = 37042, so (3x + 7) / 2 = 18521 and \\frac{x}{5} = 2469.\n\n\\boxed{18521}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", help="folder or hub name of the student (its tokenizer is enough)")
    parser.add_argument("teacher", help="folder or hub name of the teacher (its tokenizer is enough)")
    parser.add_argument(
        "--text", type=Path, help="UTF-8 text to measure, each paragraph an answer; built-in samples if not given"
    )
    parser.add_argument("--whole", action="store_true", help="the text is one answer, blank lines and all")
    parser.add_argument("--html", type=Path, metavar="PAGE.html", help="also write one page, to look at in a browser")
    parser.add_argument("--max_tokens", type=int, help="student tokens that the page draws; 5,000 if not given")
    parser.add_argument("--verbose", action="store_true", help="also print the shared vocabulary by script")
    parser.add_argument("--models", action="store_true", help="score the text with both models (folders with weights)")
    parser.add_argument("--prompt", help="--models: what both models read before each answer; nothing if not given")
    parser.add_argument(
        "--prompt_format",
        choices=("auto", "chat", "text"),
        help="--models: how a --prompt is rendered, for each model on its own; auto if not given",
    )


def inspect(options: argparse.Namespace) -> None:
    """Raises UsageError for bad input."""
    from simct.files import check_file
    from simct.inspection.advice import advise
    from simct.inspection.page import MOST_TOKENS, write_page
    from simct.inspection.report import inspect_answers
    from simct.inspection.tables import pair_table
    from simct.inspection.terminal import print_inspection

    with before_work():
        _check(options)
        if options.html is not None:
            check_file(options.html)
        texts = _texts(options.text, options.whole)
        pair, sides, answers = (_scored if options.models else _aligned)(options, texts)
        inspection = inspect_answers(pair, *sides, answers)
        advice = advise(inspection, pair, *sides, answers)
    print_inspection(console, inspection, advice, verbose=options.verbose)
    console.print(pair_table(pair, *sides))
    if options.html is not None:
        most = MOST_TOKENS if options.max_tokens is None else options.max_tokens
        write_page(options.html, inspection, advice, note=_note(options), max_tokens=most)
        console.print(f"page: {printable(options.html)}", highlight=False, soft_wrap=True)


def _check(options: argparse.Namespace) -> None:
    if options.whole and options.text is None:
        raise ValueError("--whole is given without --text: expected a text to take as one answer")
    if options.max_tokens is not None and options.html is None:
        raise ValueError(f"--max_tokens is {options.max_tokens} without --html: expected a page to draw them on")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ValueError(f"--max_tokens is {options.max_tokens}: expected at least 1")
    for name in "prompt", "prompt_format":
        if getattr(options, name) is not None and not options.models:
            raise ValueError(f"--{name} is {getattr(options, name)!r} without --models: expected both or none")
    if options.prompt_format is not None and options.prompt is None:
        raise ValueError(f"--prompt_format is {options.prompt_format!r} without --prompt: expected both or none")
    if options.prompt == "":
        raise ValueError("--prompt is '': expected text, or no --prompt at all")


def _texts(path: Path | None, whole: bool) -> dict[str, str]:
    """Texts by title."""
    if path is None:
        return SAMPLES
    if not path.is_file():
        raise ValueError(f"--text is {str(path)!r}: there is no such file")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}") from error
    parts = [text] if whole else [part for part in text.split("\n\n") if part.strip()]
    if not text.strip():
        raise ValueError(f"text file {str(path)!r} is empty")
    name = printable(path.name)
    return {name: text} if whole else {f"{name}, paragraph {i}": part for i, part in enumerate(parts, 1)}


def _note(options: argparse.Namespace) -> str:
    if options.text is None:
        note = "Built-in samples."
    elif options.whole:
        note = f"One answer, {printable(options.text.name)}."
    else:
        note = f"Each paragraph of {printable(options.text.name)} is an answer; the blank lines between them belong to none."
    if options.models:
        behind = "after nothing but each model's beginning of text" if options.prompt is None else "after a prompt"
        note += f" Scored {behind}."
    return note


def _aligned(options: argparse.Namespace, texts: dict[str, str]):
    """The pair, both tokenizers and the answers, from tokenizers alone."""
    from simct.inspection.report import Answer
    from simct.models.loading import load_generation_config, load_tokenizer
    from simct.pairing.pair import TokenizerPair

    named = {"student": options.student, "teacher": options.teacher}
    sides = [load_tokenizer(None, folder, role) for role, folder in named.items()]
    student_config, teacher_config = (load_generation_config(folder, role) for role, folder in named.items())
    pair = TokenizerPair(*sides, student_generation_config=student_config, teacher_generation_config=teacher_config)
    student = pair.encode_student(texts.values())
    rows = zip(student, pair.encode_teacher(student), texts, strict=True)
    return pair, sides, [Answer(*row) for row in rows]


def _scored(options: argparse.Namespace, texts: dict[str, str]):
    """The same with both models' scores."""
    from dataclasses import replace

    import torch

    from simct.data.prompts import render_prompt
    from simct.inspection.unit_scores import score_answer
    from simct.models.checks import check_head, check_vocabulary
    from simct.models.loading import load_model
    from simct.teachers.local import LocalTeacher

    pair, sides, answers = _aligned(options, texts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    student = load_model(options.student, "student", dtype=dtype).eval().to(device)
    check_vocabulary(student, sides[0], "student")
    check_head(student, "student")
    teacher = LocalTeacher(load_model(options.teacher, "teacher", dtype=dtype), sides[1])
    teacher.place(device)
    given = ("", "text") if options.prompt is None else (options.prompt, options.prompt_format or "auto")
    prompts = tuple(render_prompt(given[0], side, given[1]) for side in sides)
    with console.status("scoring"):
        answers = [
            score_answer(student, teacher, pair, replace(answer, prompt=options.prompt), prompts) for answer in answers
        ]
    return pair, sides, answers
