"""What a model is checked for before it is used. Each check raises a ValueError that names the model and what was expected."""

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.models.hidden import PackedSequences, response_hidden_states
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
