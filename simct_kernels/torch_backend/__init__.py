"""SimCT's losses in chunked PyTorch, on any device: what runs where there is no GPU, and the judge's other witness.

A backend is three losses (`simct_loss`, `linear_simct_loss`, `topk_simct_loss`) and two jobs, `linear_job` and `topk_job`: what the
custom ops of `simct_kernels.ops` run below autograd.
"""

from simct_kernels.torch_backend.job import (
    LossJob,
    add_gradient,
    apply_job,
    candidate_mass,
    compute_dtype,
    linear_simct_loss,
    simct_loss,
)
from simct_kernels.torch_backend.job import LossJob as linear_job
from simct_kernels.torch_backend.scores import candidate_scores
from simct_kernels.torch_backend.topk import Job as topk_job
from simct_kernels.torch_backend.topk import topk_simct_loss

__all__ = [
    "LossJob",
    "add_gradient",
    "apply_job",
    "candidate_mass",
    "candidate_scores",
    "compute_dtype",
    "linear_job",
    "linear_simct_loss",
    "simct_loss",
    "topk_job",
    "topk_simct_loss",
]
