"""The indexed product's kernels and the small divergence, each against plain PyTorch in float64."""

import math

import pytest
import torch
from kernels.cases import relative_error
from triton_cases import DEVICE

from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.divergence import divergence
from simct_kernels.triton_backend import indexed, small, tiles

TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]  # of the same rounded inputs


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch, small_tiles):
    """Two blocks and a rest of H = 19, one and a rest of k, and runs of equal ids that are cut several times."""
    narrow = {"pick": tiles.Tile(2, 8, 4), "pick_one": tiles.Tile(1, 8, 4), "weight_gradient": tiles.Tile(2, 8, 4)}
    tables = {architecture: table | narrow for architecture, table in tiles.TILES.items()}
    monkeypatch.setattr(tiles, "TILES", tables)
    monkeypatch.setattr(tiles, "SEGMENT", 4)


def problem(k: int, dtype: torch.dtype = torch.float32):
    """Hidden states [9, 19], rows, a head [7, 19] and ids [5, k], which repeat."""
    generator = torch.Generator().manual_seed(k)
    hidden = torch.randn(9, 19, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randn(7, 19, generator=generator).to(dtype).to(DEVICE)
    rows = torch.randperm(9, generator=generator)[:5].to(DEVICE)
    ids = torch.randint(7, (5, k), generator=generator).to(DEVICE)
    return hidden, rows, weight, ids


@pytest.mark.parametrize("dtype,tolerance", TOLERANCES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_product_and_its_gradients(k, dtype, tolerance):
    hidden, rows, weight, ids = problem(k, dtype)
    wide = weight.double()[ids]  # [5, k, 19]
    out = indexed.pick(hidden, rows, weight, ids)
    assert out.dtype == torch.float32
    assert relative_error(out, torch.einsum("rkh,rh->rk", wide, hidden.double()[rows])) < tolerance

    gradient = torch.randn(5, k, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = torch.randn(9, 19, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    total = before.clone()
    indexed.add_hidden_gradient(total, gradient, rows, weight, ids)
    expected = before.double().index_add_(0, rows, torch.einsum("rk,rkh->rh", gradient.double(), wide))
    assert relative_error(total, expected) < tolerance

    each = rows[:, None].expand_as(ids).flatten()
    total = before[:7].clone()
    indexed.add_weight_gradient(total, gradient.flatten(), hidden, each, ids.flatten())
    products = gradient.double().flatten()[:, None] * hidden.double()[each]
    assert relative_error(total, before[:7].double().index_add_(0, ids.flatten(), products)) < tolerance


@pytest.mark.parametrize("runs", [[1] * 7, [13], [3, 4, 1], [4, 8, 2], [2, 11, 5], [4, 4]], ids=str)
def test_runs_of_equal_ids(runs):
    """Segments are 4 entries: runs that fill one, lie across several, and end where one does."""
    count = sum(runs)
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator)
    ids = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))[order].to(DEVICE)
    hidden = torch.randn(6, 5, generator=generator).to(DEVICE)
    rows = torch.randint(6, (count,), generator=generator).to(DEVICE)
    gradient = torch.randn(count, generator=generator).to(DEVICE)
    totals = []
    for _ in range(2):
        total = torch.zeros(len(runs) + 1, 5, device=DEVICE)
        indexed.add_weight_gradient(total, gradient, hidden, rows, ids)
        totals.append(total)
    assert totals[0].equal(totals[1])
    expected = torch.zeros(len(runs) + 1, 5, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, ids, gradient.double()[:, None] * hidden.double()[rows])
    assert relative_error(totals[0], expected) < 1e-6


def test_entries_without_gradient_read_nothing():
    hidden, rows, weight, ids = problem(3)
    ids[:, 0] = 6
    weight[6] = math.nan
    gradient = torch.ones(5, 3, device=DEVICE)
    gradient[ids == 6] = 0
    total = torch.zeros(9, 19, device=DEVICE)
    indexed.add_hidden_gradient(total, gradient, rows, weight, ids)
    assert total.isfinite().all() and total.any()
    hidden[rows[2]] = math.nan
    gradient[2] = 0
    total = torch.zeros(7, 19, device=DEVICE)
    each = rows[:, None].expand_as(ids).flatten()
    indexed.add_weight_gradient(total, gradient.flatten(), hidden, each, ids.flatten())
    assert total.isfinite().all() and total.any()
    gradient[0, 1] = math.nan
    indexed.add_weight_gradient(total, gradient.flatten(), hidden, each, ids.flatten())
    assert total[ids[0, 1]].isnan().all()


def test_no_entry():
    hidden, rows, weight, _ = problem(1)
    none = rows[:0, None].expand(0, 3)
    total = torch.ones(9, 19, device=DEVICE)
    assert indexed.pick(hidden, rows[:0], weight, none).shape == (0, 3)
    indexed.add_hidden_gradient(total, none.float(), rows[:0], weight, none)
    indexed.add_weight_gradient(total, none.float().flatten(), hidden, none.flatten(), none.flatten())
    assert (total == 1).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1, 17, 70])
def test_small_divergence(size, beta):
    """As the PyTorch function in float64, rows with excluded candidates, NaN and nothing at all included."""
    options = LossOptions(beta=beta, temperature=1.7)
    generator = torch.Generator().manual_seed(size)
    s, t = torch.randn(2, 11, size, generator=generator) * 3
    s[1, 0] = t[2, size // 2] = s[3, -1] = t[3, -1] = -math.inf
    s[4, 0], t[5, 0], s[6], t[7], s[8, 0] = math.nan, math.nan, -math.inf, -math.inf, math.inf
    s[9, 0], t[9, 0] = -1e3, -math.inf  # infinite where the probability before it underflows
    expected, expected_gradient = divergence(s.double(), t.double(), options, True)
    s, t = s.to(DEVICE), t.to(DEVICE)
    losses, gradient = small.divergence(s, t, options, True)
    close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(losses.double().cpu(), expected, **close)
    torch.testing.assert_close(gradient.double().cpu(), expected_gradient, **close)
    alone, none = small.divergence(s, t, options, False)
    assert none is None and torch.allclose(alone, losses, rtol=0, atol=0, equal_nan=True)


def test_a_divergence_too_wide_for_one_program():
    s, t = torch.randn(2, 2, small.LARGEST + 1, generator=torch.Generator().manual_seed(0))
    for needs_grad in (True, False):
        losses, gradient = small.divergence(s, t, LossOptions(), needs_grad)
        expected, expected_gradient = divergence(s.clone(), t, LossOptions(), needs_grad)
        assert losses.equal(expected)
        assert gradient is None if expected_gradient is None else gradient.equal(expected_gradient)
