"""What `simct train ... --dry-run` prints: the resolved options, the pair, and whether the run will fit, before anything is loaded.

Models are made from their configurations on the meta device; no weights are read or allocated.
"""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from simct.commands.options_table import options_table
from simct.console import error_line
from simct.data.prompts import Prompt, prompt_of, render_prompt
from simct.data.records import load_records, rows
from simct.data.renderer import compare_thoughts
from simct.data.sources import JSONL, PARQUET
from simct.inspection.tables import coverage_table, pair_table
from simct.models.loading import NO_CODE, SOURCE, load_generation_config, load_tokenizer, with_adapter
from simct.pairing.pair import TokenizerPair
from simct.secrets import without_secrets
from simct.teachers.served import check_objective
from simct.training.collector import student_renderer, teacher_renderer
from simct.training.defaults import choose, numbers_of
from simct.training.memory import (
    PHASES,
    RESERVE,
    MemoryEstimate,
    device_memory,
    estimate,
    fits,
    memory_table,
    weight_bytes,
)
from simct.training.objectives import settle_objective
from simct.training.placement import float32_masters, student_options

MEASURED_PROMPTS, COVERAGE_PROMPTS = 1000, 200  # of the first, the longest is the length to be expected


@dataclass(frozen=True)
class DryRun:
    """What was found. `changes` are options that would make the run fit, [] if it does, None if none of those known here would."""

    memory: MemoryEstimate
    fits: bool
    changes: list[str] | None
    steps: int | None  # None: one pass over data that are not here
    tokens_per_step: int


