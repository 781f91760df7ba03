"""What one process holds of a model whose weights are shared out among several (FSDP2): its shares, and what is gathered of it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from simct.teachers.sharded import layers_of


def shares(parameters: Iterable[Tensor], processes: int) -> list[Tensor]:
    """The part of each that a process holds, without data: rows are dealt out in blocks of the same size, the last filled up."""
    if processes == 1:
        return list(parameters)
    return [torch.empty(-(-len(p) // processes), *p.shape[1:], dtype=p.dtype, device="meta") if p.dim() else p
            for p in parameters]  # fmt: skip


def size_of(tensors: Iterable[Tensor], itemsize: int | None = None) -> int:
    return sum(tensor.numel() * (itemsize or tensor.element_size()) for tensor in tensors)


def layer_size(model: nn.Module, itemsize: int | None = None) -> int:
    """The largest layer's weights, whole: while it runs, the one after it is gathered."""
    return max((size_of(layer.parameters(), itemsize) for layer in layers_of(model)), default=0)


def gathered_of_student(student: nn.Module, itemsize: int) -> int:
    """Two layers at a time, and the head, which is kept until the backward is through."""
    return 2 * layer_size(student, itemsize) + size_of(student.get_output_embeddings().parameters(), itemsize)


def teacher_sizes(teacher: nn.Module, processes: int, offload: bool) -> tuple[int, int]:
    """Bytes that are there always, the head whole and a share of the rest (offloaded: the head alone), and those that are gathered
    while the teacher runs: two layers, and what of the decoder is in none."""
    head = {id(p): p for p in teacher.get_output_embeddings().parameters()}
    in_layers = {id(p) for layer in layers_of(teacher) for p in layer.parameters()}
    rest = [p for p in teacher.parameters() if id(p) not in head]
    outside = [p for p in rest if id(p) not in in_layers]
    held = size_of(head.values()) + size_of(teacher.buffers())
    if not offload:
        held += size_of(shares(rest, processes))
    return held, 2 * layer_size(teacher) + size_of(outside)
