"""A copy of the student to sample from."""

import copy

import torch
from transformers import PreTrainedModel

from simct.rollouts.protocol import Response, RolloutEngine, Sampling


class CopiedStudent:
    """Samples from a copy of the student in another precision, whole on this device also where the student is sharded.

    Parameters that are frozen and have that precision already are shared with the student, not copied.
    """

    def __init__(self, student: PreTrainedModel, dtype: torch.dtype, make) -> None:
        """`make`: the engine for the copy, a function of a model."""
        memo = {}
        for parameter in student.parameters():
            if not parameter.is_floating_point() or (not parameter.requires_grad and parameter.dtype == dtype):
                memo[id(parameter)] = parameter
            else:
                memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        self.model = copy.deepcopy(student, memo).eval()
        self.engine: RolloutEngine = make(self.model)

    @torch.no_grad()
    def update_weights(self, model: PreTrainedModel) -> None:
        own = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter is not own[name]:
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                own[name].copy_(whole)

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        return self.engine.generate(prompts, sampling, seed=seed)
