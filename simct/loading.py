"""Models and tokenizers by name, with errors that say which of the two could not be loaded."""

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Arguments of from_pretrained that say where something comes from, and so hold for the tokenizer too.
SOURCE = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")


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