def describe(
    run,
    config,
    console: Console,
    *,
    recipe: Mapping[str, Any] | None = None,
    assume_memory_gb: float | None = None,
    assume_prompt_tokens: int | None = None,
    assume_processes: int | None = None,
    peft_config=None,
) -> DryRun:
    """Prints what a run would be and whether its device has the memory for it.

    Args:
        run: `RunArguments`: student, teacher and data by name.
        config: the run's `SimCTConfig`.
        recipe: the options that a recipe or a configuration file set, to say where a value comes from.
        assume_memory_gb: the memory of the device that the run is meant for; that of this machine's if not given.
        assume_prompt_tokens: where the data file is not here, prompts of so many student tokens are assumed; None: an error.
        assume_processes: the processes that the run is meant for, a device each; those of this one's launcher if not given.
        peft_config: the adapter that the student is trained with, if any.

    Raises:
        ValueError: a data file, tokenizer or model configuration that cannot be read, tokenizers that cannot be paired, an
            optimiser whose memory is not known.
    """
    if assume_memory_gb is not None and not 0 < assume_memory_gb < math.inf:
        raise ValueError(f"assume_memory_gb is {assume_memory_gb}: expected a number above 0")
    if assume_processes is not None and assume_processes < 1:
        raise ValueError(f"assume_processes is {assume_processes}: expected at least 1")
    processes = assume_processes or config.world_size
    config = copy.copy(config)  # what is chosen is this description's
    if assume_memory_gb is not None and "bf16" in config.unsaid and not config.fp16:
        config.bf16 = True
    absent = (
        assume_prompt_tokens is not None and Path(run.data).suffix in (*JSONL, *PARQUET) and not Path(run.data).exists()
    )
    records = None
    if not absent:
        records = load_records(run.data, split=run.data_split, streaming=run.streaming, on_bad_row=config.on_bad_row)
    student = meta_model(run.student, "student", student_options(config, peft_config))
    dtype = torch.float32 if config.device.type == "cpu" and assume_memory_gb is None else torch.bfloat16
    teacher = None  # behind a server: its tokenizer alone is here
    if config.teacher_url:
        check_objective(config)
    else:
        teacher = meta_model(run.teacher, "teacher", {"dtype": dtype, **(config.teacher_model_init_kwargs or {})})
    sources = (config.model_init_kwargs or {}, config.teacher_model_init_kwargs or {})
    sides = list(zip((run.student, run.teacher), ("student", "teacher"), sources, strict=True))
    tokenizers = [load_tokenizer(None, folder, role, **source) for folder, role, source in sides]
    generation = [load_generation_config(folder, role, **source) for folder, role, source in sides]
    pair = TokenizerPair(
        *tokenizers,
        config.special_tokens,
        alignment=config.alignment,
        stop=config.stop,
        student_generation_config=generation[0],
        teacher_generation_config=generation[1],
        student_vocabulary_size=student.get_output_embeddings().weight.shape[0],
        chat=config.prompt_format != "text",
    )
    if line := settle_objective(config, [(pair, teacher is None)]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if peft_config is not None:
        with torch.device("meta"):
            student = with_adapter(student, peft_config)
        if config.bf16 or config.fp16:
            float32_masters(student)

    console.print(options_table(run, config, recipe or {}))
    console.print(pair_table(pair, *tokenizers))
    if records is None:
        lengths = [assume_prompt_tokens]
    else:
        first = records.take(MEASURED_PROMPTS) if run.streaming else records
        prompts = [prompt_of(record) for record in itertools.islice(rows(first), MEASURED_PROMPTS)]
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts[:COVERAGE_PROMPTS]]
        console.print(coverage_table(pair.coverage(texts), "the first prompts' own text"), "")
        lengths = prompt_lengths(prompts, tokenizers[0], config)
    # Only now: a template that fails is told with the prompt that it failed on.
    compare_thoughts(own := student_renderer(tokenizers[0], config), teacher_renderer(tokenizers[1], own, config))
    available = int(assume_memory_gb * 1e9) if assume_memory_gb else device_memory(config.device)
    on_cpu = dtype == torch.float32
    known = max(lengths), len(pair.shared), available, processes
    if not on_cpu and (line := choose(config, student, teacher, *known)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    numbers = numbers_of(
        config, student, max(lengths), len(pair.shared), on_cpu=on_cpu, available=available, processes=processes
    )
    stays = teacher is not None and _is_quantised(teacher, config.teacher_model_init_kwargs)
    if stays:  # each process has its own
        numbers["shard_teacher"] = False
    memory = estimate(student, teacher, **numbers)
    console.print(memory_table(memory, available))

    prompts_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    number = None if run.streaming or records is None else len(records)
    if run.streaming and config.max_steps <= 0:
        raise ValueError(f"max_steps is {config.max_steps}, but the data are streamed: expected a number of steps")
    steps = config.max_steps if config.max_steps > 0 else None
    if steps is None and number is not None:
        steps = _epoch_steps(number, prompts_per_step, config)
    responses = prompts_per_step * _get(config, "num_generations", 1)
    tokens = responses * config.max_new_tokens
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    all_weights = sum(p.numel() for p in student.parameters())
    said = (
        f"{run.data} is not here: it is assumed to hold"
        if records is None
        else "Streamed"
        if number is None
        else f"{number:,}"
    )
    console.print(
        f"{said} prompts, of at most {max(lengths):,} student tokens; {'' if steps is None else f'{steps:,} '}optimiser steps of "
        f"{prompts_per_step:,} "
        f"prompts and {responses:,} responses: at most {tokens:,} response tokens each. "
        f"{trained:,} of the student's {all_weights:,} weights are trained.",
        highlight=False,
    )
    if records is not None:
        _warn_of_context(console, student, lengths, config.max_new_tokens)
    if processes > 1 and teacher is not None and not stays:
        console.print(_teacher_of_many(student, teacher, numbers, available), highlight=False)
    if on_cpu:
        note = "This is a run on this machine's CPU. One on a GPU: --assume_memory_gb says how much memory that has."
        console.print(note, style="yellow", highlight=False)
    for note in _notes(config, student, teacher, numbers, available):
        console.print(note, style="yellow", markup=False, highlight=False)

    fitting = fits(memory, available)
    changes = [] if fitting else changes_that_fit(student, teacher, numbers, available)
    console.print(_verdict(memory, available, changes), highlight=False)
    return DryRun(memory, fitting, changes, steps, tokens)


def prompt_lengths(prompts: list[Prompt], tokenizer, config) -> list[int]:
    """Student tokens of each prompt, with on_bad_row="skip" of those that the tokenizer takes. ValueError if there is none."""
    lengths, refused = [], None
    for prompt in prompts:
        try:
            lengths.append(len(render_prompt(prompt, tokenizer, config.prompt_format, config.chat_template_kwargs)))
        except ValueError as error:
            refused = error
            if config.on_bad_row == "stop":
                raise
    if not lengths:
        raise refused
    return lengths


def meta_model(name: str, role: str, init_kwargs: Mapping[str, Any]) -> nn.Module:
    """A model of the named configuration on the meta device. ValueError if there is no such configuration."""
    source = NO_CODE | {key: value for key, value in init_kwargs.items() if key in SOURCE}
    shape = {key: value for key, value in init_kwargs.items() if key in ("attn_implementation", "dtype")}
    try:
        dtype = shape.get("dtype")
        if isinstance(dtype, str) and dtype != "auto":
            shape["dtype"] = getattr(torch, dtype)
        config = AutoConfig.from_pretrained(name, **source)
        if dtype == "auto":
            shape["dtype"] = config.dtype or torch.float32
        trust = {key: value for key, value in source.items() if key == "trust_remote_code"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **shape, **trust)
    except Exception as error:  # a configuration may hold anything
        raise ValueError(
            f"{role} {name!r} has no configuration of a causal language model: {error_line(error)}"
        ) from error
    return model.requires_grad_(role == "student")


def changes_that_fit(
    student: nn.Module, teacher: nn.Module | None, numbers: Mapping[str, Any], available: int
) -> list[str] | None:
    """Options of `simct train` that bring the estimate below the memory, the cheapest first and none that does not help; None
    if all of them together do not."""
    numbers, changes = dict(numbers), []
    sequence = numbers["prompt_tokens"] + numbers["response_tokens"]
    cache = 8_000_000_000
    steps = [
        ("--gradient_checkpointing true", {"gradient_checkpointing": True}),
        (f"--max_tokens_per_batch {sequence}", {"batch_tokens": min(sequence, numbers["batch_tokens"])}),
        (f"--kv_cache_gb {cache / 1e9:.0f}", {"kv_cache_bytes": min(numbers["kv_cache_bytes"] or cache, cache)}),
        *([("--shard_teacher true", {"shard_teacher": True})] if numbers["processes"] > 1 else []),
        ("--offload_teacher true", {"offload_teacher": True}),
        *([("--fsdp true", {"shard_student": True, "shard_teacher": True})] if numbers["processes"] > 1 else []),
        ("--optim adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}),
        ("--kv_cache_gb 2", {"kv_cache_bytes": min(numbers["kv_cache_bytes"] or cache, 2_000_000_000)}),
    ]
    memory = estimate(student, teacher, **numbers)
    for option, change in steps:
        changed = estimate(student, teacher, **{**numbers, **change})
        too_large = [phase for phase in PHASES if memory.phase(phase) > _usable(available)]
        if all(changed.phase(phase) >= memory.phase(phase) for phase in too_large):
            continue
        numbers.update(change)
        changes = [known for known in changes if known.split()[0] != option.split()[0]] + [option]
        memory = changed
        if fits(memory, available):
            return changes
    return None


def _verdict(memory: MemoryEstimate, available: int, changes: list[str] | None) -> Text:
    peak, room = f"{memory.peak / 1e9:.1f} GB in its {memory.peak_phase} phase", f"{_usable(available) / 1e9:.1f} GB"
    if changes == []:
        return Text(f"It fits: {peak}, of {room}.", style="green")
    text = f"It will NOT fit: {peak}, but only {room} of {available / 1e9:.1f} GB can be used. "
    if changes is None:
        text += (
            "No change of options known here is enough: train an adapter (LoRA), shorten max_new_tokens, quantise the teacher, or "
            "share the student among several devices (--fsdp)."
        )
    else:
        text += f"It would fit with {' '.join(changes)}"
    return Text(text, style="bold red")


def _teacher_of_many(student: nn.Module, teacher: nn.Module, numbers: Mapping[str, Any], available: int) -> Text:
    """Which of the two fits: a teacher that the processes share, or a copy in each."""
    said = []
    for shared, how in (True, "shared out among them"), (False, "with a copy in each"):
        memory = estimate(student, teacher, **{**numbers, "shard_teacher": shared})
        verdict = "fits" if fits(memory, available) else "does not fit"
        said.append(f"{how} a device holds {memory.peak / 1e9:.1f} GB at most, which {verdict}")
    now = "shares it out" if numbers["shard_teacher"] else "has copies"
    return Text(
        f"The teacher of {numbers['processes']} processes: {'; '.join(said)}. This run {now} (--shard_teacher)."
    )


def _notes(config, student: nn.Module, teacher: nn.Module | None, numbers, available: int) -> list[str]:
    notes = []
    if teacher is None:
        served = without_secrets("teacher_url", config.teacher_url)
        notes.append(f"The teacher is served at {served}: its memory is not counted, and it was not asked.")
    for role, model, options in (
        ("student", student, config.model_init_kwargs),
        ("teacher", teacher, config.teacher_model_init_kwargs),
    ):
        if model is None:
            continue
        if _is_quantised(model, options):
            notes.append(f"The {role} is quantised: its weights take less than is counted here.")
    if config.shards_student and numbers["processes"] == 1:
        notes.append(
            "FSDP shares the models out among the processes: --assume_processes says how many; one is counted."
        )
    shared = numbers["shard_teacher"]
    if teacher is not None and not shared and weight_bytes(teacher) > _usable(available):
        notes.append(
            f"The teacher's weights, {weight_bytes(teacher) / 1e9:.0f} GB, do not fit this device whole, offloaded or not: "
            "spread it over several (one process, "
            '--teacher_model_init_kwargs \'{"device_map": "auto"}\'; several processes, --shard_teacher), or let a server hold it '
            "(--teacher_url)."
        )
    elif "device_map" in (config.teacher_model_init_kwargs or {}):
        notes.append("The teacher stays where its device_map puts it: here it is counted as if whole on this device.")
    if getattr(student.config.get_text_config(), "_attn_implementation", None) == "eager":
        notes.append(
            "The student's attention is eager: it keeps heads x length scores for each token. If the model has it, "
            '--model_init_kwargs \'{"attn_implementation": "flash_attention_2"}\' keeps none.'
        )
    return notes


def _is_quantised(model: nn.Module, options: Mapping[str, Any] | None) -> bool:
    return bool(getattr(model.config, "quantization_config", None) or "quantization_config" in (options or {}))


def _warn_of_context(console: Console, student: nn.Module, lengths: list[int], new_tokens: int) -> None:
    limit = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    too_long = sum(length + new_tokens > limit for length in lengths) if limit else 0
    if too_long:
        console.print(
            f"{too_long:,} of the first {len(lengths):,} prompts leave no room for {new_tokens:,} tokens in the "
            f"student's context of {limit:,}: the run would refuse them (--max_new_tokens, --on_bad_row skip).",
            style="bold red",
            highlight=False,
        )


def _epoch_steps(records: int, prompts_per_step: int, config) -> int:
    per_epoch = records // prompts_per_step if config.dataloader_drop_last else math.ceil(records / prompts_per_step)
    return math.ceil(config.num_train_epochs * max(1, per_epoch)) * _get(config, "num_iterations", 1)


def _usable(available: int) -> float:
    return available * (1 - RESERVE)


def _get(config, name: str, default):
    value = getattr(config, name, default)
    return default if value is None else value
