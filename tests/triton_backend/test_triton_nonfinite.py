"""The PyTorch backend's tests of -inf, +inf and NaN, run on this one."""

import kernels.test_nonfinite
import pytest
import triton_cases
from kernels.test_nonfinite import *  # noqa: F403


@pytest.fixture(autouse=True)
def on_triton(monkeypatch, small_tiles):
    for loss in ("simct_loss", "linear_simct_loss"):
        monkeypatch.setattr(kernels.test_nonfinite, loss, getattr(triton_cases, loss))
