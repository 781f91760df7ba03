"""The command line: `simct demo`, `train`, `inspect`, `recipes`, `answers`, `eval`. Whatever goes wrong is said in one line."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from simct.commands import inspect as inspect_command
from simct.commands.train import RunArguments, train
from simct.console import TELLING, UsageError, before_work, console, error_line, errors, printable
from simct.secrets import shown_text

__all__ = ["RunArguments", "main"]


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Ends with 2 for bad input found before any work, 1 for what went wrong later, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    traced = "--traceback" in argv  # wherever it stands
    argv = [word for word in argv if word != "--traceback"]
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows escapes
    name = " ".join(["simct", *(word for word in argv[:1] if word in COMMANDS)])
    with one_line_warnings():
        try:
            run(argv)
            sys.stdout.flush()  # a full disk behind it is found here
        except BrokenPipeError:  # `simct recipes | head -1`
            console.on_broken_pipe()
        except KeyboardInterrupt as error:
            fail(name, error, "interrupted", 130, traced)
        except Exception as error:
            hint = "" if traced or isinstance(error.__cause__ or error, TELLING) else " (--traceback shows where)"
            code = 2 if isinstance(error, (UsageError, ValueError)) else 1
            fail(name, error, f"error: {error_line(error)}{hint}", code, traced)


def fail(name: str, error: BaseException, message: str, code: int, traced: bool) -> None:
    try:
        sys.stdout.flush()
    except OSError:  # at its exit Python would try once more, and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for line in trace(error) if traced else ():
        errors.print(line, soft_wrap=True)
    errors.print(f"{name}: {message}", style="bold red", soft_wrap=True)
    raise SystemExit(code) from error


def trace(error: BaseException | None) -> Iterator[str]:
    """The lines of a traceback, causes first; none of them can be forged by a message."""
    if error is None:
        return
    yield from trace(error.__cause__ or (None if error.__suppress_context__ else error.__context__))
    for frame in traceback.format_tb(error.__traceback__):
        yield from map(printable, frame.splitlines())
    yield f"{type(error).__name__}: {error_line(error)}"


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings without the place in the code; text from data in them forges no line."""

    def line(message, category, filename, lineno, line=None) -> str:
        return f"{category.__name__}: {error_line(str(message))}\n"

    before, warnings.formatwarning = warnings.formatwarning, line
    try:
        yield
    finally:
        warnings.formatwarning = before


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)


def run(argv: list[str]) -> None:
    parser = Parser(prog="simct", description="Cross-tokenizer on-policy distillation.")
    parser.add_argument(
        "--traceback", action="store_true", help="of an error, show also where in the code it came from"
    )
    parser.add_argument("--version", action="version", version=f"simct {import_module('simct').__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("demo", help="distil a small teacher into a small student, offline, in two minutes")
    one.add_argument("--output", type=Path, default=Path("simct-demo"), help="folder for the student and the curves")
    one.add_argument("--steps", type=int, default=100, help="optimiser steps")
    one.add_argument("--seed", type=int, default=0)

    commands.add_parser("train", help="distil any teacher into any student (simct train --help)", add_help=False)

    inspect = commands.add_parser("inspect", help="what a teacher's tokenizer can supervise of a student's text")
    inspect_command.add_arguments(inspect)

    recipes = commands.add_parser("recipes", help="the paper's three pairs, step by step, as option files")
    recipes.add_argument("name", nargs="?", help="print this recipe's path (trl sft --config $(simct recipes NAME))")

    commands.add_parser("answers", help="a teacher's answers to prompts, to warm a student up (--help)", add_help=False)
    commands.add_parser("eval", help="a checkpoint on benchmarks, by lm-evaluation-harness (--help)", add_help=False)

    options, rest = parser.parse_known_args(argv)
    own = argv[argv.index(options.command) + 1 :]  # of the commands that read their options themselves
    if rest and options.command not in ("train", "answers", "eval"):
        raise UsageError(f"unrecognized arguments: {shown_text(' '.join(rest))}")
    command = COMMANDS[options.command]
    command(own if options.command in ("train", "answers", "eval") else options)


def demo(options: argparse.Namespace) -> None:
    from simct.demo import run_demo
    from simct.training.checks import check_writable

    with before_work():
        if options.steps < 1:
            raise ValueError(f"--steps is {options.steps}: expected at least 1")
        check_writable(str(options.output))
    run_demo(options.output, steps=options.steps, seed=options.seed, console=console)


def show_recipes(options: argparse.Namespace) -> None:
    from simct.commands.recipe import find_recipe, recipe_table

    if options.name is None:
        console.print(recipe_table())
    else:
        print(find_recipe(options.name))


def answers(argv: list[str]) -> None:
    """Imported when asked for, as is the evaluation: both bring PyTorch."""
    from simct.commands.answers import main as answer

    answer(argv)


def evaluate(argv: list[str]) -> None:
    from simct.commands.eval import main as evaluate

    evaluate(argv)


COMMANDS = {
    "demo": demo,
    "train": train,
    "inspect": inspect_command.inspect,
    "recipes": show_recipes,
    "answers": answers,
    "eval": evaluate,
}


if __name__ == "__main__":
    main()
