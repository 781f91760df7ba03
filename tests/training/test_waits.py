"""How often a step makes the host wait for the device, and what the host does while the device works. On a pretended GPU."""

import threading
import time

import pytest
import torch
from pretended_gpu import CUDA
from pretended_run import Responses, two_steps
from test_trainer import STUDENT, TEACHER
from tiny import tiny_model

from simct import LocalTeacher, TokenizerPair
from simct.training.metrics import PhaseTimer


def test_phases_on_a_gpu_make_the_host_wait_in_the_log_only(gpu):
    phase = PhaseTimer(CUDA)
    with phase("outer"):
        time.sleep(0.02)
        with phase("inner"):
            time.sleep(0.05)
    assert gpu.waits == []
    seconds = phase.flush()
    assert gpu.waits == ["synchronize"]
    assert seconds["inner"] >= 0.05 and 0.02 <= seconds["outer"] < seconds["inner"]
    assert phase.flush() == {}


def test_what_a_gpu_has_done_is_added_up_before_the_log(gpu, monkeypatch):
    """The events of a window of many steps do not pile up."""
    phase = PhaseTimer(CUDA)
    with phase("early"):
        pass
    monkeypatch.setattr("pretended_gpu.Event.query", lambda self: True)
    for _ in range(100):
        with phase("late"):
            pass
    assert len(phase._spans) == 0 and gpu.waits == [] and set(phase.flush()) == {"early", "late"}


class Waits(list):
    """Of the pretended GPU, with all that there were till now."""

    total = 0

    def append(self, what):
        self.total += 1
        super().append(what)


class Enough(Exception):
    """Where the second rollout would begin."""


def test_a_step_that_is_not_logged_waits_once_a_micro_batch(gpu, tmp_path, monkeypatch):
    """From one rollout to the next: for the losses of its micro-batches, and for nothing else. (`check_step` would wait once more:
    it looks at numbers, and there are none.)"""
    gpu.waits, starts, done = Waits(), [], []

    def update_weights(*_):
        starts.append(gpu.waits.total)
        if len(starts) > 1:
            raise Enough

    def noted(name, function):
        return lambda *args, **kwargs: [done.append((name, threading.current_thread())), function(*args, **kwargs)][1]

    monkeypatch.setattr(Responses, "update_weights", update_weights)
    monkeypatch.setattr(LocalTeacher, "rows", noted("teacher", LocalTeacher.rows))
    monkeypatch.setattr(TokenizerPair, "align_batch", noted("align", TokenizerPair.align_batch))
    with gpu.fake:
        student, teacher = tiny_model(STUDENT), tiny_model(TEACHER).to(torch.bfloat16)
    with pytest.raises(Enough):
        two_steps(
            gpu, tmp_path, student, teacher, tokens=3, rows=2, max_tokens_per_batch=15, logging_steps=100, packing="off",
            logging_first_step=False,
        )  # fmt: skip
    # The teacher is told what to do before the host aligns, on the one thread of Python that there is then.
    assert done == [("teacher", threading.main_thread()), ("align", threading.main_thread())] * 2
    first, second = starts
    assert second - first == 2
