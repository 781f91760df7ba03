"""The Triton backend, called with CPU tensors: on a GPU if there is one, else in the interpreter."""

import dataclasses

import torch
from torch import Tensor

import simct_kernels
from simct_kernels import LMHead

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(argument):
    if isinstance(argument, LMHead):
        bias = None if argument.bias is None else argument.bias.to(DEVICE)
        return dataclasses.replace(argument, weight=argument.weight.to(DEVICE), bias=bias)
    return argument.to(DEVICE)


def _on_device(name: str):
    def loss(*arguments, backend: str = "triton", **options) -> Tensor:
        """Differentiable by the CPU tensors; another backend stays on the CPU."""
        function = getattr(simct_kernels, name)
        if backend != "triton":
            return function(*arguments, backend=backend, **options)
        result = function(*map(moved, arguments), backend=backend, **options)
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

    return loss


simct_loss, linear_simct_loss = _on_device("simct_loss"), _on_device("linear_simct_loss")
topk_simct_loss = _on_device("topk_simct_loss")
