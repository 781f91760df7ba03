"""The tiles of the table, and how rows are split between programs."""

import pytest
import torch
import triton
from kernels.cases import FEW, make_problem, relative_error, slow
from triton_cases import linear_simct_loss, simct_loss

from simct_kernels.triton_backend import tiles

DISJOINT = {"beta": 0.5, "candidates": "disjoint"}


@pytest.mark.parametrize(
    "architecture,options",
    [(90, DISJOINT), *slow(("gfx942", {}), (90, {}), ("gfx942", DISJOINT))],
    ids=str,
)
def test_the_tables_tiles_agree_with_the_oracle(monkeypatch, architecture, options):
    if not torch.cuda.is_available():
        monkeypatch.setattr(tiles, "_architecture", lambda device: architecture)
    # Vocabularies of one tile and a rest, and of three tiles and a rest of a split row's program.
    problem = make_problem(FEW, shared_size=1100, student_vocabulary=4400, teacher_vocabulary=1200, dtype=torch.float32)
    exact = problem.to(torch.float64)
    linear_simct_loss(*exact.arguments(), backend="reference", **options).backward()
    linear_simct_loss(*problem.arguments(), **options).backward()
    for key, gradient in problem.gradients().items():
        assert relative_error(gradient, exact.gradients()[key]) < 1e-5
    student, teacher, *rest = problem.logits()
    exact_student = student.detach().double().requires_grad_()
    simct_loss(exact_student, teacher.double(), *rest, backend="reference", **options).backward()
    simct_loss(student, teacher, *rest, **options).backward()
    assert relative_error(student.grad, exact_student.grad) < 1e-5


@pytest.mark.parametrize("architecture", [90, "gfx942"])
def test_the_tables_tiles_of_few_candidates_agree_with_the_oracle(monkeypatch, architecture):
    if not torch.cuda.is_available():
        monkeypatch.setattr(tiles, "_architecture", lambda device: architecture)
    # 18 columns are a tile of ids and a rest; 90 entries, most of the same few ids.
    sizes = {"shared_size": 300, "student_vocabulary": 403, "teacher_vocabulary": 371}
    problem = make_problem(((1, 1), (1, 1), (2, 2)), dtype=torch.float32, **sizes)
    exact = problem.to(torch.float64)
    linear_simct_loss(*exact.arguments(), backend="reference", top_k=18).backward()
    linear_simct_loss(*problem.arguments(), top_k=18).backward()
    for key, gradient in problem.gradients().items():
        assert relative_error(gradient, exact.gradients()[key]) < 1e-5


@pytest.mark.parametrize("rows", [1, 7, 1000, 100_000])
@pytest.mark.parametrize("columns", [1, 1024, 97_675])
def test_splits_cover_every_column_once(rows, columns):
    for shape in tiles.TILES[90].values():
        count, each = tiles.splits(rows, columns, shape, torch.device("cpu"))
        assert count * each * shape.block >= columns > (count - 1) * each * shape.block


def test_all_architectures_have_all_kernels():
    kernels = set(tiles.TILES[90])
    for table in tiles.TILES.values():
        assert set(table) == kernels
        assert all(triton.next_power_of_2(shape.block) == shape.block for shape in table.values())
