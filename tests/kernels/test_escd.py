"""ESCD's completions, by hand and at the ends of responses. Against its oracle: test_bpm.py."""

import dataclasses

import pytest
import torch

from simct_kernels import bpm_loss, escd_loss

from .prefix_cases import prefix_problem
from .test_bpm import digits, kl


def test_escd_by_hand():
    """The teacher's 12 as the student's 1, 2."""
    problem = digits([0, 1], [3])
    first = kl((0.65, 0.4), (0.1, 0.2), (0.02, 0.1), (0.2, 0.2), (0.03, 0.1))
    # No student token spells 12, 13, 123. 123 goes with 12, of which 2 is left: 2 and 21 begin with it. 3 is left of 13.
    log = torch.tensor([0.3 + 0.15, 0.2], dtype=torch.float64).log().tolist()
    loss = escd_loss(*problem.escd())
    loss.backward()
    assert loss.item() == pytest.approx(first - 0.4 * log[0] - 0.2 * log[1], rel=1e-12)
    # M q, less each group's mass in proportion to q among the tokens that complete it.
    q = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    asked = torch.tensor([0, 0.4 * 0.3 / 0.45, 0.2, 0.4 * 0.15 / 0.45, 0], dtype=torch.float64)
    torch.testing.assert_close(problem.student_hidden.grad[1], 0.6 * q - asked)
    first_row = torch.tensor([0.4 - 0.65, 0.2 - 0.1, 0.1 - 0.02, 0.1 - 0.03, 0.0], dtype=torch.float64)
    torch.testing.assert_close(problem.student_hidden.grad[0], first_row)


def test_a_token_that_ends_the_unit_is_completed_in_the_next_row():
    """1 against 1: what the teacher expected after it is asked of the next row, although that row is in no unit."""
    problem = digits([0, 1], [0])
    units = dataclasses.replace(problem.units, student_length=torch.tensor([1]))
    problem = dataclasses.replace(problem, units=units)
    log = torch.tensor([0.45, 0.2], dtype=torch.float64).log().tolist()
    first = bpm_loss(*problem.bpm())
    assert escd_loss(*problem.escd()).item() == pytest.approx(first.item() - 0.4 * log[0] - 0.2 * log[1], rel=1e-12)


def test_nothing_is_completed_behind_the_end_of_a_response():
    problem = digits([0, 1], [0])
    units = dataclasses.replace(problem.units, student_length=torch.tensor([1]))
    problem = dataclasses.replace(problem, units=units)
    loss = escd_loss(*problem.sides(), problem.tables, [1, 1])
    torch.testing.assert_close(loss, bpm_loss(*problem.bpm()))
    loss.backward()
    assert not problem.student_hidden.grad[1].any()


def test_a_completion_that_the_student_excludes():
    """Neither 2 nor 21: infinitely wrong if the teacher expects 12, nothing if it does not."""
    student = [[0.4, 0.0, 0.3, 0.0, 0.3], [0.1, 0.0, 0.5, 0.0, 0.4]]
    for expected in (0.0, 0.1):
        teacher = [0.4 - expected, 0.0, 0.2, expected, 0.2, 0.0, 0.0, 0.2]
        problem = digits([0, 1], [0], student, teacher)
        problem = dataclasses.replace(
            problem, units=dataclasses.replace(problem.units, student_length=torch.tensor([1]))
        )
        loss = escd_loss(*problem.escd())
        if expected:
            assert loss.item() == torch.inf
            continue
        loss.backward()
        first = kl((0.6, 0.4), (0.2, 0.3), (0.2, 0.3))
        assert loss.item() == pytest.approx(
            first - 0.2 * torch.tensor(0.5, dtype=torch.float64).log().item(), rel=1e-12
        )
        asked = torch.tensor([0.02, 0.0, 0.2 * 0.5 - 0.2, 0.0, 0.2 * 0.4], dtype=torch.float64)
        torch.testing.assert_close(problem.student_hidden.grad[1], asked)


def test_packed_responses_are_the_responses_one_by_one():
    problem = prefix_problem(7, responses=5, dropped=0.0)
    losses = escd_loss(*problem.escd(), reduction="none")
    bounds = [0, *torch.tensor(problem.lengths).cumsum(0).tolist()]
    apart = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        units = problem.units
        own = units.select((units.student_start >= begin) & (units.student_start < end))
        moved = dataclasses.replace(
            own, student_start=own.student_start - begin, student_tokens=own.student_tokens[begin:end]
        )
        student = (problem.student_hidden[begin:end], problem.student_head)
        teacher = (problem.teacher_hidden, problem.teacher_head)
        apart.append(escd_loss(*student, *teacher, moved, problem.tables, [end - begin], reduction="none"))
    torch.testing.assert_close(losses, torch.cat(apart))


def test_a_first_row_alone_is_bpms():
    """Without completions, units of one student token cost the same in both."""
    problem = prefix_problem(6, dropped=0.0)
    ones = problem.units.select(problem.units.student_length == 1)
    problem = dataclasses.replace(problem, units=ones)
    rows = len(ones.student_tokens)
    alone = escd_loss(*problem.sides(), problem.tables, [1] * rows, reduction="none")
    torch.testing.assert_close(alone, bpm_loss(*problem.bpm(), reduction="none"))
    assert (escd_loss(*problem.escd(), reduction="none") - alone).max() > 0.1


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 4], "response_lengths add up to 7, but units.student_tokens has 2"),
        ([], "response_lengths add up to 0"),
        ([3, -1], r"response_lengths must be whole numbers of at least 0, got \[3, -1\]"),
        ([1.0, 1.0], "response_lengths must be whole numbers"),
    ],
    ids=str,
)
def test_lengths_that_do_not_fit(lengths, message):
    problem = digits([0, 1], [3])
    with pytest.raises(ValueError, match=message):
        escd_loss(*problem.sides(), problem.tables, lengths)
