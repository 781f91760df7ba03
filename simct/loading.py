"""Models and tokenizers by name, with errors that say which of the two could not be loaded."""

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from simct.served_teacher import ServedTeacher, check_objective, check_server_options
from simct.teacher import LocalTeacher

if TYPE_CHECKING:
    from simct.config import SimCTConfig

Teacher = str | PreTrainedModel | LocalTeacher | ServedTeacher

# Arguments of from_pretrained that say where something comes from, and so hold for the tokenizer too.
SOURCE = ("gguf_file", "revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")


def load_model(model: str | PreTrainedModel, name: str, **kwargs) -> PreTrainedModel:
    """A path or hub name loaded as a causal language model; a model is passed through. ValueError if it cannot be loaded."""
    if not isinstance(model, str):
        return model
    try:
        return AutoModelForCausalLM.from_pretrained(model, **kwargs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} {model!r} cannot be loaded as a causal language model: {error}") from error


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: str | PreTrainedModel, name: str, **kwargs
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or that of the model's own folder. ValueError if there is none."""
    if tokenizer is not None:
        return tokenizer
    folder = model if isinstance(model, str) else model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(folder, **{k: v for k, v in kwargs.items() if k in SOURCE})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the {name}'s tokenizer cannot be loaded from {folder!r}: {error}") from error


def load_teachers(
    teacher: Teacher | dict[str, Teacher], tokenizers, args: "SimCTConfig", student: PreTrainedModel
) -> dict[str, LocalTeacher | ServedTeacher]:
    """Teachers by name; a single one goes by the name "teacher". `tokenizers`: one, or by the same names, or None.

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
        if args.device.type == "cuda" and "attn_implementation" not in options and is_flash_attn_2_available():
            options["attn_implementation"] = "flash_attention_2"
        model = load_model(model, label, **options)
        if model is student:
            raise ValueError(f"{label} is the student's own model object: it would be frozen, load it twice")
        found[name] = LocalTeacher(model, load_tokenizer(own, model, label, **options))
    return found


def load_served(
    folder: Teacher, url: str, tokenizer: PreTrainedTokenizerBase | None, args: "SimCTConfig", label: str
) -> ServedTeacher:
    """The teacher at an address. Of its folder (or hub name) only the tokenizer and the generation configuration are read."""
    if not isinstance(folder, str):
        raise ValueError(f"{label} is a {type(folder).__name__}, but teacher_url is given: expected its name or folder")
    source = {k: v for k, v in (args.teacher_model_init_kwargs or {}).items() if k in SOURCE}
    tokenizer = load_tokenizer(tokenizer, folder, label, **source)
    try:
        generation = GenerationConfig.from_pretrained(folder, **{k: v for k, v in source.items() if k != "gguf_file"})
    except OSError:  # a folder with only a tokenizer
        generation = None
    options = args.teacher_server_kwargs or {}
    check_server_options(options)
    return ServedTeacher(url, tokenizer, top_k=args.teacher_top_k, generation_config=generation, **options)


def with_adapter(model: PreTrainedModel, peft_config):
    """The model with a PEFT adapter in its layers. ValueError for an adapter that adds tokens to the prompt."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    if peft_config.is_prompt_learning:
        raise ValueError(
            f"peft_config is {type(peft_config).__name__}: expected an adapter in the layers, such as LoRA"
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes packs weights on a CPU when something is sampled, and no gradient passes what it packed.
                module.support_avx512bf16_for_cpu = False
    return get_peft_model(model, peft_config)
