"""Teachers by name: models loaded here, and those behind an address."""

from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from simct.models.loading import NO_CODE, SOURCE, load_generation_config, load_model, load_tokenizer
from simct.teachers.local import LocalTeacher
from simct.teachers.served import ServedTeacher, check_objective, check_server_options
from simct.teachers.sharded import load_once

Teacher = str | PreTrainedModel | LocalTeacher | ServedTeacher


def load_teachers(
    teacher: Teacher | dict[str, Teacher], tokenizers, args: Any, student: PreTrainedModel
) -> dict[str, LocalTeacher | ServedTeacher]:
    """Teachers by name; a single one goes by the name "teacher". `tokenizers`: one, or by the same names, or None. `args`: a
    `SimCTConfig`.

    ValueError for one that cannot be loaded, for the student's own model object, and for options that a served teacher cannot
    follow. `ServedTeacher` has more to say of a server.
    """
    several = isinstance(teacher, dict)
    if several and not teacher:
        raise ValueError("teacher is an empty mapping: expected at least one teacher")
    if several and tokenizers is not None and not isinstance(tokenizers, dict):
        raise ValueError("teacher_processing_class is one tokenizer: expected a mapping, as teacher is one")
    teachers = teacher if several else {"teacher": teacher}
    urls = args.teacher_url or {}
    if isinstance(urls, str):
        urls = {name: urls for name in teachers}
    if len(urls) > 1 and isinstance(args.teacher_url, str) or not urls.keys() <= teachers.keys():
        raise ValueError(
            f"teacher_url is {args.teacher_url!r}: expected addresses by the teachers' names, {', '.join(teachers)}"
        )
    if urls or any(isinstance(model, ServedTeacher) for model in teachers.values()):
        check_objective(args)
    found = {}
    for name, model in teachers.items():
        label = f"teacher {name!r}" if several else "teacher"
        own = tokenizers.get(name) if isinstance(tokenizers, dict) else tokenizers
        if name in urls:
            found[name] = load_served(model, urls[name], own, args, label)
            continue
        if isinstance(model, (LocalTeacher, ServedTeacher)):
            found[name] = model
            continue
        dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
        options = {"dtype": dtype, **(args.teacher_model_init_kwargs or {})}

        def load(model=model, label=label, options=options) -> PreTrainedModel:
            return load_model(model, label, allow_missing_weights=args.allow_missing_weights, **options)

        model = load_once(load, args.process_index) if isinstance(model, str) and once(args, options) else load()
        if not isinstance(teachers[name], PreTrainedModel) and "attn_implementation" not in options:
            take_flash_attention(model, args.device)
        if model is student:
            raise ValueError(f"{label} is the student's own model object: it would be frozen, load it twice")
        found[name] = LocalTeacher(model, load_tokenizer(own, model, label, **options))
    return found


def once(args: Any, options: dict[str, Any]) -> bool:
    """Whether one process reads the weights for all, since they are shared out among them: not where they could not be, and not of
    a model whose code came with it, which the others would have to load."""
    elsewhere = {"device_map", "quantization_config", "gguf_file", "tp_plan"} & options.keys()
    return args.shares_teacher(args.world_size) and not elsewhere and not options.get("trust_remote_code")


def take_flash_attention(model: PreTrainedModel, device: torch.device) -> None:
    """flash-attn, where it is installed and serves this model in its precision on this card."""
    if device.type != "cuda" or model.dtype == torch.float32 or not is_flash_attn_2_available():
        return
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return
    with suppress(ValueError, ImportError):  # an architecture without it
        model.set_attn_implementation("flash_attention_2")


def load_served(
    folder: Teacher, url: str, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str
) -> ServedTeacher:
    """The teacher at an address. Of its folder (or hub name) the tokenizer and the configurations are read."""
    if not isinstance(folder, str):
        raise ValueError(f"{label} is a {type(folder).__name__}, but teacher_url is given: expected its name or folder")
    source = {k: v for k, v in (args.teacher_model_init_kwargs or {}).items() if k in SOURCE}
    tokenizer = load_tokenizer(tokenizer, folder, label, **source)
    generation = load_generation_config(folder, label, **source)
    options = args.teacher_server_kwargs or {}
    check_server_options(options)
    with suppress(Exception):  # a folder with only a tokenizer, or of a model that only the server knows
        head = AutoConfig.from_pretrained(folder, **NO_CODE | source).get_text_config(decoder=True).vocab_size
        if head > len(tokenizer):  # padded
            options = {"vocab_size": head, **options}
    return ServedTeacher(url, tokenizer, top_k=args.teacher_top_k, generation_config=generation, **options)
