"""How precise a loss's logits must be: its error, and its gradients', with logits kept in 32 or rounded to 16 bits.

    python -m bench.precision               # a few seconds; writes nothing

One vocabulary, bf16 hidden states and heads, judged by the oracle in float64 on the same inputs. Products of 16-bit operands
are exact in 32 bits, so that what is compared is the rounding of the tiles of logits and of their gradient. TRL's chunked
divergence, which keeps fp32 logits, stands beside it where it is installed.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from simct_kernels import LMHead, linear_simct_loss, simct_loss

from .cases import Case, Model, Problem
from .rivals import missing, trl_divergence

Result = tuple[Tensor, Tensor, Tensor]  # the loss, the gradients of hidden states and head


def by_autograd(problem: Problem, loss: Tensor) -> Result:
    return loss.detach(), *torch.autograd.grad(loss, (problem.student_hidden, problem.student_head.weight))


def ours(problem: Problem, **options) -> Result:
    sides = problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head
    return by_autograd(problem, linear_simct_loss(*sides, problem.units, problem.shared, **options))


def oracle(problem: Problem) -> Result:
    hidden = problem.student_hidden.detach().double().requires_grad_()
    weight = problem.student_head.weight.detach().double().requires_grad_()
    teacher = problem.teacher_hidden.double(), LMHead(problem.teacher_head.weight.double())
    loss = linear_simct_loss(hidden, LMHead(weight), *teacher, problem.units, problem.shared, backend="reference")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def rounded(problem: Problem, logits_dtype: torch.dtype, gradient_dtype: torch.dtype) -> Result:
    """As `linear_simct_loss`, with the tiles of logits and of their gradient rounded."""
    hidden, weight = problem.student_hidden.detach().float(), problem.student_head.weight.detach().float()
    student = (hidden @ weight.T).to(logits_dtype).float().requires_grad_()
    teacher = (problem.teacher_hidden.float() @ problem.teacher_head.weight.float().T).to(logits_dtype).float()
    loss = simct_loss(student, teacher, problem.units, problem.shared)
    (gradient,) = torch.autograd.grad(loss, student)
    gradient = gradient.to(gradient_dtype).float()
    return loss.detach(), (gradient @ weight).bfloat16(), (gradient.T @ hidden).bfloat16()


def variants(problem: Problem) -> Iterator[tuple[str, Callable[[], Result]]]:
    f32, b16 = torch.float32, torch.bfloat16
    yield "ours (PyTorch backend)", lambda: ours(problem)
    yield "fp32 logits, fp32 gradient tile", lambda: rounded(problem, f32, f32)
    yield "fp32 logits, bf16 gradient tile", lambda: rounded(problem, f32, b16)
    yield "bf16 logits, bf16 gradient tile", lambda: rounded(problem, b16, b16)
    if missing("trl") is None:
        yield "TRL chunked divergence", lambda: by_autograd(problem, trl_divergence.prepare(problem)())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 256), ("vocabulary", 8192), ("student-width", 256), ("teacher-width", 384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    student = Model("student", sizes.vocabulary, sizes.student_width)
    teacher = Model("teacher", sizes.vocabulary, sizes.teacher_width)
    problem = Problem(Case("precision", student, teacher, sizes.vocabulary, sizes.rows), torch.device("cpu"))
    exact = oracle(problem)
    table = Table(title=f"Relative error, {sizes.rows} rows, V = K = {sizes.vocabulary}, bf16 inputs")
    for column in ("", "loss", "gradient of hidden", "gradient of head"):
        table.add_column(column, justify="right" if column else "left")
    for name, run in variants(problem):
        errors = [
            float((value.double() - expected).norm() / expected.norm())
            for value, expected in zip(run(), exact, strict=True)
        ]
        table.add_row(name, *(f"{error:.1e}" for error in errors))
    Console().print(table)


if __name__ == "__main__":
    main()
