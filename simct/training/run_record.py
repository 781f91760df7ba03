"""What a run draws its samples from, written into its checkpoints: a run that goes on with other data, another seed or batches of
another size would not be the run that was stopped."""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from simct.data.records import rows
from simct.rollouts.protocol import Sampling

READ = ("prompt", "messages", "completion", "teacher_context", "teacher", "tools")  # what of a record shapes a step
STREAMED = 16  # records of a stream that stand for all of it
# Options that say which prompts a step has, and how many responses.
OPTIONS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "num_iterations",
    "on_policy_fraction",
)


def digest(parts: Iterable[Any]) -> str:
    """A hash of things that JSON can write, in order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(json.dumps(part, sort_keys=True, default=str, ensure_ascii=True).encode() + b"\n")
    return found.hexdigest()


def data_digest(dataset) -> str | None:
    """A hash of the records; of a stream that can be read again, of its first ones; None for any other stream."""
    streams = sys.modules.get("datasets")  # a run on lists does without the package
    if hasattr(dataset, "__len__"):
        names = getattr(dataset, "column_names", None)
        found = rows(dataset, None if names is None else [name for name in READ if name in names])
    elif streams is not None and isinstance(dataset, streams.IterableDataset):
        found = itertools.islice(dataset, STREAMED)
    else:
        return None
    return digest({name: record[name] for name in READ if record.get(name) is not None} for record in found)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return digest(
        [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, sorted(tokenizer.all_special_tokens)]
    )


def record_of(args, dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of a `SimCTConfig`, the data set to train on and the student's tokenizer. Keys are the names that a message uses."""
    return {
        "data": data_digest(dataset),
        "tokenizer": tokenizer_digest(tokenizer),
        "processes": args.world_size,
        **{name: getattr(args, name) for name in OPTIONS},
    }


def record_of_rollouts(prompts: list[list[int]], sampling: Sampling) -> dict[str, Any]:
    """What responses were drawn for, and how. `prompts`: the student's, as token ids."""
    options = json.loads(json.dumps(asdict(sampling)))  # as it will be read again: lists, no tuples
    return {"prompts": digest(prompts), **options}


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    found = []
    for name in now:
        if now[name] == then.get(name):
            continue
        if name in ("data", "tokenizer", "prompts"):
            found.append(f"the {name} {'is' if name == 'tokenizer' else 'are'} not the same")
        else:
            found.append(f"{name} is {now[name]!r}, it was {then.get(name)!r}")
    return found
