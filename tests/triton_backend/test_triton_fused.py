import pytest
import torch
from kernels.cases import MIXED, make_problem, relative_error
from triton_cases import linear_simct_loss
from test_triton_losses import OPTIONS, CAPPED, name

def run(problem, **o):
    problem = problem.to(problem.student_hidden.dtype, problem.teacher_hidden.dtype)
    loss = linear_simct_loss(*problem.arguments(), **o)
    loss.sum().backward()
    return loss.detach(), problem.gradients()

@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_agree(options):
    problem = make_problem(dtype=torch.float32, **CAPPED)
    expected, eg = run(problem.to(torch.float64), backend="reference", reduction="none", **options)
    for reduction in ("none", "sum"):
        loss, g = run(problem, backend="triton_fused", reduction=reduction, **options)
        assert relative_error(loss, expected if reduction == "none" else expected.sum()) < 1e-5
        for key in eg:
            assert relative_error(g[key], eg[key]) < 1e-5, key
