"""Models and tokenizers by name, with errors that say which of the two could not be loaded."""

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
