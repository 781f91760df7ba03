"""Where teacher scores come from: a local Hugging Face model, frozen, in evaluation mode. (`simct.teachers.served`: a server.)"""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from simct.models.checks import check_head, check_vocabulary, context_length
from simct.models.hidden import Layout, response_hidden_states
from simct.models.loading import is_dispatched
from simct.models.out_of_memory import is_out_of_memory, release_memory
from simct.teachers.offload import Offloaded
from simct.teachers.sharded import shard
from simct_kernels import LMHead, token_statistics

Rows = tuple[Tensor, LMHead]  # hidden rows [N, H] and the head that they belong to


@dataclass(frozen=True)
class ServedRows:
    """What a server says of the rows that predict response tokens; `topk_simct_loss` reads it in place of hidden rows."""

    topk_ids: Tensor  # int64 [N_t, k], -1 where a vocabulary is smaller than k
    topk_logprobs: Tensor  # float32 [N_t, k]
    token_logprobs: Tensor  # float32 [N_t], of the responses' own tokens


class LocalTeacher:
    """Scores responses as hidden rows; its head is handed to the loss, which reads no more of it than it needs.

    Args:
        model: a causal language model; its parameters are frozen and it is put in evaluation mode.
        tokenizer: the model's own.
    Raises:
        ValueError: no language-model head, or one that covers fewer tokens than the tokenizer has. Where the head is first read,
            once the model is where it runs (`place`, or the first rows): one that computes its logits in a way that `LMHead`
            cannot express.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        check_vocabulary(model, tokenizer, "teacher")
        self.layout = Layout()
        self._offloaded: Offloaded | None = None
        self._runs_on: torch.device | None = None  # where it reads; None: where its weights are
        self.sharded = False  # then every process must score as often as the others
        self._head: LMHead | None = None

    def place(
        self, device: torch.device, *, packing: str = "auto", offload: bool = False, mesh: DeviceMesh | None = None
    ) -> None:
        """Puts the model on the device that it scores on. `offload`: only its head; the rest waits in main memory and is on the
        device inside `on_device()` only. `mesh`: the processes that its layers are shared out among; with `offload` the shares
        wait in main memory. Quantised models and those spread over devices (`device_map`) stay where they were loaded; the rows
        that they give, and the head, are on `device`. `packing`: see `Layout.of`.

        Raises ValueError for `offload` or a `mesh` with a model that stays, for a head that is on no device, and as said at the
        class."""
        stays = self.stays
        if stays and (offload or mesh is not None):
            option = "offload_teacher" if offload else "shard_teacher"
            raise ValueError(f"{option} is True, but the teacher is {stays}: its weights cannot be moved")
        if mesh is not None:
            shard(self.model, mesh, device, offload=offload)
            self.sharded = True
        elif not stays:
            self.model.to(device)
        if LMHead.from_model(self.model).weight.is_meta:
            raise ValueError("device_map leaves the teacher's head in main memory or on disk: expected it on a device")
        self._runs_on = device if self.sharded else self.model.device
        self.layout = Layout.of(self.model, packing, frozen=True, device=self._runs_on)
        check_head(self.model, "teacher")
        head = LMHead.from_model(self.model)
        if head.weight.device != device:
            bias = None if head.bias is None else head.bias.detach().to(device)
            head = replace(head, weight=head.weight.detach().to(device), bias=bias)
        if offload and mesh is None and device.type != "cpu":
            tensors = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
            stay = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]  # a part of a padded head
            stay += [p for p in self.model.get_output_embeddings().parameters()]
            self._offloaded = Offloaded(self.model, device, tuple(stay))
        self._head = head

    @property
    def stays(self) -> str | None:
        """Why its weights stay where they were loaded; None if they can be moved."""
        if getattr(self.model, "is_quantized", False):
            return "quantised"
        if is_dispatched(self.model):
            return f"spread over devices ({len(set(self.model.hf_device_map.values()))})"
        return None

    @property
    def head(self) -> LMHead:
        # Made once and kept: the loss caches the rows of a frozen head that it shares with the student on this object.
        if self._head is None:
            check_head(self.model, "teacher")
            self._head = LMHead.from_model(self.model)
        return self._head

    @property
    def generation_config(self) -> GenerationConfig | None:
        return self.model.generation_config

    @property
    def context_length(self) -> float:
        """The most tokens that it can read, a response's last one not among them."""
        return context_length(self.model)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the model is where it scores; after it, in main memory again if it is offloaded between phases."""
        if self._offloaded is None:
            yield
            return
        with self._offloaded.on_device():
            yield

    def rows(self, prompts: list[list[int]], responses: list[list[int]]) -> Rows:
        """What the loss reads of the teacher: hidden rows [N_t, H_t], and their head."""
        return self.hidden_states(prompts, responses), self.head

    def token_logprobs(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Log-probabilities [N_t] of the responses' own tokens."""
        hidden, head = self.rows(prompts, responses)
        tokens = torch.tensor(list(itertools.chain.from_iterable(responses)), dtype=torch.int64, device=hidden.device)
        return token_statistics(hidden, head, tokens).logprob

    @torch.no_grad()
    def hidden_states(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Hidden rows [N_t, H_t] that predict the tokens of the responses (teacher token ids, without padding)."""
        if not any(responses) and not self.sharded:
            return torch.empty(0, self.head.weight.shape[1], dtype=self.model.dtype, device=self.head.weight.device)
        sequences = self.layout.build(prompts, responses).to(self._runs_on or self.model.device)
        try:
            return response_hidden_states(self.model, sequences).to(self.head.weight.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            most = sequences.input_ids.numel()
            if self.sharded or len(prompts) < 2:  # the other processes would wait for the second try
                raise RuntimeError(
                    f"out of memory with {most} tokens in a forward pass of the teacher: set max_tokens_per_batch to "
                    f"{max(1, most // 2)} or less, or offload_teacher=True ({error})"
                ) from error
            message = str(error)
        # Outside of the handler: the error holds on to what was allocated.
        release_memory(self.head.weight.device)
        warnings.warn(f"out of memory with {most} tokens of the teacher at once: in halves ({message})", stacklevel=2)
        half = len(prompts) // 2
        parts = (self.hidden_states(prompts[part], responses[part]) for part in (slice(half), slice(half, None)))
        return torch.cat(list(parts))
