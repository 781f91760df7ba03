"""The order of prompts when each batch of rollouts serves several optimiser steps."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class RepeatedBatches(Sampler[int]):
    """Indices of `sampler` in blocks of `size`, each block `times` times in a row."""

    def __init__(self, sampler: Sampler[int], size: int, times: int) -> None:
        self.sampler, self.size, self.times = sampler, size, times

    def __len__(self) -> int:
        return len(self.sampler) * self.times

    def __iter__(self) -> Iterator[int]:
        block: list[int] = []
        for index in self.sampler:
            block.append(index)
            if len(block) == self.size:
                yield from block * self.times
                block = []
        yield from block * self.times

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
