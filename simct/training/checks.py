"""What a run is checked for before any long work. Each check raises a ValueError that names the argument, its value and what was
expected."""

import shutil
import tempfile
import warnings
from pathlib import Path

from torch import nn
from torch.utils.data import IterableDataset

from simct.console import error_line
from simct.data.prompts import short
from simct.data.records import COLUMNS, place_of, reference_answer, rows
from simct.data.sources import dataset_rows
from simct.models.checks import context_length
from simct.training.config import is_on


def check_datasets(train_dataset, eval_dataset) -> None:
    """ValueError unless there are records to train on, and to evaluate on if anything is given for that."""
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    named = [
        ("train_dataset", train_dataset),
        *((f"eval_dataset {name}".strip(), part) for name, part in parts.items()),
    ]
    for name, dataset in named:
        if dataset is None:
            continue
        if not hasattr(dataset, "__len__"):
            if name == "train_dataset" and isinstance(dataset, IterableDataset):
                continue
            raise ValueError(
                f"{name} is a {type(dataset).__name__} without a length: expected a list or a datasets.Dataset"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty: expected at least one record with a prompt or messages")


def check_metric(name: str | None, eval_dataset) -> None:
    """ValueError for a figure by which the best checkpoint is to be known, and which no record of a single eval_dataset gives."""
    field, has = {
        "accuracy": ("an answer", lambda record: record.get("answer") is not None),
        "forward_kl_per_byte": ("an answer in full", lambda record: reference_answer(record) is not None),
    }.get((name or "").removeprefix("eval_"), (None, None))
    if field is None or eval_dataset is None or isinstance(eval_dataset, dict):
        return
    if not any(isinstance(record, dict) and has(record) for record in rows(eval_dataset)):
        raise ValueError(f"metric_for_best_model is {name!r}, but no record of eval_dataset has {field}")


def check_run(config, train_dataset, eval_dataset) -> None:
    """What needs no model: processes, data sets, options that exclude each other, a folder to write to."""
    if config.n_gpu > 1 and "device_map" in (config.teacher_model_init_kwargs or {}):
        config._n_gpu = 1  # the others are the teacher's: no copies of the student on them
    if config.n_gpu > 1:
        raise ValueError(
            f"{config.n_gpu} GPUs in one process: expected one process for each (torchrun, accelerate launch)"
        )
    check_datasets(train_dataset, eval_dataset)
    check_metric(config.metric_for_best_model, eval_dataset)
    if train_dataset is not None and not hasattr(train_dataset, "__len__"):
        if config.max_steps <= 0:
            raise ValueError(
                f"max_steps is {config.max_steps}, but train_dataset is streamed and has no length: expected a number of steps"
            )
        if config.num_iterations > 1:
            raise ValueError(f"num_iterations is {config.num_iterations}: expected 1 with a streamed train_dataset")
        config.accelerator_config.dispatch_batches = False  # records are no tensors: every process reads its own
    if config.fsdp and int((config.fsdp_config or {}).get("version", 2)) != 2:
        raise ValueError(
            "fsdp_config names version 1: expected 2 (FSDP2), whose parameters keep their names and shapes"
        )
    if config.shards_student and is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_config has cpu_ram_efficient_loading on: expected False (in accelerate's own configuration, "
            "fsdp_cpu_ram_efficient_loading: false). transformers would then load weights in the first process of a machine only, "
            "those of the teacher as well, which no sharding sends to the others"
        )
    if config.shards_student:  # else each process would hold all gradients whole until the last batch of a step
        options = config.accelerator_config.gradient_accumulation_kwargs or {}
        config.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **options}
    check_writable(config.output_dir)


