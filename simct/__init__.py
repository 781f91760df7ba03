"""SimCT: cross-tokenizer on-policy distillation of language models (arXiv 2605.07711)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simct.pairing.padded import PaddedBatch, padded_to_packed
    from simct.pairing.pair import Alignment, TokenizerPair
    from simct.pairing.tokens import token_bytes
    from simct.teachers.local import LocalTeacher
    from simct.teachers.served import ServedTeacher
    from simct.training.config import SimCTConfig
    from simct.training.trainer import SimCTTrainer

try:
    __version__ = version("simct")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Alignment",
    "LocalTeacher",
    "PaddedBatch",
    "ServedTeacher",
    "SimCTConfig",
    "SimCTTrainer",
    "TokenizerPair",
    "padded_to_packed",
    "token_bytes",
]

# Imported when first asked for: torch takes seconds, the trainer pulls in accelerate and half of transformers.
_HOMES = {
    "Alignment": "pairing.pair",
    "LocalTeacher": "teachers.local",
    "PaddedBatch": "pairing.padded",
    "ServedTeacher": "teachers.served",
    "SimCTConfig": "training.config",
    "SimCTTrainer": "training.trainer",
    "TokenizerPair": "pairing.pair",
    "padded_to_packed": "pairing.padded",
    "token_bytes": "pairing.tokens",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"simct.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'simct' has no attribute {name!r}")
