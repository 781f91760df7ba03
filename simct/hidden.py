"""Packed prediction rows: the last hidden states that predict response tokens, with no language-model head applied.

Row order is that of `simct_kernels.AlignedUnits`: response by response, token by token, without padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from simct_kernels import LMHead


@dataclass(frozen=True)
class PackedSequences:
    """Prompts and responses as a right-padded batch, and where in it the prediction rows are."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T], 1 for tokens and 0 for padding
    rows: Tensor  # int64 [N], positions in the flattened [B * T] batch whose hidden state predicts a response token

    @classmethod
    def build(cls, prompts: list[list[int]], responses: list[list[int]], pad_id: int = 0) -> "PackedSequences":
        # Padding is masked and comes last, so that any id will do. The last response token predicts nothing that enters
        # the loss: it is not fed.
        sequences = [p + r[:-1] for p, r in zip(prompts, responses, strict=True)]
        width = max(map(len, sequences))
        input_ids = torch.full((len(sequences), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        rows = []
        for i, (prompt, response, sequence) in enumerate(zip(prompts, responses, sequences, strict=True)):
            input_ids[i, : len(sequence)] = torch.tensor(sequence)
            attention_mask[i, : len(sequence)] = 1
            first = i * width + len(prompt) - 1
            rows.append(torch.arange(first, first + len(response)))
        return cls(input_ids, attention_mask, torch.cat(rows))

    def to(self, device: torch.device | str) -> "PackedSequences":
        return PackedSequences(self.input_ids.to(device), self.attention_mask.to(device), self.rows.to(device))


def response_hidden_states(model: nn.Module, sequences: PackedSequences) -> Tensor:
    """The hidden rows [N, H] that predict the response tokens. Runs the decoder only; its head is never applied."""
    output = model.get_decoder()(
        input_ids=sequences.input_ids, attention_mask=sequences.attention_mask, use_cache=False, return_dict=True
    )
    return output.last_hidden_state.flatten(0, 1)[sequences.rows]


def forward_through(wrapper: nn.Module, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """Runs `compute` inside `wrapper`'s forward (DistributedDataParallel and FSDP prepare their gradient hooks there), although
    it calls parts of `module` and not `module` itself."""
    if wrapper is module:
        return compute()
    original = module.forward

    def once(*args, **kwargs):
        module.forward = original
        return compute()

    module.forward = once
    try:
        return wrapper()
    finally:
        module.forward = original


def under_autocast(hidden: Tensor, head: LMHead, dtype: torch.dtype) -> tuple[Tensor, LMHead]:
    """What autocast would do to a linear layer: its operands in the low precision, gradients back to the masters."""
    bias = head.bias if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), replace(head, weight=head.weight.to(dtype), bias=bias)
