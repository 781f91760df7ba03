"""From the padded batches of other trainers to the packed rows that the losses read.

Other trainers hold `[B, T]` ids and masks, padded on the left, on the right, or on both (prompts left, what was sampled right), and
`[B, T, H]` hidden states. The losses read the hidden rows that predict response tokens, response after response without padding,
and `AlignedUnits` over them:

    ours = PaddedBatch(input_ids, response_mask, attention_mask)
    theirs = ours.for_teacher(pair, teacher_prompts)  # ids of the prompts, as the teacher reads them
    packed = padded_to_packed(pair, ours, student_hidden, theirs, teacher_hidden)
    loss = linear_simct_loss(packed.student_hidden, LMHead.from_model(student), packed.teacher_hidden, LMHead.from_model(teacher),
                             packed.units, shared)

A mask marks response *tokens*; the hidden state at position t - 1 predicts token t. (Labels: `labels != -100`.) Complete loops, for
TRL, Lightning and others, are in `examples/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simct.pairing.pair import Alignment, TokenizerPair


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """One model's token ids, padded, and which of them are the response: one to a row of the batch, without gaps, or none.

    The masks are bool or 0 and 1. Without an `attention_mask` every position counts as read: right where nothing is padded, and
    where padding stands only on the right of the responses, which causal attention does not see. Prompts that are padded on the
    left need one: without it the model would read the padding, and a response that begins right after padding would not be refused.

    Raises ValueError for shapes, dtypes or devices that do not fit, a mask with other values, no response in the whole batch, a
    response with gaps, response tokens that are padding, or a response that nothing predicts, as no token is before it. The checks
    read the tensors on the host.
    """

    input_ids: Tensor  # int64 [B, T]
    response_mask: Tensor  # bool or integer [B, T]
    attention_mask: Tensor | None = None  # bool or integer [B, T], 0 for padding
    responses: list[list[int]] = field(init=False)  # B of them, the ids of each row's response, without padding
    rows: Tensor = field(init=False)  # int64 [N], positions in the flattened [B * T] batch that predict response tokens

    def __post_init__(self) -> None:
        ids = self.input_ids
        if ids.dtype != torch.int64 or ids.dim() != 2:
            raise ValueError(f"input_ids must be int64 [B, T], got {ids.dtype} {list(ids.shape)}")
        marked = self._checked("response_mask", self.response_mask)
        read = None if self.attention_mask is None else self._checked("attention_mask", self.attention_mask)
        if not marked.any():
            raise ValueError(f"response_mask marks none of the {ids.numel()} tokens: expected a response in some row")
        first = marked.int().argmax(dim=1)
        for row, (start, length) in enumerate(zip(first.tolist(), marked.sum(dim=1).tolist(), strict=True)):
            if length == 0:
                continue
            if not marked[row, start : start + length].all():
                gap = start + int(marked[row, start:].int().argmin())
                raise ValueError(f"response_mask, row {row}: position {gap} is a gap in the response: expected none")
            if read is not None and not read[row, start : start + length].all():
                raise ValueError(
                    f"response_mask, row {row}: marks positions {start} to {start + length - 1}, "
                    "of which attention_mask says that some are padding"
                )
            if start == 0 or (read is not None and not read[row, start - 1]):
                raise ValueError(
                    f"response_mask, row {row}: the response begins at position {start}, and no token before it predicts it: "
                    "expected a prompt, or a token that begins the text"
                )
        host = ids.cpu()
        responses = [host[row, marks].tolist() for row, marks in enumerate(marked)]
        object.__setattr__(self, "responses", responses)
        object.__setattr__(self, "rows", (marked.flatten().nonzero().squeeze(1) - 1).to(ids.device))

    def _checked(self, name: str, mask: Tensor) -> Tensor:
        """The mask as bool, in main memory."""
        if mask.shape != self.input_ids.shape:
            raise ValueError(
                f"{name} must be {list(self.input_ids.shape)} as input_ids, got {mask.dtype} {list(mask.shape)}"
            )
        if mask.device != self.input_ids.device:
            raise ValueError(f"{name} is on {mask.device}, but input_ids is on {self.input_ids.device}")
        if mask.is_floating_point() or mask.is_complex():
            raise ValueError(f"{name} must be bool or integer, got {mask.dtype}")
        mask = mask.cpu()
        other = (mask != 0) & (mask != 1)
        if other.any():
            raise ValueError(f"{name} must hold 0 and 1, got {mask[other][0].item()}")
        return mask.bool()

    @classmethod
    def build(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, pad_id: int = 0
    ) -> "PaddedBatch":
        """Prompts, each followed by its response, padded on the right with `pad_id`.

        Raises ValueError unless there is one response to each prompt, and for what `PaddedBatch` refuses.
        """
        if len(prompts) != len(responses) or not prompts:
            raise ValueError(
                f"{len(prompts)} prompts and {len(responses)} responses: expected one response to each prompt"
            )
        sequences = [torch.tensor([*p, *r], dtype=torch.int64) for p, r in zip(prompts, responses, strict=True)]
        ids = pad_sequence(sequences, batch_first=True, padding_value=pad_id)
        place = torch.arange(ids.shape[1])
        start = torch.tensor([len(p) for p in prompts])[:, None]
        read = place < torch.tensor([len(sequence) for sequence in sequences])[:, None]
        return cls(ids, read & (place >= start), read)

    @classmethod
    def generated(cls, sequences: Tensor, prompt_mask: Tensor, end_ids: Sequence[int]) -> "PaddedBatch":
        """What `model.generate` returned for prompts padded on the left: the responses end with the first end of turn, included.

        Args:
            sequences: int64 [B, P + C], prompts and what was sampled; prompt_mask: [B, P], the prompts' attention mask.
            end_ids: the ids that end a response (`TokenizerPair.student_end_ids`).
        """
        if sequences.dim() != 2 or prompt_mask.dim() != 2 or sequences.shape[0] != prompt_mask.shape[0]:
            raise ValueError(
                f"sequences must be [B, P + C] and prompt_mask [B, P], got {list(sequences.shape)} and {list(prompt_mask.shape)}"
            )
        sampled = sequences[:, prompt_mask.shape[1] :]
        ends = torch.isin(sampled, torch.tensor(list(end_ids), dtype=sampled.dtype, device=sampled.device))
        response = (ends.cumsum(dim=1) - ends.long()) == 0  # no end before this token
        prompt = prompt_mask.bool()
        return cls(
            sequences,
            torch.cat([torch.zeros_like(prompt), response], dim=1),
            torch.cat([prompt, response], dim=1),
        )

    def for_teacher(self, pair: TokenizerPair, prompts: Sequence[Sequence[int]], *, pad_id: int = 0) -> "PaddedBatch":
        """The teacher's side of this batch, a student's: its own prompts, each followed by the same response in its tokens, padded
        on the right with `pad_id`, on this batch's device.

        Args:
            prompts: the teacher's ids for each row's prompt, in its own chat template where it has one: at least one token each.
        Raises:
            ValueError: not one prompt to each row, a prompt without a token before a response, ids outside a vocabulary.
        """
        theirs = PaddedBatch.build(prompts, pair.encode_teacher(self.responses), pad_id=pad_id)
        return theirs.to(self.input_ids.device)

    def to(self, device: torch.device | str) -> "PaddedBatch":
        """The same batch on a device."""
        read = None if self.attention_mask is None else self.attention_mask.to(device)
        return PaddedBatch(self.input_ids.to(device), self.response_mask.to(device), read)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with: `input_ids`, and `attention_mask` where there is one."""
        read = {} if self.attention_mask is None else {"attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids, **read}

    def hidden_rows(self, hidden_states: Tensor) -> Tensor:
        """The rows [N, H] that predict the response tokens, with gradient.

        Args:
            hidden_states: [B, T, H], the last of the decoder, to which the head is applied; or [N, H], packed already, as a
                teacher in another process ships them.
        Raises:
            ValueError: neither of both.
        """
        shape = tuple(hidden_states.shape)
        if len(shape) == 3 and shape[:2] == tuple(self.input_ids.shape):
            return hidden_states.flatten(0, 1)[self.rows.to(hidden_states.device)]
        if len(shape) == 2 and shape[0] == len(self.rows):
            return hidden_states
        raise ValueError(
            f"hidden_states must be {[*self.input_ids.shape, 'H']}, or packed [{len(self.rows)}, H], got {list(shape)}"
        )


class PackedRows(NamedTuple):
    """What `linear_simct_loss` reads besides heads and shared vocabulary."""

    student_hidden: Tensor  # [N_s, H_s]
    teacher_hidden: Tensor  # [N_t, H_t]
    units: Alignment  # on the student's device; `dropped` counts the student's tokens in no unit, by reason


def padded_to_packed(
    pair: TokenizerPair,
    student: PaddedBatch,
    student_hidden: Tensor,
    teacher: PaddedBatch,
    teacher_hidden: Tensor,
    *,
    disjoint: bool = False,
) -> PackedRows:
    """Packed rows of both sides and the aligned units over them; row b of both batches is the same response.

    Where the two sides' bytes differ there is no supervision, nor for a row that is a response on one side only; both are counted
    in `units.dropped`, as in the trainer ("text_differs", "no_teacher_tokens", ...).

    Args:
        student_hidden, teacher_hidden: [B, T, H] of each side, or packed: see `PaddedBatch.hidden_rows`. Gradients flow through.
        disjoint: as in `TokenizerPair.align_batch`.
    Raises:
        ValueError: batches of different sizes, hidden states that do not fit, ids outside a vocabulary.
    """
    units = pair.align_batch(student.responses, teacher.responses, disjoint=disjoint)
    rows = student.hidden_rows(student_hidden), teacher.hidden_rows(teacher_hidden)
    return PackedRows(*rows, cast(Alignment, units.to(student_hidden.device)))
