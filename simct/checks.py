"""What is checked before any long work. Each check raises a ValueError that names the argument, its value and what was expected."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.hidden import PackedSequences, response_hidden_states
from simct.prompts import prompt_of
from simct.tokens import token_bytes
from simct_kernels import LMHead


def check_prompts(name: str, dataset, required: bool = False) -> None:
    """ValueError unless the data set has records, the first of them with a prompt."""
    if dataset is None and not required:
        return
    if dataset is None or len(dataset) == 0:
        raise ValueError(f"{name} is empty: expected at least one record with a prompt or messages")
    try:
        prompt_of(dataset[0])
    except ValueError as error:
        raise ValueError(f"{name}, record 0: {error}") from None


def check_writable(folder: str) -> None:
    """ValueError unless files can be written into the folder, which is made if it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise ValueError(f"output_dir {folder!r} cannot be written: {error}") from None


def check_disk_space(folder: str, model: nn.Module) -> None:
    """ValueError unless one checkpoint fits on the disk: the weights, and two moments of each for the optimiser."""
    needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"output_dir {folder!r} has {free / 1e9:.1f} GB free: expected {needed / 1e9:.1f} GB for one checkpoint "
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
