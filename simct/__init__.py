"""SimCT: cross-tokenizer on-policy distillation of language models (arXiv 2605.07711)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from simct.pair import Alignment, TokenizerPair
from simct.tokens import token_bytes

if TYPE_CHECKING:
    from simct.config import SimCTConfig
    from simct.served_teacher import ServedTeacher
    from simct.teacher import LocalTeacher
    from simct.trainer import SimCTTrainer

try:
    __version__ = version("simct")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["Alignment", "LocalTeacher", "ServedTeacher", "SimCTConfig", "SimCTTrainer", "TokenizerPair", "token_bytes"]


# The trainer pulls in accelerate and half of transformers: only who asks for it waits for it.
_LATER = {
    "LocalTeacher": "simct.teacher",
    "ServedTeacher": "simct.served_teacher",
    "SimCTConfig": "simct.config",
    "SimCTTrainer": "simct.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'simct' has no attribute {name!r}")
