"""Pairs of tokenizers whose mismatch is dialled, and the models that are trained on the spot for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

from simct.demo.make_models import batches
from simct.files import write_json
from simct.rollouts.protocol import Sampling

from .judges import TEMPERATURE
from .sampling import engine
from .texts import Texts, answer

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
    """A Llama of this size, trained for `steps` steps of 32 documents.

    A student stops where it gets the share `until` of validation sums right, so that its seeds begin alike. A teacher goes on: at
    most `tuned` steps on sums alone, until it gets nine of ten right, which cost it its prose, and `settled` steps on all again.
    """

    width: int
    layers: int
    steps: int
    until: float | None = None
    tuned: int = 0
    settled: int = 0


TEACHER = Spelling(1024)
# From nearly the teacher's own cuts to hardly any in common. All vocabularies come from the same texts: a smaller one nests in a
# larger one of the same kind.
STUDENTS = {
    "nested": Spelling(768),
    "digits": Spelling(768, digits=1),
    "fine": Spelling(384),
    "trailing": Spelling(768, space="after"),
}
SIZES = {"teacher": Size(128, 3, 1500, tuned=1000, settled=500), "student": Size(96, 2, 2500, until=0.4)}
QUICK_SIZES = {"teacher": Size(48, 1, 40, tuned=2, settled=2), "student": Size(32, 1, 20, until=0.4)}
RATE, GOOD = 2e-3, 0.9
AVERAGED = 0.98  # of the weights' moving average, which is what a student keeps: a run's end without its schedule
CHECKED = 100  # steps


def is_made(folder: Path, spelling: Spelling, size: Size, texts: Texts, seed: int) -> bool:
    stamp = folder / "made_by.json"
    return stamp.is_file() and json.loads(stamp.read_text())["made_by"] == _made_by(spelling, size, texts, seed)


def _made_by(spelling: Spelling, size: Size, texts: Texts, seed: int) -> dict:
    return {**asdict(spelling), **asdict(size), "seed": seed, "documents": len(texts.documents)}


def make_model(folder: Path, spelling: Spelling, size: Size, texts: Texts, seed: int) -> None:
    """A tokenizer and a model for it, in `folder`. On one thread, so that the number of processors changes nothing."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = spelling.make(texts.documents)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=3 * size.width, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    sums = [document for document in texts.documents if answer(document) is not None]

    def good_enough(share: float):
        return lambda found: sampled_accuracy(found, tokenizer, texts.validation[:128]) >= share

    if size.until is not None:
        model, steps = learn(model, tokenizer, texts.documents, size.steps, seed, RATE, good_enough(size.until))
    else:
        model, steps = learn(model, tokenizer, texts.documents, size.steps, seed, RATE)
        model, more = learn(model, tokenizer, sums, size.tuned, seed, RATE / 2, good_enough(GOOD))
        model, last = learn(model, tokenizer, texts.documents, size.settled, seed + 1, RATE / 2)
        steps += more + last
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = {"steps": steps, "accuracy": sampled_accuracy(model, tokenizer, texts.validation, draws=4)}
    write_json(folder / "made_by.json", {"made_by": _made_by(spelling, size, texts, seed), **found})


def learn(
    model,
    tokenizer,
    documents: list[str],
    most: int,
    seed: int,
    rate: float,
    until: Callable[[Any], bool] | None = None,
) -> tuple[Any, int]:
    """A language model of the documents: the moving average of `model`'s weights on the way, and its steps.

    The rate falls to 0 within `most` steps; with `until`, which is asked of the average every CHECKED steps, the end is not known,
    and it stays.
    """
    average = AveragedModel(model.train(), multi_avg_fn=get_ema_multi_avg_fn(AVERAGED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    if until is None:
        schedule = get_cosine_schedule_with_warmup(optimizer, most // 20 + 1, most)
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, CHECKED)
    step = 0
    for step, (ids, labels) in enumerate(batches(tokenizer, documents, most, seed), 1):
        model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if until is not None and step % CHECKED == 0 and until(average.module.eval()):
            break
    return average.module, step


def sampled_accuracy(model, tokenizer, sums: list[dict], draws: int = 2, tokens: int = 24) -> float:
    """The share of draws at the judges' temperature that give a sum's answer."""
    end = tokenizer.eos_token_id
    prompts = tokenizer([record["prompt"] for record in sums for _ in range(draws)])["input_ids"]
    sampling = Sampling((end,), end, tokens, TEMPERATURE)
    drawn = engine(model).generate(prompts, sampling, seed=17)
    texts = tokenizer.batch_decode([response.token_ids for response in drawn], skip_special_tokens=True)
    return sum(answer(text) == sums[i // draws]["answer"] for i, text in enumerate(texts)) / len(texts)


def draw_teacher(
    folder: Path, texts: Texts, responses: int, tokens: int, temperature: float = 1.0
) -> dict[str, list[dict]]:
    """The teacher's samples at a temperature, as records with `prompt`, `completion` and its `logprob`: `train`, so many of the
    training prompts in turn, and `validation` and `test`, one of each prompt.

    Args:
        tokens: of one sample, at most; more than a student's response may have, so that what does not end here is cut there.
    """
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    sampler = engine(AutoModelForCausalLM.from_pretrained(folder).float())
    end = tokenizer.eos_token_id
    found = {}
    for number, (name, own) in enumerate(
        (("train", texts.train), ("validation", texts.validation), ("test", texts.test))
    ):
        count = responses if name == "train" else len(own)
        records = [own[i % len(own)] for i in range(count)]
        prompts = tokenizer([record["prompt"] for record in records])["input_ids"]
        drawn = sampler.generate(prompts, Sampling((end,), end, tokens, temperature), seed=number)
        written = tokenizer.batch_decode([r.token_ids for r in drawn], skip_special_tokens=True)
        found[name] = [
            {"prompt": record["prompt"], "completion": text, "logprob": sum(response.logprobs)}
            for record, text, response in zip(records, written, drawn, strict=True)
        ]
    return found
