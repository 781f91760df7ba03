"""What a model is checked for before it is used. Each check raises a ValueError that names the model and what was expected."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.models.hidden import PackedSequences, attention_that_runs, response_hidden_states
from simct.pairing.tokens import token_bytes
from simct_kernels import LMHead


def context_length(model: nn.Module) -> float:
    """The most tokens that the model says it can read; infinite if it says nothing."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


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
        sequences = PackedSequences.build([[1]], [[2, 3, 4, 5]]).to(ids.device)
        with attention_that_runs(model):
            own = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
            ours = head.logits(response_hidden_states(model, sequences).to(ids.device))
    finally:
        model.train(training)
    if not (own.isfinite().all() and ours.isfinite().all()):
        names = ", ".join(nonfinite_weights(model)[:3]) or "none, they overflow"
        raise ValueError(
            f"{name} {type(model).__name__} has logits that are no finite numbers (such weights: {names}): expected a model "
            "that is whole, in a precision that holds its activations"
        )
    tolerance = 1e-3 if own.dtype == head.weight.dtype else 0.05  # low-precision heads round their logits
    difference = (own - ours[:, : own.shape[1]].float()).abs().max() / own.abs().max().clamp(min=1e-6)
    if not difference <= tolerance:
        raise ValueError(
            f"{name} {type(model).__name__} changes its logits in a way that LMHead.from_model does not reproduce "
            f"(relative difference {difference:.2g}): "
            "expected logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)"
        )


@torch.no_grad()
def nonfinite_weights(model: nn.Module) -> list[str]:
    """The names of the parameters that hold a value that is no finite number; of a sharded model (FSDP2), in this process's
    shards."""
    return nonfinite_tensors(model.named_parameters())


@torch.no_grad()
def nonfinite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """As `nonfinite_weights`, of tensors by name. Reads each once, copies none, and waits for a device once."""
    named, largest = [], []
    for name, parameter in tensors:
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if own.is_floating_point() and own.itemsize > 1 and own.numel() and not own.is_meta:
            named.append(name)
            largest.append(torch.linalg.vector_norm(own, torch.inf).float())  # a NaN goes through a maximum
    if not named:
        return []
    finite = torch.stack([value.to(largest[0].device) for value in largest]).isfinite().tolist()
    return [name for name, good in zip(named, finite, strict=True) if not good]
