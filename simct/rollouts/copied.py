"""A copy of the student to sample from."""

import copy

import torch
from transformers import PreTrainedModel

from simct.rollouts.protocol import Response, RolloutEngine, Sampling
from simct.rollouts.weights import CHECKPOINTED


class CopiedStudent:
    """Samples from a copy of the student in another precision, whole on this device also where the student is sharded.

    Parameters that are frozen and have that precision and place already are shared with the student, not copied.
    """

    def __init__(self, student: PreTrainedModel, dtype: torch.dtype, make, device: torch.device | None = None) -> None:
        """`make`: the engine for the copy, a function of a model. `device`: where the copy is; None: where the student is."""
        memo = {}
        for parameter in student.parameters():
            own, place = parameter.dtype, device or parameter.device
            if parameter.device == place and (
                not parameter.is_floating_point() or (not parameter.requires_grad and own == dtype)
            ):
                memo[id(parameter)] = parameter
                continue
            value = parameter.detach().to(place, dtype if parameter.is_floating_point() else own, copy=True)
            memo[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
        self.model = copy.deepcopy(student, memo).eval()
        if device is not None:
            self.model.to(device)  # what is left: buffers
        self.engine: RolloutEngine = make(self.model)

    @torch.no_grad()
    def update_weights(self, model: PreTrainedModel) -> None:
        own = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            name = name.replace(f"{CHECKPOINTED}.", "")
            if parameter is not own[name]:
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                own[name].copy_(whole)

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        return self.engine.generate(prompts, sampling, seed=seed)
