"""Models and tokenizers by name, with errors that say which of the two could not be loaded."""

import warnings
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from simct.console import error_line

# Arguments of from_pretrained that say where something comes from, and so hold for the tokenizer too.
SOURCE = ("gguf_file", "revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")

# Left out, transformers asks on the terminal whether to run a folder's own code.
NO_CODE = {"trust_remote_code": False}


def load_model(
    model: str | PreTrainedModel, name: str, *, allow_missing_weights: bool = False, **kwargs
) -> PreTrainedModel:
    """A path or hub name loaded as a causal language model; a model is passed through.

    ValueError if it cannot be loaded, or if its files lack tensors, or have them in another shape: such weights would be random.
    `allow_missing_weights`: then a warning names them.
    """
    if not isinstance(model, str):
        if not callable(model):
            raise ValueError(f"{name} is {model!r}: expected a path, a hub name or a model")
        return model
    # Of weights in another shape transformers' own error gives no names: it goes on, and they are named below.
    kwargs = {"ignore_mismatched_sizes": True, **kwargs}
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **NO_CODE | kwargs)
    except Exception as error:  # broken weights or configurations have errors of their own libraries
        raise ValueError(
            f"{name} {model!r} cannot be loaded as a causal language model: {error_line(error)}"
        ) from error
    # Weights that are tied to others are none of them, nor are buffers, which a model makes itself.
    weights = {weight for weight, _ in loaded.named_parameters()}
    random = [f"{key} (missing)" for key in sorted(weights.intersection(info["missing_keys"]))]
    random += [
        f"{key} ({tuple(found)} for {tuple(own)})" for key, found, own in info["mismatched_keys"] if key in weights
    ]
    if not random:
        return loaded
    more = f" and {len(random) - 5} more" if len(random) > 5 else ""
    message = f"{name} {model!r} has weights that its files do not give, random ones: {', '.join(random[:5])}{more}"
    if not allow_missing_weights:
        raise ValueError(f"{message}; expected a whole model (allow_missing_weights=True goes on)")
    warnings.warn(message, stacklevel=2)
    return loaded


def is_dispatched(model: PreTrainedModel) -> bool:
    """Whether the model was spread over devices where it was loaded (`device_map`): its parts stay where they are."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: str | PreTrainedModel, name: str, **kwargs
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or that of the model's own folder. ValueError if there is none."""
    if tokenizer is not None:
        return tokenizer
    folder = model if isinstance(model, str) else model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(folder, **NO_CODE | {k: v for k, v in kwargs.items() if k in SOURCE})
    except Exception as error:  # a broken tokenizer.json is a bare Exception
        raise ValueError(f"the {name}'s tokenizer cannot be loaded from {folder!r}: {error_line(error)}") from error


def load_generation_config(folder: str, name: str, **kwargs) -> GenerationConfig | None:
    """The generation configuration of a model's folder, None where there is none. ValueError if it cannot be read."""
    source = {k: v for k, v in kwargs.items() if k in SOURCE and k not in ("gguf_file", "trust_remote_code")}
    try:
        return GenerationConfig.from_pretrained(folder, **source)
    except Exception as error:
        if isinstance(error, OSError) and not (Path(folder) / "generation_config.json").is_file():
            return None
        raise ValueError(
            f"the {name}'s generation_config.json cannot be read from {folder!r}: {error_line(error)}"
        ) from error


def with_adapter(model: PreTrainedModel, peft_config):
    """The model with a PEFT adapter in its layers. ValueError for one that does not fit, or that adds tokens to the prompt."""
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
    try:
        with warnings.catch_warnings():  # PEFT asks transformers for it by a name that is to go
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return get_peft_model(model, peft_config)
    except Exception as error:  # PEFT looks at its options where it uses them
        raise ValueError(f"peft_config does not fit the student: {error_line(error)}") from error
