"""Pairs of tokenizers whose mismatch is dialled, and the models that are trained on the spot for them."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from simct.demo.make_models import train
from simct.files import write_json

from .texts import Texts

END = "<|endoftext|>"


@dataclass(frozen=True)
class Spelling:
    """A byte-level BPE tokenizer. `digits`: most digits of one token; `space`: a word carries the one before or after it."""

    size: int
    digits: int = 3
    space: str = "before"

    def make(self, documents: list[str]) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        word = r" ?\p{L}+" if self.space == "before" else r"\p{L}+ ?"
        other = r" ?[^\s\p{L}\p{N}]+" if self.space == "before" else r"[^\s\p{L}\p{N}]+ ?"
        pattern = rf"{word}|\p{{N}}{{1,{self.digits}}}|{other}|\n|\s"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


@dataclass(frozen=True)
class Size:
    """A Llama of this size, trained for so many steps of 32 documents."""

    width: int
    layers: int
    steps: int


TEACHER = Spelling(2048)
# From nearly the teacher's own cuts to hardly any in common. All vocabularies come from the same texts: a smaller one nests in a
# larger one of the same kind.
STUDENTS = {
    "nested": Spelling(1536),
    "fine": Spelling(512),
    "digits": Spelling(1536, digits=1),
    "trailing": Spelling(1536, space="after"),
    "same": TEACHER,  # the control: one vocabulary
}
SIZES = {"teacher": Size(160, 4, 3000), "student": Size(96, 2, 1000)}
QUICK_SIZES = {"teacher": Size(48, 1, 40), "student": Size(32, 1, 20)}


def prepare(
    folder: Path, names: list[str], texts: Texts, sizes: dict[str, Size], workers: int = 1, progress=print
) -> None:
    """Makes `folder/teacher` and a `folder/NAME` for each setting; what is there already, made in the same way, stays."""
    wanted = {"teacher": (TEACHER, sizes["teacher"])} | {name: (STUDENTS[name], sizes["student"]) for name in names}
    context = multiprocessing.get_context("spawn")  # forked threads of torch would wait for ever
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        left = {}
        for name, (spelling, size) in wanted.items():
            made_by = {**asdict(spelling), **asdict(size), "documents": len(texts.documents)}
            stamp = folder / name / "made_by.json"
            if not (stamp.is_file() and json.loads(stamp.read_text()) == made_by):
                progress(f"training {name}: {size.steps} steps")
                left[
                    pool.submit(
                        make_model, folder / name, spelling, size, texts.documents, ["teacher", *STUDENTS].index(name)
                    )
                ] = stamp, made_by
        for done in as_completed(left):
            done.result()
            write_json(*left[done])


def make_model(folder: Path, spelling: Spelling, size: Size, documents: list[str], seed: int) -> None:
    """A tokenizer and a model for it, in `folder`. On one thread, so that the number of processors changes nothing."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = spelling.make(documents)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=3 * size.width, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    train(config, tokenizer, documents, steps=size.steps, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
