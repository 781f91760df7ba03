"""SimCT: cross-tokenizer on-policy distillation of language models (arXiv 2605.07711)."""

from importlib.metadata import PackageNotFoundError, version

from simct.pair import Alignment, TokenizerPair
from simct.tokens import token_bytes

try:
    __version__ = version("simct")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["Alignment", "LocalTeacher", "SimCTConfig", "SimCTTrainer", "TokenizerPair", "token_bytes"]


def __getattr__(name: str):
    # The trainer pulls in accelerate and half of transformers: only who asks for it waits for it.
    if name == "SimCTConfig":
        from simct.config import SimCTConfig as found
    elif name == "SimCTTrainer":
        from simct.trainer import SimCTTrainer as found
    elif name == "LocalTeacher":
        from simct.teacher import LocalTeacher as found
    else:
        raise AttributeError(f"module 'simct' has no attribute {name!r}")
    return found
