"""A frozen model that waits in main memory: its weights go to a device and are dropped there, nothing is copied back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offloaded:
    """Holds a model's weights and buffers in main memory, pinned where there is a GPU, so that the copies to it run while the host
    goes on. Tensors in `stay` (by identity) are left where they are: the head, which the loss reads later.

    The model must not be trained, nor its weights replaced by others."""

    def __init__(self, model: nn.Module, device: torch.device, stay: tuple[Tensor, ...] = ()) -> None:
        self.device, self._depth = device, 0
        self._places: list[tuple[dict, str, Tensor]] = []  # where each tensor is held, and the one in main memory
        kept, made = {id(tensor) for tensor in stay}, {}
        for module in model.modules():
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is None or id(tensor) in kept:
                        continue
                    if id(tensor) not in made:  # tied weights come once
                        made[id(tensor)] = tensor, _in_main_memory(tensor, device)
                    self._places.append((owner, name, made[id(tensor)][1]))
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the weights are on the device; calls inside of it change nothing."""
        if not self._depth:
            there: dict[int, Tensor] = {}
            for owner, name, held in self._places:
                if id(held) not in there:
                    there[id(held)] = _like(held, held.detach().to(self.device, non_blocking=True))
                owner[name] = there[id(held)]
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._leave()

    def _leave(self) -> None:
        for owner, name, held in self._places:
            owner[name] = held


def _in_main_memory(tensor: Tensor, device: torch.device) -> Tensor:
    held = tensor.detach().to("cpu")
    if device.type == "cuda" and torch.cuda.is_available():
        held = held.pin_memory()
    return _like(tensor, held)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
