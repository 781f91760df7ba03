"""What is checked before any long work. Each check raises a ValueError that names the argument, its value and what was expected."""

import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.data import rows
from simct.hidden import PackedSequences, response_hidden_states
from simct.tokens import token_bytes
from simct_kernels import LMHead


def check_datasets(train_dataset, eval_dataset) -> None:
    """ValueError unless there are records to train on, and to evaluate on if anything is given for that."""
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    named = [
        ("train_dataset", train_dataset),
        *((f"eval_dataset {name}".strip(), part) for name, part in parts.items()),
    ]
    for name, dataset in named:
        if dataset is None:
            continue
        if not hasattr(dataset, "__len__"):
            if name == "train_dataset" and isinstance(dataset, IterableDataset):
                continue
            raise ValueError(
                f"{name} is a {type(dataset).__name__} without a length: expected a list or a datasets.Dataset"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty: expected at least one record with a prompt or messages")


def check_run(config, train_dataset, eval_dataset) -> None:
    """What needs no model: processes, data sets, options that exclude each other, a folder to write to."""
    if config.n_gpu > 1:
        raise ValueError(
            f"{config.n_gpu} GPUs in one process: expected one process for each (torchrun, accelerate launch)"
        )
    check_datasets(train_dataset, eval_dataset)
    if train_dataset is not None and not hasattr(train_dataset, "__len__"):
        if config.max_steps <= 0:
            raise ValueError(
                f"max_steps is {config.max_steps}, but train_dataset is streamed and has no length: expected a number of steps"
            )
        if config.num_iterations > 1:
            raise ValueError(f"num_iterations is {config.num_iterations}: expected 1 with a streamed train_dataset")
        config.accelerator_config.dispatch_batches = False  # records are no tensors: every process reads its own
    if config.fsdp and int((config.fsdp_config or {}).get("version", 2)) != 2:
        raise ValueError(
            "fsdp_config names version 1: expected 2 (FSDP2), whose parameters keep their names and shapes"
        )
    check_writable(config.output_dir)


def usable_records(name: str, dataset, student: nn.Module, render, scorers: dict, config):
    """The records that can be used, and how many were skipped (0 unless `on_bad_row="skip"`).

    Renders every prompt for both models (of a streamed data set none: its records are checked when they are sampled from). A prompt
    and a whole response must fit the student's context, and a prompt its teacher's. (A response that turns out too long for the
    teacher is cut there, and what is cut is counted.) ValueError names the first record that cannot be used, or says that none can.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        return dataset, 0
    good, first = [], None
    for number, record in enumerate(rows(dataset)):
        try:
            check_record(record, student, render, scorers, config)
            good.append(number)
        except ValueError as error:
            first = first or f"{name}, record {number}: {error}"
            if config.on_bad_row == "fail":
                raise ValueError(first) from error
    skipped = len(dataset) - len(good)
    if not skipped:
        return dataset, 0
    if not good:
        raise ValueError(f"{name} has no record that can be used; {first}")
    warnings.warn(f"{name}: {skipped} of {len(dataset)} records are skipped; {first}", stacklevel=3)
    return dataset.select(good) if hasattr(dataset, "select") else [dataset[i] for i in good], skipped


def check_record(record: dict, student: nn.Module, render, scorers: dict, config) -> None:
    """ValueError unless the record's prompt fits both models."""
    name = record.get("teacher") if isinstance(record, dict) else None
    if name not in scorers:
        if len(scorers) > 1:
            raise ValueError(f"field 'teacher' is {name!r}: expected one of {', '.join(map(repr, scorers))}")
        name = next(iter(scorers))
    scorer = scorers[name]
    for side, limit, renderer, budget in (
        ("student", context_length(student), render, config.max_new_tokens),
        ("teacher", scorer.teacher.context_length, scorer.render, 1),
    ):
        tokens = len(renderer(record))
        if tokens + budget > limit:
            raise ValueError(
                f"the prompt has {tokens} {side} tokens, with max_new_tokens={config.max_new_tokens} too many for "
                f"the {side}'s context of {limit}"
            )


def context_length(model: nn.Module) -> float:
    """The most tokens that the model says it can read; infinite if it says nothing."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def check_writable(folder: str) -> None:
    """ValueError unless files can be written into the folder, which is made if it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise ValueError(f"output_dir {folder!r} cannot be written: {error}") from None


def check_disk_space(config, model: nn.Module) -> None:
    """ValueError unless a checkpoint fits on the disk: what is trained, and two moments of it if the optimiser is saved."""
    if config.save_strategy == "no":
        return
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = trained * (1 if config.save_only_model else 3)
    free = shutil.disk_usage(config.output_dir).free
    if free < needed:
        raise ValueError(
            f"output_dir {config.output_dir!r} has {free / 1e9:.1f} GB free: expected {needed / 1e9:.1f} GB for one checkpoint "
            "(save_strategy='no' writes none)"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """ValueError unless the model has a head with a row for each token that spells text (special ones may stand behind it:
    Gemma's text models have no row for the image token of their tokenizer)."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} {type(model).__name__} has no lm_head: expected a causal language model")
    rows, needed = head.weight.shape[0], len(tokenizer)
    if rows < needed:
        needed = 1 + max(i for i, piece in enumerate(token_bytes(tokenizer)) if piece is not None)
    if rows < needed:
        raise ValueError(
            f"{name}'s lm_head has {rows} rows but its tokenizer {needed} tokens: "
            "expected a head that covers the tokenizer (resize_token_embeddings, or the tokenizer of this model)"
        )


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Compares the model's own logits with those of `LMHead.from_model` on a few tokens.

    A model may change its logits in a way that `LMHead` does not know; a wrong loss would be the silent result.
    Raises ValueError if they differ; `name` ("student" or "teacher") stands in the message.
    """
    head = LMHead.from_model(model)
    training = model.training
    model.eval()
    try:
        ids = torch.arange(1, 5, device=head.weight.device)[None]
        own = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        sequences = PackedSequences.build([[1]], [[2, 3, 4, 5]]).to(ids.device)
        ours = head.logits(response_hidden_states(model, sequences))
    finally:
        model.train(training)
    tolerance = 1e-3 if own.dtype == head.weight.dtype else 0.05  # low-precision heads round their logits
    difference = (own - ours[:, : own.shape[1]].float()).abs().max() / own.abs().max().clamp(min=1e-6)
    if not difference <= tolerance:
        raise ValueError(
            f"{name} {type(model).__name__} changes its logits in a way that LMHead.from_model does not reproduce "
            f"(relative difference {difference:.2g}): "
            "expected logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)"
        )