def usable_records(name: str, dataset, student: nn.Module, render, scorers: dict, config):
    """The records that can be used, and how many were skipped (0 unless `on_bad_row="skip"`).

    Renders every prompt for both models (of a streamed data set none: its records are checked when they are sampled from). A prompt
    and a whole response must fit the student's context, and a prompt its teacher's. (A response that turns out too long for the
    teacher is cut there, and what is cut is counted.) ValueError names the first record that cannot be used, or says that none can.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        return dataset, 0
    good, first = [], None
    table = hasattr(dataset, "with_format")
    columns = [column for column in COLUMNS if column in dataset.column_names] if table else None
    found = dataset_rows(dataset, columns) if table else ((i, record, None) for i, record in enumerate(dataset))
    for number, record, problem in found:
        try:
            if problem is not None:
                raise ValueError(problem)
            check_record(record, student, render, scorers, config)
            good.append(number)
        except ValueError as error:
            place = place_of(dataset, number)
            where = f"{name}, record {number}" if place is None else f"{place} ({name}, record {number})"
            first = first or error_line(f"{where}: {error}")
            if config.on_bad_row == "stop":
                raise ValueError(first) from error
    skipped = len(dataset) - len(good)
    if not skipped:
        return dataset, 0
    if not good:
        raise ValueError(f"{name} has no record that can be used; {first}")
    warnings.warn(f"{name}: {skipped} of {len(dataset)} records are skipped; {first}", stacklevel=3)
    return dataset.select(good) if hasattr(dataset, "select") else [dataset[i] for i in good], skipped


def usable_of_stream(
    records: list[dict], student: nn.Module, render, scorers: dict, config
) -> tuple[list[dict], list[str]]:
    """As `usable_records`, of a batch of a streamed data set: those that can be used, and what is wrong with the others."""
    good, problems = [], []
    for record in records:
        try:
            check_record(record, student, render, scorers, config)
            good.append(record)
        except ValueError as error:
            problems.append(error_line(f"train_dataset, streamed record {short(record)}: {error}"))
            if config.on_bad_row == "stop":
                raise ValueError(problems[-1]) from error
    return good, problems


def check_record(record: dict, student: nn.Module, render, scorers: dict, config) -> None:
    """ValueError unless the record's prompt fits both models, and its off-policy answer, where it has one, is text."""
    if isinstance(record, dict):
        reference_answer(record)
    name = record.get("teacher") if isinstance(record, dict) else None
    if not isinstance(name, str) or name not in scorers:
        if len(scorers) > 1:
            raise ValueError(f"field 'teacher' is {name!r}: expected one of {', '.join(map(repr, scorers))}")
        name = next(iter(scorers))
    scorer = scorers[name]
    for side, limit, renderer, budget in (
        ("student", context_length(student), render, config.max_new_tokens),
        ("teacher", scorer.teacher.context_length, scorer.render, 1),
    ):
        tokens = len(renderer(record))
        if tokens + budget > limit:
            raise ValueError(
                f"the prompt has {tokens} {side} tokens, with max_new_tokens={config.max_new_tokens} too many for "
                f"the {side}'s context of {limit}"
            )


def check_writable(folder: str) -> None:
    """ValueError unless files can be written into the folder, which is made if it is not there."""
    try:
        folder.encode("utf-8")  # safetensors takes no other path
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except UnicodeEncodeError:
        raise ValueError(f"output_dir is {folder!r}: expected a name in UTF-8") from None
    except OSError as error:
        raise ValueError(f"output_dir {folder!r} cannot be written: {error}") from None


def check_disk_space(config, model: nn.Module) -> None:
    """ValueError unless a checkpoint fits on the disk: what is trained, and two moments of it if the optimiser is saved."""
    if config.save_strategy == "no":
        return
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = trained * (1 if config.save_only_model else 3)
    free = shutil.disk_usage(config.output_dir).free
    if free < needed:
        raise ValueError(
            f"output_dir {config.output_dir!r} has {free / 1e9:.1f} GB free: expected {needed / 1e9:.1f} GB for one checkpoint "
            "(save_strategy='no' writes none)"
        )
