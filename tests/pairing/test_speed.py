"""Aligning must cost nothing beside sampling: at least ten times as fast as aligning decoded strings token by token."""

from time import perf_counter, process_time

import pytest
import torch

from simct.pairing.alignment import invalid_utf8
from simct.pairing.coverage import greedy_single

from .conftest import CODE, PROSE


def greedy_strings(student_tokenizer, teacher_tokenizer, student, teacher):
    """The straightforward way: decode token by token, accumulate both strings, close a unit where they are equal."""
    units, i, j, first, other = [], 0, 0, 0, 0
    ours = theirs = ""
    while i < len(student) and j < len(teacher):
        if len(ours) <= len(theirs):
            ours += student_tokenizer.decode([student[i]])
            i += 1
        else:
            theirs += teacher_tokenizer.decode([teacher[j]])
            j += 1
        if ours == theirs:
            units.append((first, i - first, other, j - other))
            first, other, ours, theirs = i, j, "", ""
    return units


def fastest(call, runs: int) -> float:
    times = []
    for _ in range(runs):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def test_ten_times_as_fast_as_greedy_strings(deepseek, qwen, make_pair):
    pair = make_pair(deepseek, qwen)
    ids = pair._student.encoder([(CODE + PROSE).encode("ascii", "ignore").decode()])[0]
    student = [ids[k : k + 4096] for k in range(0, 4 * 4096, 4096)]
    teacher = pair.encode_teacher(student)
    assert [len(response) for response in student] == [4096] * 4
    assert pair.align_batch(student, teacher).student_covered == 1.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or whoever holds the other core is measured too
    ours = fastest(lambda: pair.align_batch(student, teacher), 25) / 4
    greedy = fastest(lambda: greedy_strings(deepseek, qwen, student[0], teacher[0]), 3)
    torch.set_num_threads(threads)
    print(f"{4096 / ours / 1e6:.1f} million student tokens/s, {greedy / ours:.0f} times the greedy strings")
    assert greedy > 10 * ours


@pytest.mark.parametrize(
    "call",
    [
        lambda n: greedy_single(["ab"] * n, ["a", *["ba"] * n]),  # of equal texts no two tokens end together
        lambda n: greedy_single(["a" * n], ["a"] * n),
        lambda n: invalid_utf8(b"\xffa" * n),
    ],
)
def test_time_is_in_proportion_to_the_text(call):
    start = process_time()
    assert len(call(300_000)) in (0, 300_000)
    assert process_time() - start < 4  # by the square of it: 12 s and more on one fast core
