"""What a `ServedTeacher` does, whatever serves it: tests for a real vLLM (`vllm_engines`) and for the double of one.

A class that takes them over has a fixture `url`, of a server of the demo teacher that allows every token's log-probability.
"""

import time

import pytest
import torch
from faulty_proxy import FAULTS, TIMED, FaultyProxy

from simct import LocalTeacher, TokenizerPair
from simct.teachers.served import ServedTeacher
from simct_kernels import LMHead, linear_simct_loss, topk_simct_loss

TEXTS = [("Return the", " name of the file, if any."), ("If the", " value is not a string: é"), ("A", ".")]
VOCABULARY = 3072


@pytest.fixture(scope="session")
def local(demo_teacher, demo_tokenizers):
    return LocalTeacher(demo_teacher, demo_tokenizers[1])


@pytest.fixture(scope="session")
def samples(demo_tokenizers):
    """(prompts, responses) in the teacher's tokens; one response is empty, one ends with the end of the turn."""
    teacher = demo_tokenizers[1]
    prompts, responses = zip(*(([*teacher(p)["input_ids"]], [*teacher(r)["input_ids"]]) for p, r in TEXTS), strict=True)
    return [*prompts, [5]], [*responses[:2], [], [*responses[2], teacher.eos_token_id]]


def assert_rows(rows, local, samples, k, atol=1e-4):
    hidden, head = local.rows(*samples)
    logprobs = head.logits(hidden).log_softmax(dim=1)
    assert rows.topk_ids.shape == rows.topk_logprobs.shape == (len(hidden), k)
    torch.testing.assert_close(rows.topk_logprobs, logprobs.topk(k).values, rtol=0, atol=atol)
    torch.testing.assert_close(rows.topk_logprobs, logprobs.gather(1, rows.topk_ids), rtol=0, atol=atol)
    assert all(len(set(row)) == k for row in rows.topk_ids.tolist())
    torch.testing.assert_close(rows.token_logprobs, local.token_logprobs(*samples), rtol=0, atol=atol)


