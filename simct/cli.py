"""The command line: `simct demo`, `simct train`, `simct inspect`."""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

console = Console()
errors = Console(stderr=True)

# What `simct inspect` measures without --text: prose, code and mathematics, as students write them.
SAMPLES = (
    "Distillation teaches a small model what a larger one knows. The two need not cut words alike: unhappiness, "
    "micro-services and na\u00efve caf\u00e9s are spelled by different pieces on either side.",
    'def mean(values: list[float]) -> float:\n    """Arithmetic mean."""\n    if not values:\n'
    "        raise ValueError('empty')\n    return sum(values) / len(values)\n",
    "Let x = 12345. Then 3x + 7 = 37042, so (3x + 7) / 2 = 18521 and \\frac{x}{5} = 2469.\n\n\\boxed{18521}",
)


@dataclass
class RunArguments:
    """What a training run reads. Every option of `SimCTConfig` is an option of `simct train` as well."""

    student: str = field(metadata={"help": "The student: a folder or hub name."})
    teacher: str = field(metadata={"help": "The teacher: a folder or hub name."})
    data: str = field(metadata={"help": "Prompts: a JSONL file with `prompt` or `messages` on every line."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out prompts, evaluated before and after."})
    eval_prompts: int = field(default=0, metadata={"help": "Without eval_data: hold out this many prompts of data."})


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
    inspect.add_argument("student", help="folder or hub name of the student (its tokenizer is enough)")
    inspect.add_argument("teacher", help="folder or hub name of the teacher (its tokenizer is enough)")
    inspect.add_argument("--text", type=Path, help="UTF-8 text to measure; built-in samples if not given")

    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "demo":
            from simct.checks import check_writable
            from simct.demo import run_demo

            if options.steps < 1:
                raise UsageError(f"--steps is {options.steps}: expected at least 1")
            try:
                check_writable(str(options.output))
            except ValueError as error:
                raise UsageError(error) from error
            run_demo(options.output, steps=options.steps, seed=options.seed, console=console)
        elif options.command == "inspect":
            inspect_pair(options.student, options.teacher, options.text)
        else:
            train(argv[argv.index("train") + 1 :])
    except UsageError as error:
        errors.print(f"simct {options.command}: error: {error}", style="bold red", markup=False, highlight=False)
        raise SystemExit(2) from error


class UsageError(Exception):
    """Bad input, found before any long work: reported without a traceback."""


def train(argv: list[str]) -> None:
    """`simct train --student S --teacher T --data FILE.jsonl [--config FILE.yaml] [any SimCTConfig option]`."""
    from transformers import HfArgumentParser

    from simct.config import SimCTConfig
    from simct.display import coverage_table, evaluation_table, pair_table, plot_curves
    from simct.progress import ProgressBar
    from simct.prompts import prompt_of, read_prompts
    from simct.trainer import SimCTTrainer

    options = {"prog": "simct train", "description": train.__doc__, "allow_abbrev": False}
    parser = HfArgumentParser((RunArguments, SimCTConfig), **options)
    parser.add_argument("--config", help="YAML file with any of these options; the command line takes precedence")
    try:
        run, config, _ = parser.parse_args_into_dataclasses(with_config_file(argv), look_for_args_file=False)
        records = read_prompts(run.data)
        if not 0 <= run.eval_prompts < len(records):
            raise ValueError(
                f"eval_prompts is {run.eval_prompts}: expected fewer than the {len(records)} records of {run.data}"
            )
        held_out = read_prompts(run.eval_data) if run.eval_data else records[len(records) - run.eval_prompts :]
        if not run.eval_data and run.eval_prompts:
            records = records[: -run.eval_prompts]
        resume = checkpoint(config.resume_from_checkpoint, config.output_dir)
        trainer = SimCTTrainer(run.student, run.teacher, config, records, held_out or None)
        bar = ProgressBar.install(trainer, console)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UsageError(error) from error

    if trainer.is_world_process_zero():
        texts = [prompt if isinstance(prompt := prompt_of(r), str) else prompt[-1]["content"] for r in records[:200]]
        console.print(pair_table(trainer.pair, trainer.processing_class, trainer.teacher.tokenizer))
        console.print(coverage_table(trainer.pair.coverage(texts)), "of the first prompts' own text\n")
    before = evaluate(trainer) if held_out and not resume else None
    with bar:
        trainer.train(resume_from_checkpoint=resume)
    after = evaluate(trainer) if held_out else None
    trainer.save_model()
    if trainer.is_world_process_zero():
        if before:
            trainer.state.log_history.insert(0, {"step": 0, **before})
        curves = Path(config.output_dir) / "curves.png"
        plot_curves(trainer.state.log_history, curves)
        trainer.state.save_to_json(str(Path(config.output_dir) / "trainer_state.json"))
        if before and after:
            console.print(evaluation_table(before, after))
        console.print(f"student: {config.output_dir}\ncurves:  {curves}", highlight=False)


def checkpoint(asked: str | None, folder: str) -> str | None:
    """The checkpoint to resume from: a path, or "latest" for the newest whole one in the output folder. ValueError if it is not there."""
    from simct.checkpoints import newest_complete

    if asked is None or asked.lower() == "false":
        return None
    found = newest_complete(folder) if asked.lower() in ("latest", "true") else asked
    if found is None or not Path(found).is_dir():
        raise ValueError(f"resume_from_checkpoint is {asked!r}: there is no such checkpoint (output_dir {folder!r})")
    return found


def evaluate(trainer) -> dict[str, float]:
    with console.status("evaluating on held-out prompts"):
        return trainer.evaluate()


def with_config_file(argv: list[str]) -> list[str]:
    """The command line with the options of `--config FILE.yaml` put before it, so that its own win."""
    import yaml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return argv
    if not Path(path).is_file():
        raise ValueError(f"config file {path!r} does not exist")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path!r} is not YAML: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"config file {path!r} holds {type(options).__name__}: expected a mapping of options")
    words = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words + argv


def inspect_pair(student: str, teacher: str, text: Path | None) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from simct.display import coverage_table, cut_text, pair_table
    from simct.pair import TokenizerPair

    def generation_config(name: str) -> GenerationConfig | None:
        try:
            return GenerationConfig.from_pretrained(name)
        except OSError:  # a folder with only a tokenizer
            return None

    try:
        sides = [AutoTokenizer.from_pretrained(name) for name in (student, teacher)]
        pair = TokenizerPair(
            *sides,
            student_generation_config=generation_config(student),
            teacher_generation_config=generation_config(teacher),
        )
        texts = list(SAMPLES) if text is None else [p for p in text.read_text("utf-8").split("\n\n") if p.strip()]
        if not texts:
            raise ValueError(f"text file {str(text)!r} is empty")
    except (ValueError, OSError) as error:
        raise UsageError(error) from error
    console.print(pair_table(pair, *sides))
    console.print(coverage_table(pair.coverage(texts)))
    console.print(cut_text(pair.cut(texts[0][:400]), console.width), soft_wrap=True)


if __name__ == "__main__":
    main()
