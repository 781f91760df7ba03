import math
import threading

import pytest

from simct.training import grading
from simct.training.grading import accuracy, is_correct

pytest.importorskip("math_verify")

SLOW = "\\boxed{" + "{" * 5000 + "}" * 5000 + "}"  # takes math-verify seconds


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is \\boxed{18}.", "18"),
        ("3 + 4 = 7, and so it is 18", "18"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{1/2}", "$\\frac12$"),
        ("It costs $1,000 in total", "1000"),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
        ("\\boxed{12\\text{ cm}}", "12"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{3}, and then 4 more words", "3"),
        ("\\boxed{\\text{Paris}}", "Paris."),
        ("18 eggs", "He eats 9 * 2 = <<9*2=18>>18.\n#### 18"),
        ("9", "The answer: $9$"),
        ("\ud800 \\boxed{7}", "7"),
    ],
)
def test_right(response, answer):
    assert is_correct(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{19}", "18"),
        ("18, no, 19", "18"),
        ("\\boxed{3}, no, \\boxed{4}", "3"),
        ("\\boxed{3}, and then 4 more words", "4"),
        ("\\boxed{-3}", "3"),
        ("\\boxed{(2,5)}", "[2,5)"),
        ("\\boxed{Rome}", "Paris"),
        ("", "1"),
        ("\\boxed{", "1"),
        ("\\boxed{}", ""),
        ("\x00\n\\boxed{\\frac{}{}}}}", "1"),
        ("(" * 5000, "1"),
        pytest.param("\\boxed{9^{9^{9^{9^9}}}}", "1", marks=pytest.mark.slow),  # seconds of one multiplication
    ],
)
def test_wrong(response, answer):
    assert not is_correct(response, answer)


def test_what_takes_too_long_is_wrong_and_the_next_is_graded():
    assert is_correct("\\boxed{1}", "1")  # what grades is there
    busy = grading._worker.process
    with pytest.warns(UserWarning, match=r"the answer '1' was not done in 0.2 s: it counts as wrong"):
        assert not is_correct(SLOW, "1", timeout=0.2)
    # It was not waited for, however long that took: what worked on it was stopped, and another grades the next.
    assert busy.poll() not in (None, 0)
    assert is_correct("\\boxed{1}", "1")


def test_a_process_that_ends_is_started_again():
    assert is_correct("\\boxed{1}", "1")
    grading._worker.process.kill()
    grading._worker.process.wait()
    assert is_correct("\\boxed{1}", "1")


def test_any_thread_grades_with_its_time_limit():
    graded, told = {}, []

    def work(i):
        graded[i] = is_correct(f"\\boxed{{{i}}}", str(i % 2))

    def slow():
        with pytest.warns(UserWarning, match="was not done"):
            told.append(is_correct(SLOW, "1", timeout=0.2))

    is_correct("1", "1")
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == {0: True, 1: True, 2: False, 3: False}
    thread = threading.Thread(target=slow)  # alone: catching warnings is not for several threads
    thread.start()
    thread.join()
    assert told == [False]


def test_a_missing_math_verify_is_named(monkeypatch):
    monkeypatch.setattr(grading, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'simct\[math\]'"):
        is_correct("1", "1")


def test_accuracy_clusters_samples_by_prompt():
    found = accuracy([[True, True], [False, False], [True, False], [True, True]])
    assert found["prompts"] == 4 and found["samples"] == 2
    assert found["pass@1"] == 5 / 8 and found["pass@n"] == 3 / 4
    shares = [1, 0, 0.5, 1]
    variance = sum((s - 5 / 8) ** 2 for s in shares) / 3
    assert found["pass@1_stderr"] == pytest.approx(math.sqrt(variance / 4))
    assert found["pass@n_stderr"] == pytest.approx(math.sqrt(3 / 4 * 1 / 4 / 3))
    twice = accuracy([[g for g in grades for _ in range(50)] for grades in ([True], [False])])
    once = accuracy([[True], [False]])
    assert twice["pass@1_stderr"] == once["pass@1_stderr"]  # the same sample again says nothing new


def test_accuracy_weighs_every_sample_alike():
    assert accuracy([[True], [False, False, False]])["pass@1"] == 1 / 4


def test_accuracy_of_nothing():
    assert math.isnan(accuracy([])["pass@1"]) and accuracy([])["prompts"] == 0
    with pytest.raises(ValueError, match=r"correct\[1\] is empty"):
        accuracy([[True], []])
