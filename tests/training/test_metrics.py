import math
import os
import time
from pathlib import Path

import pytest
import torch

from simct.training.metrics import PhaseTimer, Ratios, peak_memory_gb, ratio_with_standard_error


def test_ratio_and_its_error_against_simulation():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (20_000, 50), generator=generator).double()
    totals = 0.3 * lengths + torch.randn(lengths.shape, generator=generator, dtype=torch.float64) * lengths.sqrt()
    ratios = totals.sum(1) / lengths.sum(1)
    value, error = ratio_with_standard_error(totals[0], lengths[0])
    assert value == pytest.approx(float(ratios[0]))
    errors = [ratio_with_standard_error(totals[i], lengths[i])[1] for i in range(200)]
    assert sum(errors) / 200 == pytest.approx(float(ratios.std()), rel=0.03)


def test_ratio_of_nothing_and_of_one():
    assert all(map(math.isnan, ratio_with_standard_error([], [])))
    value, error = ratio_with_standard_error([3.0], [6.0])
    assert value == 0.5 and math.isnan(error)


def test_ratios_share_a_count_and_leave_out_what_has_none():
    ratios = Ratios()
    ratios.count("tokens", 4)
    ratios.add("a", 6.0, per="tokens")
    ratios.count("tokens", 6)  # no b here: it is still a share of all the tokens
    ratios.add("b", 2.0, per="tokens")
    ratios.add("c", 1.0, per="units")
    assert ratios.flush() == {"a": 0.6, "b": 0.2}
    assert ratios.flush() == {}


def test_a_nested_phase_is_taken_out_of_the_outer_one():
    phase = PhaseTimer(torch.device("cpu"))
    started = time.perf_counter()
    with phase("outer"):
        time.sleep(0.02)
        with phase("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    elapsed = time.perf_counter() - started
    seconds = phase.flush()
    assert seconds["inner"] >= 0.05
    assert 0.04 <= seconds["outer"] <= elapsed - seconds["inner"]
    assert phase.flush() == {}


def test_peak_memory_grows_with_an_allocation():
    before = peak_memory_gb(torch.device("cpu"))
    pages = Path("/proc/self/statm")
    held = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0
    torch.ones(int(before * 1e9) - held + 200_000_000, dtype=torch.uint8)
    assert peak_memory_gb(torch.device("cpu")) > before + 0.15