class ServedContract:
    @pytest.mark.parametrize("k", [1, 2, 50, VOCABULARY])
    def test_rows_are_those_of_the_local_teacher(self, url, local, samples, demo_tokenizers, k):
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=k)
        assert_rows(teacher.rows(*samples), local, samples, k)
        torch.testing.assert_close(teacher.token_logprobs(*samples), local.token_logprobs(*samples), rtol=0, atol=1e-4)
        nothing = teacher.rows([], [])
        assert nothing.topk_ids.shape == (0, k) and nothing.token_logprobs.shape == (0,)

    def test_the_loss_is_the_local_teachers_if_k_covers_the_vocabulary(self, url, local, demo_student, demo_tokenizers):
        pair = TokenizerPair(*demo_tokenizers)
        texts = [r + " Otherwise unhappiness." for _, r in TEXTS]
        student_ids = [demo_tokenizers[0](text, add_special_tokens=False)["input_ids"] for text in texts]
        teacher_ids = pair.encode_teacher(student_ids)
        units = pair.align_batch(student_ids, teacher_ids, disjoint=True)
        assert (units.teacher_length > 1).any() and (units.student_length == 1).any()
        prompts = [demo_tokenizers[1](p)["input_ids"] for p, _ in TEXTS]
        torch.manual_seed(0)
        hidden = torch.randn(len(units.student_tokens), demo_student.config.hidden_size)
        head = LMHead(demo_student.get_output_embeddings().weight.detach(), softcap=30.0)
        served = ServedTeacher(url, demo_tokenizers[1], top_k=VOCABULARY).rows(prompts, teacher_ids)
        served = (served.topk_ids, served.topk_logprobs, served.token_logprobs)
        here = local.rows(prompts, teacher_ids)
        for options in {}, {"beta": 0.0}, {"candidates": "disjoint", "top_k": 8}:
            found = []
            for loss, theirs in ((linear_simct_loss, here), (topk_simct_loss, served)):
                ours = hidden.clone().requires_grad_()
                value = loss(ours, head, *theirs, units, pair.shared, **options)
                value.backward()
                found.append((value.detach(), ours.grad))
            assert found[0][0] > 1, options
            torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=0, msg=str(options))
            torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5, msg=str(options))

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.usefixtures("at_once")
    def test_a_fault_costs_a_request_and_nothing_else(self, url, local, samples, demo_tokenizers, fault, clock):
        with FaultyProxy(url, clock) as proxy:
            options = {"concurrency": 1} if fault in TIMED else {}
            teacher = ServedTeacher(proxy.url, demo_tokenizers[1], top_k=4, patience=1e6, **options)
            before = proxy.scored
            proxy.faults = [fault, fault]
            rows = teacher.rows(*samples)
            asked = proxy.scored - before
        assert_rows(rows, local, samples, 4)
        # Three responses have tokens; after all but 429 it is looked whether the server's model is still the same.
        assert asked == 3 + 2 + (fault != "429")

    @pytest.mark.usefixtures("at_once")
    def test_the_server_says_when_to_come_back(self, url, samples, demo_tokenizers, clock):
        with FaultyProxy(url, clock, retry_after="1") as proxy:
            teacher = ServedTeacher(proxy.url, demo_tokenizers[1], top_k=4, patience=60)
            proxy.faults = ["429"]
            started = time.monotonic()
            teacher.rows(*samples)
            assert time.monotonic() - started >= 1

    @pytest.mark.parametrize(
        "fault, kind, message",
        [
            ("reset", ConnectionError, "no whole answer from .*/v1/completions"),
            ("503", RuntimeError, r"answered 503: come back later \(\d tries in 1 seconds\)"),
            ("slow", TimeoutError, "did not answer within 0.5 seconds"),
            ("truncated_unsized", RuntimeError, "answered what is no whole JSON"),
        ],
    )
    @pytest.mark.usefixtures("at_once")
    def test_patience_ends(self, url, samples, demo_tokenizers, fault, kind, message, clock):
        with FaultyProxy(url, clock, pace=0.4) as proxy:
            teacher = ServedTeacher(proxy.url, demo_tokenizers[1], top_k=4, patience=1.0)
            if fault == "slow":
                teacher.served._client.timeout = 0.5  # the first meeting may take longer
            proxy.faults = [fault] * 50
            with pytest.raises(kind, match=message):
                teacher.rows(*samples)

    def test_another_tokenizer_is_refused(self, url, demo_tokenizers):
        message = "serves 'teacher' with another tokenizer than .*: token .* there and .* here"
        with pytest.raises(ValueError, match=message):
            ServedTeacher(url, demo_tokenizers[0], top_k=4)

    def test_a_smaller_vocabulary_is_refused(self, url, demo_tokenizers):
        from copy import deepcopy

        larger = deepcopy(demo_tokenizers[1])
        larger.add_tokens(["unheard-of"])
        with pytest.raises(ValueError, match="serves a model without token id 3072, the tokenizer .* has 3073"):
            ServedTeacher(url, larger, top_k=4)

    def test_what_does_not_fit_is_refused_before_it_is_sent(self, url, demo_tokenizers):
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=4)
        limit = int(teacher.served.max_model_len)
        assert len(teacher.rows([[5] * 9], [[7] * (limit - 10)]).topk_ids) == limit - 10  # what context_length promises
        assert teacher.context_length == limit - 2
        for prompt, response, message in (
            (
                [5] * 9,
                [7] * (limit - 9),
                f"9 prompt and {limit - 9} response tokens: expected at most {limit - 1} together",
            ),
            ([5], [3072], "token id 3072: expected ids from 0 to 3071"),
            ([], [5], r"prompts\[0\] is empty"),
        ):
            with pytest.raises(ValueError, match=message):
                teacher.rows([prompt], [response])

    def test_an_unknown_model_is_refused(self, url, demo_tokenizers):
        with pytest.raises(ValueError, match="model_name is 'other': expected one that .* serves, 'teacher'"):
            ServedTeacher(url, demo_tokenizers[1], model_name="other")
