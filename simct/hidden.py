"""Packed prediction rows: the last hidden states that predict response tokens, with no language-model head applied.

Row order is that of `simct_kernels.AlignedUnits`: response by response, token by token, without padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PackedSequences:
    """Prompts and responses as a right-padded batch, and where in it the prediction rows are."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T], 1 for tokens and 0 for padding
    rows: Tensor  # int64 [N], positions in the flattened [B * T] batch whose hidden state predicts a response token

    @classmethod
    def build(cls, prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> "PackedSequences":
        # The last response token predicts nothing that enters the loss, so it is not fed.
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
