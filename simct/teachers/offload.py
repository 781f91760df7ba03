"""A frozen model that waits in main memory: its weights go to a device and are dropped there, nothing is copied back."""

import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simct.teachers.sharded import layers_of

ALIGNED = 256  # bytes: as CUDA aligns its own allocations


class Offloaded:
    """Holds a model's weights and buffers in main memory, pinned where there is a GPU. They are copied a layer at a time, in a
    stream of their own: a layer runs while those behind it are still on their way. Tensors in `stay` (by identity) are left where
    they are: the head, which the loss reads later.

    The model must not be trained, nor its weights replaced by others."""

    def __init__(self, model: nn.Module, device: torch.device, stay: tuple[Tensor, ...] = ()) -> None:
        self.device, self._depth = device, 0
        self._stream = torch.cuda.Stream(device) if has_streams(device) else None
        layers = layers_of(model)
        inside = {part for layer in layers for part in layer.modules()}
        pieces = [[part for part in model.modules() if part not in inside], *(layer.modules() for layer in layers)]
        known, kept = (
            {},
            {id(tensor): tensor for tensor in stay},
        )  # with the tensors: one that is gone leaves its id to the next
        self._pieces = [Piece(modules, device, kept, known) for modules in pieces]
        for layer, piece in zip(layers, self._pieces[1:], strict=True):
            layer.register_forward_pre_hook(lambda *_, piece=piece: piece.wait())
        for piece in self._pieces:
            piece.leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the weights are on the device; calls inside of it change nothing."""
        self._depth += 1
        try:
            if self._depth == 1:
                if self._stream is not None:  # what is allocated now may still be read by what was there before
                    self._stream.wait_stream(torch.cuda.current_stream(self.device))
                for piece in self._pieces:
                    piece.fetch(self._stream)
                self._pieces[0].wait()  # embedding and last norm: no layer's
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                for piece in self._pieces:
                    piece.wait()  # also of a layer that was not run: its memory is free now
                    piece.leave()


@dataclass
class Held:
    """One tensor, as a view of its piece in main memory, and on the device while it is there."""

    host: Tensor
    offset: int
    there: Tensor | None = None


class Piece:
    """The tensors of some modules, one behind the other in one piece of memory."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        device: torch.device,
        kept: dict[int, Tensor],
        known: dict[int, tuple[Tensor, Held]],
    ) -> None:
        """`kept`: tensors to be left where they are, by identity; `known`: those that a piece has, to which its own are added."""
        self.device, self._event = device, None
        found = [
            (owner, name, tensor)
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None and id(tensor) not in kept
        ]
        new = {id(tensor): tensor for _, _, tensor in found if id(tensor) not in known}  # tied weights come once
        ends = list(itertools.accumulate((-(-each.nbytes // ALIGNED) * ALIGNED for each in new.values()), initial=0))
        self.memory = pinned(ends[-1], device)
        self._own = [
            Held(_view(self.memory, start, each), start) for start, each in zip(ends, new.values(), strict=False)
        ]
        for (key, tensor), held in zip(new.items(), self._own, strict=True):
            held.host.copy_(tensor.detach())
            known[key] = tensor, held
        self._places = [(owner, name, known[id(tensor)][1]) for owner, name, tensor in found]

    def fetch(self, stream) -> None:
        """Begins the copy, in `stream` if there is one."""
        there = torch.empty_like(self.memory, device=self.device)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            there.copy_(self.memory, non_blocking=True)
            self._event = None if stream is None else stream.record_event()
        for held in self._own:
            held.there = _view(there, held.offset, held.host)
        self._put()

    def wait(self) -> None:
        """What the current stream does from now on finds the weights on the device."""
        if self._event is not None:
            torch.cuda.current_stream(self.device).wait_event(self._event)
            self._event = None

    def leave(self) -> None:
        for held in self._own:
            held.there = None
        self._put()

    def _put(self) -> None:
        for owner, name, held in self._places:
            owner[name] = held.host if held.there is None else held.there


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    value = memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
    return nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value


def has_streams(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


def pinned(size: int, device: torch.device) -> Tensor:
    """So many bytes of main memory, uint8, that a GPU copies from by itself. Not by `pin_memory`: that takes powers of two, up to
    twice as much, and a second copy in the meantime."""
    memory = torch.empty(size, dtype=torch.uint8)
    if size and has_streams(device):
        runtime = torch.cuda.cudart()
        error = int(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        if error:
            warnings.warn(
                f"{size / 1e9:.1f} GB of the offloaded teacher could not be pinned (CUDA error {error}): it will be copied slowly",
                stacklevel=2,
            )
            _forget_error(device)
        else:
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the error of a call until a launch is checked: it is to be this one, not some other's."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        pass
