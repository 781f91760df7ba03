"""Long answers read in processes of their own."""

import json
import os
import signal
import threading

import numpy as np
import pytest

from simct.teachers import readers as readers_module
from simct.teachers.formats import VLLM
from simct.teachers.readers import Readers, Unread

PROMPT, RESPONSE, K = [1, 2], [3, 4, 5], 2


def answer(best=-0.5):
    row = {str(t): {"logprob": best - i, "rank": i + 1, "decoded_token": 'a"{'} for i, t in enumerate((3, 4))}
    rows = [None, *({**row, "5": {"logprob": -4.0, "rank": 9}} for _ in range(4))]
    return {"choices": [{"prompt_logprobs": rows}]}


ASKED = dict(prompt=PROMPT, response=RESPONSE, k=K, at_least=6, vocabulary=6)


@pytest.fixture(scope="module")
def readers():
    return Readers(2)


def read(readers, found):
    return readers.read(json.dumps(found).encode() if not isinstance(found, bytes) else found, server="vllm", **ASKED)


def test_what_is_read_apart_is_what_is_read_here(readers):
    here = VLLM().scores(answer(), *ASKED.values())
    results = [None] * 4

    def one(i):
        results[i] = read(readers, answer())

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        for name in "topk_ids", "topk_logprobs", "token_logprobs":
            ours, theirs = getattr(found, name), getattr(here, name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert 1 <= len(readers._idle) <= 2


def test_an_answer_that_cannot_be_is_the_same_error(readers):
    with pytest.raises(RuntimeError) as here:
        VLLM().scores(answer(best=2.0), *ASKED.values())
    with pytest.raises(RuntimeError) as apart:
        read(readers, answer(best=2.0))
    assert str(apart.value) == str(here.value) and "2 as a log-probability" in str(here.value)


@pytest.mark.parametrize("content", [b"{", b'{"error": {"message": "busy"}}'])
def test_what_is_no_answer_is_left_to_others(readers, content):
    with pytest.raises(Unread):
        read(readers, content)


def test_a_reader_that_ends_is_replaced(readers):
    read(readers, answer())
    for process in readers._idle:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert read(readers, answer()).topk_ids.shape == (3, 2)


def test_an_answer_that_ends_its_reader_is_left_to_others(monkeypatch):
    started = readers_module._started
    monkeypatch.setattr(readers_module, "_started", lambda: (process := started(), process.kill(), process.wait())[0])
    with pytest.raises(Unread):
        read(Readers(1), answer())
