"""Packed prediction rows: the last hidden states that predict response tokens, with no language-model head applied.

Row order is that of `simct_kernels.AlignedUnits`: response by response, token by token, without padding. For the forward pass the
sequences are laid out in one of two ways, with the same numbers: padded, one sequence a row; or packed, several sequences one
after the other in a row, told apart by position ids that begin again at 0 (what transformers' attention masks and the
variable-length flash attention read).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from simct.models.varlen import has_kernel, varlen_inside
from simct_kernels import LMHead
from simct_kernels.host import to_device


@dataclass(frozen=True)
class PackedSequences:
    """Prompts and responses laid out as a batch, and where in it the prediction rows are."""

    input_ids: Tensor  # int64 [B, T]
    # int64 [B, T], begin again at 0 with each sequence, what fills a row up is a sequence of its own; None: the model's own
    position_ids: Tensor | None
    rows: Tensor  # int64 [N], positions in the flattened [B * T] batch whose hidden state predicts a response token
    attention_mask: Tensor | None = (
        None  # int64 [B, T], 1 for tokens and 0 for padding; None where sequences share rows, or padding is read by nobody
    )
    tokens: int = 0  # tokens that are no filling
    # int32 [S + 1], where each sequence of a single row begins and the last one ends, and the longest one's tokens: what
    # variable-length attention would wait for the device to find out, in every layer. None: the model is not told.
    boundaries: Tensor | None = None
    longest: int = 0
    varlen: bool = False  # PyTorch's own variable-length attention, in place of the model's

    @classmethod
    def build(
        cls,
        prompts: list[list[int]],
        responses: list[list[int]],
        *,
        row_length: int | None = None,
        masked: bool = True,
        bounded: bool = False,
    ) -> "PackedSequences":
        """`row_length` None: one sequence a row, padded on the right. Otherwise sequences share rows of that many tokens (more, if
        a sequence is longer), as few rows as first-fit finds. `masked` False: the model is not told of padding, which comes behind
        all that a causal model reads. `bounded`: it is told where the sequences of a single row begin.

        Without any sequence the batch is one token that predicts nothing, so that a forward pass still has something to read."""
        # The last response token predicts nothing that enters the loss: it is not fed. Filling comes last and is read by nobody.
        sequences = [p + r[:-1] for p, r in zip(prompts, responses, strict=True)] or [[0]]
        lengths = [len(sequence) for sequence in sequences]
        width = max(lengths)
        bins = [[i] for i in range(len(sequences))]
        if row_length is not None:
            width = max(width, min(row_length, sum(lengths)))
            bins = first_fit(lengths, width)
        width = max(sum(lengths[i] for i in row) for row in bins)
        input_ids = torch.zeros(len(bins), width, dtype=torch.int64)
        position_ids = torch.zeros_like(input_ids)
        start_of = {}
        for row, members in enumerate(bins):
            offset = 0
            for i in members:
                start_of[i] = row * width + offset
                input_ids[row, offset : offset + lengths[i]] = torch.tensor(sequences[i])
                position_ids[row, offset : offset + lengths[i]] = torch.arange(lengths[i])
                offset += lengths[i]
            position_ids[row, offset:] = torch.arange(width - offset)
        mask = None
        if row_length is None:
            mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long() if masked else None
            position_ids = torch.arange(width).expand(len(bins), width).contiguous() if masked else None
        rows = [torch.empty(0, dtype=torch.int64)]
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            first = start_of[i] + len(prompt) - 1
            rows.append(torch.arange(first, first + len(response)))
        boundaries = None
        if bounded and len(bins) == 1:  # which nothing fills up
            boundaries = torch.tensor([0, *itertools.accumulate(lengths[i] for i in bins[0])], dtype=torch.int32)
        tokens = sum(lengths) if prompts else 0
        return cls(input_ids, position_ids, torch.cat(rows), mask, tokens, boundaries, max(lengths))

    def to(self, device: torch.device | str) -> "PackedSequences":
        """Without waiting for what a GPU still has to do."""
        names = ("input_ids", "position_ids", "rows", "attention_mask", "boundaries")
        moved = {name: getattr(self, name) for name in names}
        return replace(
            self, **{name: None if tensor is None else to_device(tensor, device) for name, tensor in moved.items()}
        )


@dataclass(frozen=True)
class Layout:
    """How one model's sequences are laid out. `packed`: sequences share rows; `one_row`: all in one (variable-length flash
    attention reads the boundaries of a single row; elsewhere attention within a row is quadratic, and rows are as long as the
    longest sequence: never more work than padding).

    `hidden_size`: that of a model on a GPU whose attention is SDPA. Rows that sequences share want a mask there, T x T for each
    row, and with it the slower of SDPA's kernels; a sequence alone in its row wants none. So rows are shared only where that saves
    more than it costs. 0: always. `bounded`: the model is told where the sequences of a row begin. `varlen`: in a single row, by
    PyTorch's own variable-length attention."""

    packed: bool = False
    one_row: bool = False
    hidden_size: int = 0
    bounded: bool = False
    varlen: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        packing: str = "auto",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        *,
        frozen: bool = False,
        device: torch.device | None = None,
    ) -> "Layout":
        """`packing`: "off", "on", or "auto": on if this model gives the same hidden states for packed sequences as for each alone.
        `autocast`: that of the run, for attention that takes 16 bits only (elsewhere the weights' own precision shows more).
        `frozen`: no gradient is ever asked for. `device`: where the model runs, if its weights wait
        elsewhere, as those of a model to be sharded do.

        Raises ValueError for "on" with a model that does not (a state that runs through the whole row, learned positions, ...).
        """
        device = device or next(model.parameters()).device
        plain = cls(hidden_size=_sdpa_width(model, device))
        if plain.hidden_size and _packing_problem(model, plain) is not None:
            plain = cls()
        if packing == "off":
            return plain
        layouts = [cls(True, hidden_size=plain.hidden_size if packing == "auto" else 0)]
        if uses_flash(model):
            layouts = [cls(True, True, bounded=True), cls(True, True)]
        elif frozen and has_kernel(model, device):
            layouts.insert(0, cls(True, True, bounded=True, varlen=True))
        for layout in layouts:
            with autocast() if layout.one_row else nullcontext():
                problem = _packing_problem(model, layout)
            if problem is None:
                return layout
        if packing == "on":
            raise ValueError(f"packing is 'on', but {type(model).__name__} cannot read packed sequences ({problem})")
        return plain

    def build(self, prompts: list[list[int]], responses: list[list[int]]) -> PackedSequences:
        lengths = [len(p) + max(len(r) - 1, 0) for p, r in zip(prompts, responses, strict=True)]
        width = max(lengths, default=1)
        if not self.packed or not self.shares_rows([(len(first_fit(lengths, width)), width)], [(len(lengths), width)]):
            return PackedSequences.build(prompts, responses, masked=not self.hidden_size)
        row_length = max(sum(lengths) if self.one_row else width, 1)
        return self._in_rows(prompts, responses, row_length)

    def _in_rows(self, prompts: list[list[int]], responses: list[list[int]], length: int) -> PackedSequences:
        sequences = PackedSequences.build(prompts, responses, row_length=length, bounded=self.bounded)
        return replace(sequences, varlen=self.varlen)

    def shares_rows(self, shared: list[tuple[int, int]], alone: list[tuple[int, int]]) -> bool:
        """Whether batches of so many rows of so many tokens cost less than those with one sequence a row. Of a layer's token: its
        products, some 24 hidden_size^2; attention with a mask 4 T hidden_size at half the speed, causal without one half of it."""
        if not self.hidden_size:
            return self.packed
        with_mask = sum(rows * width * (3 * self.hidden_size + width) for rows, width in shared)
        return with_mask < sum(rows * width * (3 * self.hidden_size + width / 4) for rows, width in alone)


