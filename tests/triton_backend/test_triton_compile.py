"""Every kernel compiles for every GPU of the table, none of which needs to be here, and stays within its means.

A minute of a core for each GPU, so all of it is slow.
"""

import json
import os
import subprocess
import sys

import pytest

ARCHS = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}  # shared memory of one program, bytes
# What reads logits, or rows of a head or of hidden states; what reads a few numbers a unit.
WIDE = {"logsumexp_kernel", "candidate_kernel", "gradient_kernel", "softmax_kernel"}
WIDE |= {"pick_kernel", "hidden_gradient_kernel", "weight_gradient_kernel", "join_kernel", "combine_kernel"}
NARROW = {"finish_kernel", "mixture_kernel", "small_kernel"}


@pytest.fixture(scope="module", params=[pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS])
def report(request):
    """In a process of its own: this one has the interpreter in the compiler's place."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "bench.ahead_of_time",
        "--quick",
        "--json",
        "--arch",
        request.param,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_kernels_fit(report):
    arch, kernels = report
    assert {kernel["kernel"] for kernel in kernels} == WIDE | NARROW
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= ARCHS[arch], kernel
        assert kernel["programs"] >= 1, kernel


def test_contiguous_sides_are_read_16_bytes_at_a_time(report):
    """At the sizes of a real pair: K is odd. Every load of a tile of logits, not the widest only."""
    for kernel in report[1]:
        assert kernel["widest_load"] >= 16 or kernel["kernel"] in NARROW, kernel
        assert kernel["wide_loads"] >= kernel["tile_loads"], kernel
    in_order = {kernel["kernel"] for kernel in report[1] if kernel["tile_loads"]}
    assert in_order == {"candidate_kernel", "logsumexp_kernel", "gradient_kernel", "softmax_kernel"}


def test_offsets_are_64_bits_wide(report):
    assert all(kernel["int64_offsets"] for kernel in report[1])


def test_a_batch_of_another_size_compiles_nothing_anew(report):
    """Numbers of rows and units are no part of what Triton compiles for: neither 1 nor a multiple of 16 among them."""
    found = {kernel["kernel"]: kernel["by_size"] for kernel in report[1]}
    asked = {name for name, count in found.items() if count}
    assert asked >= WIDE - {"softmax_kernel", "combine_kernel"} | {"finish_kernel", "mixture_kernel"}
    assert {name: count for name, count in found.items() if count > 1} == {}
