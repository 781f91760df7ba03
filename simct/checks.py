"""What is checked before any long work. Each check raises a ValueError that names the argument, its value and what was expected."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.hidden import PackedSequences, response_hidden_states
from simct.prompts import prompt_of, render_prompt
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
            raise ValueError(
                f"{name} is a {type(dataset).__name__} without a length: expected a list or a datasets.Dataset"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty: expected at least one record with a prompt or messages")


def check_records(
    name: str, dataset, sides: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]], config
) -> None:
    """Renders every prompt for both models; ValueError names the first record that cannot be rendered or is too long.

    A prompt and a whole response must fit the student's context, and a prompt the teacher's. (A response that turns out too long
    for the teacher is cut there, and what is cut is counted.)
    """
    for number in range(0 if dataset is None else len(dataset)):
        try:
            prompt = prompt_of(dataset[number])
            for side, (model, tokenizer) in sides.items():
                tokens, limit = len(render_prompt(prompt, tokenizer, config.prompt_format)), context_length(model)
                budget = config.max_new_tokens if side == "student" else 1
                if tokens + budget > limit:
                    raise ValueError(
                        f"the prompt has {tokens} {side} tokens, with max_new_tokens={config.max_new_tokens} too many for "
                        f"the {side}'s context of {limit}"
                    )
        except ValueError as error:
            raise ValueError(f"{name}, record {number}: {error}") from error


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
        sequences = PackedSequences(ids, torch.ones_like(ids), torch.arange(4, device=ids.device))
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
