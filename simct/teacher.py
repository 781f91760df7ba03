"""Where teacher scores come from: a local Hugging Face model, frozen, in evaluation mode."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.checks import check_head, check_vocabulary
from simct.hidden import PackedSequences, response_hidden_states
from simct_kernels import LMHead


class LocalTeacher:
    """Scores responses as hidden rows; its head is handed to the loss, which reads no more of it than it needs.

    Args:
        model: a causal language model; its parameters are frozen and it is put in evaluation mode.
        tokenizer: the model's own.
    Raises:
        ValueError: no language-model head, one that covers fewer tokens than the tokenizer has, or one that computes its logits in
            a way that `LMHead` cannot express.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        check_vocabulary(model, tokenizer, "teacher")
        check_head(model, "teacher")
        self._head: LMHead | None = None

    @property
    def head(self) -> LMHead:
        # Made once and kept: the loss caches the rows of a frozen head that it shares with the student on this object.
        if self._head is None or self._head.weight.device != self.model.device:
            self._head = LMHead.from_model(self.model)
        return self._head

    @torch.no_grad()
    def hidden_states(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Hidden rows [N_t, H_t] that predict the tokens of the responses (teacher token ids, without padding)."""
        if not any(responses):
            return torch.empty(0, self.head.weight.shape[1], dtype=self.model.dtype, device=self.model.device)
        sequences = PackedSequences.build(prompts, responses).to(self.model.device)
        return response_hidden_states(self.model, sequences)
