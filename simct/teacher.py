"""Where teacher scores come from: a local Hugging Face model, frozen, in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.checks import check_head, check_vocabulary
from simct.hidden import Layout, response_hidden_states
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
        self.layout, self.offload = Layout(), False
        self._head: LMHead | None = None

    def place(self, device: torch.device, *, packing: str = "auto", offload: bool = False) -> None:
        """Puts the model on the device that it scores on. `offload`: only its head; the rest waits in main memory and is on the
        device inside `on_device()` only. (Quantised models stay where they were loaded.) `packing`: see `Layout.of`."""
        quantised = getattr(self.model, "is_quantized", False)
        if offload and quantised:
            raise ValueError("offload_teacher is True, but the teacher is quantised: such weights cannot be moved")
        if not quantised:
            self.model.to(device)
        self.layout = Layout.of(self.model, packing)
        head = LMHead.from_model(self.model)
        self.offload = offload and device.type != "cpu"
        self._device = device
        if self.offload:
            # Storage of its own, so that it stays behind when the parameters leave.
            bias = None if head.bias is None else head.bias.detach().clone()
            head = replace(head, weight=head.weight.detach().clone(), bias=bias)
            self.model.to("cpu")
        self._head = head

    @property
    def head(self) -> LMHead:
        # Made once and kept: the loss caches the rows of a frozen head that it shares with the student on this object.
        if self._head is None:
            self._head = LMHead.from_model(self.model)
        return self._head

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the model is where it scores; after it, in main memory again if it is offloaded between phases."""
        if not self.offload:
            yield
            return
        self.model.to(self._device)
        try:
            yield
        finally:
            self.model.to("cpu")
            torch.cuda.empty_cache()

    @torch.no_grad()
    def hidden_states(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Hidden rows [N_t, H_t] that predict the tokens of the responses (teacher token ids, without padding)."""
        if not any(responses):
            return torch.empty(0, self.head.weight.shape[1], dtype=self.model.dtype, device=self.head.weight.device)
        sequences = self.layout.build(prompts, responses).to(self.model.device)
        return response_hidden_states(self.model, sequences)
