"""Models and tokenizers by name, with errors that say which of the two could not be loaded."""

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from simct.teacher import LocalTeacher

if TYPE_CHECKING:
    from simct.config import SimCTConfig

Teacher = str | PreTrainedModel | LocalTeacher

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
    tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, name: str, **kwargs
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or that of the model's own folder. ValueError if there is none."""
    if tokenizer is not None:
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, **{k: v for k, v in kwargs.items() if k in SOURCE})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the {name}'s tokenizer cannot be loaded from {model.name_or_path!r}: {error}") from error


def load_teachers(
    teacher: Teacher | dict[str, Teacher], tokenizers, args: "SimCTConfig", student: PreTrainedModel
) -> dict[str, LocalTeacher]:
    """Teachers by name; a single one goes by the name "teacher". `tokenizers`: one, or by the same names, or None.

    ValueError for one that cannot be loaded, and for the student's own model object.
    """
    several = isinstance(teacher, dict)
    if several and not teacher:
        raise ValueError("teacher is an empty mapping: expected at least one teacher")
    if several and tokenizers is not None and not isinstance(tokenizers, dict):
        raise ValueError("teacher_processing_class is one tokenizer: expected a mapping, as teacher is one")
    found = {}
    for name, model in (teacher if several else {"teacher": teacher}).items():
        label = f"teacher {name!r}" if several else "teacher"
        if isinstance(model, LocalTeacher):
            found[name] = model
            continue
        dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
        options = {"dtype": dtype, **(args.teacher_model_init_kwargs or {})}
        if args.device.type == "cuda" and "attn_implementation" not in options and is_flash_attn_2_available():
            options["attn_implementation"] = "flash_attention_2"
        model = load_model(model, label, **options)
        if model is student:
            raise ValueError(f"{label} is the student's own model object: it would be frozen, load it twice")
        own = tokenizers.get(name) if isinstance(tokenizers, dict) else tokenizers
        found[name] = LocalTeacher(model, load_tokenizer(own, model, label, **options))
    return found


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