@torch.no_grad()
def _packing_problem(model: nn.Module, layout: Layout) -> str | None:
    """What is wrong with this model's hidden states of sequences that share rows, or are filled up without a mask; None if nothing
    is."""
    prompts, responses = [[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [3, 1]]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with attention_that_runs(model):
            alone = [
                response_hidden_states(model, PackedSequences.build([p], [r]).to(device))
                for p, r in zip(prompts, responses, strict=True)
            ]
            if layout.packed:
                both = layout._in_rows(prompts, responses, 11)  # both in one row, with room to fill
            else:
                both = PackedSequences.build(prompts, responses, masked=False)
            packed = response_hidden_states(model, both.to(device))
    except (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError) as error:
        return str(error)
    finally:
        model.train(training)
    alone = torch.cat(alone).float()
    difference = float((packed.float() - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    low = packed.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    tolerance = 0.05 if low else 1e-4
    return None if difference <= tolerance else f"relative difference {difference:.2g} from sequences alone"


def _sdpa_width(model: nn.Module, device: torch.device) -> int:
    """The hidden size of a model on a GPU whose attention is SDPA; 0 of any other."""
    config = model.config.get_text_config()
    return config.hidden_size if device.type != "cpu" and getattr(config, "_attn_implementation", None) == "sdpa" else 0


def uses_flash(model: nn.Module) -> bool:
    """Whether the model's attention is a flash kernel: on a GPU only, in 16 bits only, and with a row's sequences told apart."""
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


@contextmanager
def attention_that_runs(model: nn.Module) -> Iterator[None]:
    """Inside, a model that waits in main memory to be sharded has an attention that runs there: flash attention has no CPU
    kernel, and what is checked so (positions, head) does not depend on which kernel computes it."""
    if not uses_flash(model) or next(model.parameters()).device.type != "cpu":
        yield
        return
    own = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = own


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins of at most `capacity` (more only for one that is larger alone): first-fit decreasing. Inside a bin
    they are in order, and bins are in the order of their first member."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for b, free in enumerate(room):
            if sizes[i] <= free:
                bins[b].append(i)
                room[b] -= sizes[i]
                break
        else:
            bins.append([i])
            room.append(capacity - sizes[i])
    return sorted(sorted(members) for members in bins)


def response_hidden_states(model: nn.Module, sequences: PackedSequences) -> Tensor:
    """The hidden rows [N, H] that predict the response tokens. Runs the decoder only; its head is never applied."""
    positions = {}
    if sequences.attention_mask is None and sequences.position_ids is not None:
        # Else the model's own: some count from the mask, some know no positions.
        positions["position_ids"] = sequences.position_ids
    if sequences.boundaries is not None:
        for side in "q", "k":
            positions |= {f"cu_seq_lens_{side}": sequences.boundaries, f"max_length_{side}": sequences.longest}
    with varlen_inside(model) if sequences.varlen else nullcontext():
        output = model.get_decoder()(
            input_ids=sequences.input_ids,
            attention_mask=sequences.attention_mask,
            use_cache=False,
            return_dict=True,
            **positions,
        )
    hidden = output.last_hidden_state.flatten(0, 1)
    return hidden[sequences.rows.to(hidden.device)]  # of a model spread over devices, the last one


def forward_through(wrapper: nn.Module, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """Runs `compute` inside `wrapper`'s forward (DistributedDataParallel and FSDP prepare their gradient hooks there, and FSDP
    gathers the parameters of the head), although it calls parts of `module` and not `module` itself.

    The Trainer wraps the model, and both call its `forward` by that name: DistributedDataParallel has no other way in. (FSDP2 has
    one, `register_fsdp_forward_method`.)"""
    original = module.__dict__.get("forward")

    def once(*args, **kwargs):
        restore()
        return compute()

    def restore():
        if original is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = original

    module.forward = once
    try:
        return wrapper()
    finally:
        restore()


def under_autocast(hidden: Tensor, head: LMHead, dtype: torch.dtype) -> tuple[Tensor, LMHead]:
    """What autocast would do to a linear layer: its operands in the low precision, gradients back to the masters."""
    bias = head.bias if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), replace(head, weight=head.weight.to(dtype), bias=bias)
