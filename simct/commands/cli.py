"""The command line: `simct demo`, `train`, `inspect`, `recipes`, `answers`, `eval`."""

import argparse
import sys
from pathlib import Path

from simct.commands import inspect as inspect_command
from simct.commands.options import with_option_files
from simct.commands.train import RunArguments, train
from simct.console import UsageError, console, errors
from simct.secrets import redact

__all__ = ["RunArguments", "UsageError", "main", "with_option_files"]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows escapes
    parser = argparse.ArgumentParser(prog="simct", description="Cross-tokenizer on-policy distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="distil a small teacher into a small student, offline, in two minutes")
    demo.add_argument("--output", type=Path, default=Path("simct-demo"), help="folder for the student and the curves")
    demo.add_argument("--steps", type=int, default=100, help="optimiser steps")
    demo.add_argument("--seed", type=int, default=0)

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
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "demo":
            from simct.demo import run_demo
            from simct.training.checks import check_writable

            if options.steps < 1:
                raise UsageError(f"--steps is {options.steps}: expected at least 1")
            try:
                check_writable(str(options.output))
            except ValueError as error:
                raise UsageError(error) from error
            run_demo(options.output, steps=options.steps, seed=options.seed, console=console)
        elif options.command == "inspect":
            inspect_command.inspect(options)
        elif options.command == "recipes":
            show_recipes(options.name)
        elif options.command == "answers":
            answers(own)
        elif options.command == "eval":
            from simct.commands.eval import main as evaluate

            try:
                evaluate(with_option_files(own, positional="checkpoint"))
            except ValueError as error:
                raise UsageError(error) from error
        else:
            train(own)
    except UsageError as error:
        errors.print(
            redact(f"simct {options.command}: error: {error}"), style="bold red", markup=False, highlight=False
        )
        raise SystemExit(2) from error


def show_recipes(name: str | None) -> None:
    from simct.commands.recipe import find_recipe, recipe_table

    try:
        if name is None:
            console.print(recipe_table())
        else:
            print(find_recipe(name))
    except ValueError as error:
        raise UsageError(error) from error


def answers(argv: list[str]) -> None:
    """`simct answers --model M --data FILE.jsonl --output FILE.jsonl [--recipe NAME]`"""
    from rich.progress import Progress
    from transformers import HfArgumentParser

    from simct.commands.answers import AnswerArguments, write_answers

    parser = HfArgumentParser(AnswerArguments, prog="simct answers", description=answers.__doc__, allow_abbrev=False)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(with_option_files(argv), look_for_args_file=False)
        with Progress(console=console) as bar:
            task = bar.add_task("answering", total=None)
            counts = write_answers(
                arguments, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
    except (ValueError, OSError) as error:
        raise UsageError(error) from error
    for name, count in counts.items():
        console.print(f"{name.replace('_', ' ')}: {count:,}", highlight=False)
    console.print(f"answers: {arguments.output}", highlight=False)


if __name__ == "__main__":
    main()
