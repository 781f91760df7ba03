"""`simct train`: a run from the command line, its recipe, its dry run, its tables and curves."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from simct.console import before_work, console, printable
from simct.training.options import option, required

FIRST_EVALUATION = "evaluation_before.json"  # in the output folder: what a resumed run compares with

# Of a dry run, on a machine without the GPU or the data that the run is meant for.
ASSUMED_GPU_GB, ASSUMED_PROMPT_TOKENS = 80, 512


@dataclass
class RunArguments:
    """What a training run reads. Every option of `SimCTConfig` is an option of `simct train` as well."""

    student: str = required("The student: a folder or hub name.", "Always.")
    teacher: str = required(
        "The teacher: a folder or hub name (with teacher_url: of its tokenizer); or several, as JSON, by the names in the column "
        "`teacher`.",
        "Always.",
    )
    data: str = required(
        "Prompts: a JSONL or Parquet file, a folder of either, or a hub data set (name or name:config).", "Always."
    )
    data_split: str = option("train", "Split of a folder or hub data set.", "`train[:1000]` for a trial.")
    streaming: bool = option(
        False,
        "Read and check the data while training (needs max_steps).",
        "For data larger than the memory or the disk.",
    )
    eval_data: str | None = option(
        None, "Held-out prompts, evaluated before and after.", "Where there is a test set: it says what was gained."
    )
    eval_prompts: int = option(
        0, "Without eval_data: hold out this many prompts of data.", "64 and more, to see what was gained."
    )
    peft_config: str | None = option(
        None,
        'Train an adapter: a PEFT configuration as JSON, {"peft_type": "LORA", "r": 16, ...}.',
        "When memory is short, or the base should stay as it is; with a learning rate of 1e-4 or so.",
    )
    merge_adapter: bool = option(
        False, "Save the student with its adapter merged.", "For servers and tools that read whole models only."
    )
    dry_run: bool = option(
        False,
        "Print the resolved options, the pair and the memory by part, and stop.",
        "Before each long run.",
    )
    assume_memory_gb: float | None = option(
        None, "dry_run: the memory of the device that the run is meant for.", "When that device is not here."
    )
    assume_processes: int | None = option(
        None, "dry_run: the processes that the run is meant for, a device each.", "For a run on several GPUs."
    )


def train(argv: list[str]) -> None:
    """`simct train --student S --teacher T --data DATA [--recipe NAME] [--config FILE.yaml] [any SimCTConfig option]`."""
    from simct.commands.train_help import asked, help_text

    if (topic := asked(argv)) is not None:
        print(help_text(topic))
        return

    import torch

    from simct.commands.options import OptionParser
    from simct.inspection.samples import SamplePages
    from simct.inspection.tables import coverage_table, pair_table
    from simct.training.config import SimCTConfig, from_json
    from simct.training.plots import evaluation_table, plot_curves, plot_phases
    from simct.training.progress import ProgressBar
    from simct.training.trainer import SimCTTrainer

    quiet_libraries()
    here = torch.accelerator.is_available()
    planned = not here and any(word.split("=")[0] in ("--dry_run", "--dry-run") for word in argv)  # for a GPU elsewhere
    if planned:  # or bf16 would be refused
        argv = [*argv, "--use_cpu", "true"]
    parser = OptionParser((RunArguments, SimCTConfig), prog="simct train", description=train.__doc__)
    with before_work():
        run, config, files = parser.parse(argv)
        adapter = read_adapter(run.peft_config)
        if run.merge_adapter and adapter is None:
            raise ValueError("merge_adapter is True, but there is no peft_config: expected an adapter to merge")
        if run.dry_run:
            if planned and (config.bf16 or config.fp16) and run.assume_memory_gb is None:
                run.assume_memory_gb = ASSUMED_GPU_GB
                console.print(
                    f"No GPU here: one of {ASSUMED_GPU_GB} GB is assumed (--assume_memory_gb).", highlight=False
                )
            fits = dry_run(run, config, argv, adapter)
        else:
            records, held_out = read_data(run, config)
            resume = checkpoint(config.resume_from_checkpoint, config.output_dir)
            teacher = from_json("teacher", run.teacher)
            trainer = SimCTTrainer(run.student, teacher, config, records, held_out, peft_config=adapter)
            if resume:
                trainer.check_checkpoint(resume)
            if config.inspect_samples:
                trainer.add_callback(SamplePages(trainer))
            notes = {"Recipe": files.recipe, "Options from": files.config, "Data": run.data}
            trainer.card_notes = {what: name for what, name in notes.items() if name}
            bar = ProgressBar.install(trainer, console)
    if run.dry_run:
        raise SystemExit(0 if fits else 1)

    if trainer.is_world_process_zero():
        for name, scorer in trainer.scorers.items():
            if len(trainer.scorers) > 1:
                console.print(f"teacher {name!r}", highlight=False)
            console.print(pair_table(scorer.pair, trainer.processing_class, scorer.teacher.tokenizer))
        if (coverage := trainer.prompt_coverage()) is not None:
            console.print(coverage_table(coverage, "the first prompts' own text"), "")
        if resume:
            console.print(f"resuming from {printable(resume)}", highlight=False, soft_wrap=True)
    first = Path(config.output_dir) / FIRST_EVALUATION
    before = first_evaluation(trainer, first, resume) if held_out is not None else None
    with bar:
        trainer.train(resume_from_checkpoint=resume)
    if run.merge_adapter:
        trainer.save_merged(config.output_dir)
    else:
        trainer.save_model()
    after = evaluate(trainer) if held_out is not None else None  # what goes wrong here loses nothing
    if trainer.is_world_process_zero():
        if before:
            trainer.state.log_history.insert(0, {"step": 0, **before})
        curves, timeline = (Path(config.output_dir) / name for name in ("curves.png", "timeline.png"))
        plot_curves(trainer.state.log_history, curves)
        plot_phases(trainer.state.log_history, timeline)
        trainer.state.save_to_json(str(Path(config.output_dir) / "trainer_state.json"))
        trainer.create_model_card()  # once more, with the curves
        if before and after:
            console.print(evaluation_table(before, after))
        for what, path in (("student: ", config.output_dir), ("curves:  ", curves), ("timeline:", timeline)):
            console.print(f"{what} {printable(path)}", highlight=False, soft_wrap=True)


def read_data(run: RunArguments, config):
    """The records to train on and the held-out ones (None if there are none)."""
    from simct.data.records import load_records, part_of

    options = dict(on_bad_row=config.on_bad_row)  # what is skipped is a warning
    records = load_records(run.data, split=run.data_split, streaming=run.streaming, **options)
    if run.streaming and run.eval_prompts:
        raise ValueError(f"eval_prompts is {run.eval_prompts}, but the data are streamed: expected eval_data")
    if run.eval_data:
        return records, load_records(run.eval_data, split=run.data_split, **options)
    if not run.eval_prompts:
        return records, None
    if not 0 <= run.eval_prompts < len(records):
        raise ValueError(
            f"eval_prompts is {run.eval_prompts}: expected fewer than the {len(records)} records of {run.data}"
        )
    cut = len(records) - run.eval_prompts
    return part_of(records, 0, cut), part_of(records, cut, len(records))


def read_adapter(given: str | None):
    """The PEFT configuration that JSON on the command line, or a mapping in a YAML file, describes."""
    from simct.training.config import from_json

    if given is None:
        return None
    options = from_json("peft_config", given)
    if not isinstance(options, dict):
        raise ValueError(f"peft_config is {given!r}: expected a JSON object")
    try:
        from peft import get_peft_config
    except ImportError:
        raise ValueError("peft_config is given, but peft is not installed: pip install 'simct[peft]'") from None
    try:
        return get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", **options})
    except (TypeError, KeyError) as error:
        raise ValueError(f"peft_config is {given!r}: {error}") from error


def dry_run(run: RunArguments, config, argv: list[str], adapter) -> bool:
    """Prints what the run would be; whether it fits."""
    from simct.commands.dry_run import describe
    from simct.commands.options import option_files

    given = {}
    for _, options in option_files(argv):
        given.update(options)
    assumed = dict(assume_memory_gb=run.assume_memory_gb, assume_processes=run.assume_processes)
    assumed["assume_prompt_tokens"] = ASSUMED_PROMPT_TOKENS
    return describe(run, config, console, recipe=given, peft_config=adapter, **assumed).fits


def checkpoint(asked: str | None, folder: str) -> str | None:
    """The checkpoint to resume from: a path, or "latest" for the newest whole one in the output folder. ValueError if it is not
    there."""
    from simct.training.checkpoints import newest_complete

    if asked is None or asked.lower() == "false":
        return None
    found = newest_complete(folder) if asked.lower() in ("latest", "true") else asked
    if found is None or not Path(found).is_dir():
        raise ValueError(f"resume_from_checkpoint is {asked!r}: there is no such checkpoint (output_dir {folder!r})")
    return found


def quiet_libraries() -> None:
    """No bars of loading and writing, and nothing of kernels that a machine without a GPU does without."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def first_evaluation(trainer, path: Path, resume: str | None) -> dict[str, float] | None:
    """The evaluation before the first step. A resumed run reads the one that was written then; None if there is none."""
    if resume:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if found:
            trainer.first_evaluations["eval"] = {name.removeprefix("eval_"): value for name, value in found.items()}
        return found
    found = evaluate(trainer)
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def evaluate(trainer) -> dict[str, float]:
    with console.status("evaluating on held-out prompts"):
        return trainer.evaluate()
