"""A teacher behind a server: against a double of vLLM (and of SGLang) that is held to what a real one answered."""

import json
import logging
import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from inspect_html import Page
from json_server import serving
from moved_clock import retried
from served_answers import CONTEXT, LIMIT, REQUESTS, assert_same, read
from served_contract import VOCABULARY, ServedContract, assert_rows, local, samples  # noqa: F401
from served_double import MAX_MODEL_LEN, Double
from transformers import AutoModelForCausalLM

from simct import SimCTConfig, SimCTTrainer
from simct.commands.cli import main
from simct.demo import ASSETS
from simct.teachers.formats import VLLM, SGLang
from simct.teachers.served import ServedTeacher

pytest.importorskip("httpx")
STUDENT, TEACHER = str(ASSETS / "student"), str(ASSETS / "teacher")


@pytest.fixture(scope="module")
def url(demo_teacher, demo_tokenizers):
    with serving(Double(demo_teacher, demo_tokenizers[1], max_logprobs=VOCABULARY)) as found:
        yield found


@pytest.fixture
def double(demo_teacher, demo_tokenizers):
    return Double(demo_teacher, demo_tokenizers[1])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, demo_tokenizers):
    """What of the teacher has to be on this machine: no weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    demo_tokenizers[1].save_pretrained(folder)
    shutil.copy(ASSETS / "teacher" / "generation_config.json", folder)
    assert not list(folder.glob("*.safetensors"))
    return folder


class TestDouble(ServedContract):
    pass


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_the_double_answers_as_the_real_server_did(double, number):
    assert (double.max_logprobs, MAX_MODEL_LEN) == (LIMIT, CONTEXT)
    recorded = read()["answers"][number]
    route, body = REQUESTS[number]
    assert (recorded["route"], recorded["body"]) == (route, body), "recorded for other requests: record them anew"
    status, answer = double.answer("POST", route, body, None)
    assert status == recorded["status"]
    assert_same(answer, recorded["answer"])


def test_sglang_is_asked_for_the_response_alone(demo_teacher, demo_tokenizers, local, samples):  # noqa: F811
    double = Double(demo_teacher, demo_tokenizers[1], kind="sglang")
    with serving(double) as url:
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=5)
        double.asked.clear()
        assert_rows(teacher.rows(*samples), local, samples, 5)
        sent = [body for route, body in double.asked if route == "/generate"]
        assert {body["logprob_start_len"] for body in sent} == {len(p) - 1 for p, r in zip(*samples, strict=True) if r}
        torch.testing.assert_close(teacher.token_logprobs(*samples), local.token_logprobs(*samples), rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match="with another tokenizer"):
            ServedTeacher(url, demo_tokenizers[0], top_k=5)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_the_texts_of_tokens_tell_another_tokenizer_where_tokenize_is_closed(double, demo_tokenizers, server):
    double.tokenize, double.kind = False, server
    with serving(double) as url:
        assert ServedTeacher(url, demo_tokenizers[1], top_k=4).served.name == "teacher"
        with pytest.raises(ValueError, match="with another tokenizer than .*: token"):
            ServedTeacher(url, demo_tokenizers[0], top_k=4)


def test_a_tokenizer_of_the_same_tokens_that_cuts_otherwise_is_refused(double, demo_tokenizers, tmp_path):
    """Every token has its text, but one merge is missing: what /tokenize answers tells them apart."""
    from transformers import AutoTokenizer

    demo_tokenizers[1].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-1500]
    path.write_text(json.dumps(content), "utf-8")
    other = AutoTokenizer.from_pretrained(tmp_path)
    with (
        serving(double) as url,
        pytest.raises(ValueError, match="with another tokenizer than .*: from its token .* on"),
    ):
        ServedTeacher(url, other, top_k=4)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"top_k": LIMIT + 1},
            rf"is {LIMIT + 1}, but .* allows {LIMIT} .*: expected at most {LIMIT}, .*--max-logprobs {LIMIT + 1}",
        ),
        ({"top_k": 0}, "top_k .* is 0: expected 1 to 3072"),
        ({"top_k": 3073}, "top_k .* is 3073: expected 1 to 3072"),
        ({"server": "tgi"}, "server is 'tgi': expected one of 'auto', 'vllm', 'sglang'"),
        ({"server": "sglang"}, r"has no model 'teacher', or no route /generate \(Not Found\)"),
        ({"timeout": 0}, "timeout is 0"),
        ({"concurrency": 0}, "concurrency 0: expected"),
        ({"vocab_size": 3000}, "vocab_size is 3000: expected at least 3072"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(double, demo_tokenizers, options, message):
    with serving(double) as url, pytest.raises(ValueError, match=message):
        ServedTeacher(url, demo_tokenizers[1], **options)


def test_addresses_that_are_none(demo_tokenizers):
    for wrong in ("127.0.0.1:8000", "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/"):
        with pytest.raises(ValueError, match="base_url is .*expected 'http://HOST:PORT'"):
            ServedTeacher(wrong, demo_tokenizers[1])
    with pytest.raises(ValueError, match="base_url 'http://host:1' was given with a user or key") as error:
        ServedTeacher("http://user:secret@host:1", demo_tokenizers[1])
    assert "secret" not in str(error.value)
    with (
        retried() as waited,
        pytest.raises(ConnectionError, match=r"no whole answer from \S+9/v1/models .*vllm serve TEA"),
    ):
        ServedTeacher("http://127.0.0.1:9", demo_tokenizers[1])
    assert not waited.is_set()  # a wrong address is known at once, whatever the patience


@pytest.mark.parametrize("kind, message", [("llamacpp", "is a llama.cpp server"), ("me", "what kind .*owned_by: 'me'")])
def test_other_servers_are_refused(double, demo_tokenizers, kind, message):
    double.kind = kind
    with serving(double) as url, pytest.raises(ValueError, match=message):
        ServedTeacher(url, demo_tokenizers[1])


def test_a_key_is_sent_and_shown_nowhere(double, demo_tokenizers, samples, monkeypatch, caplog):  # noqa: F811
    double.key = "of-the-environment"
    with serving(double) as url, caplog.at_level(logging.DEBUG):
        with pytest.raises(PermissionError, match="answered 401: Unauthorized: expected a key .*SIMCT_TEACHER_API_KEY"):
            ServedTeacher(url, demo_tokenizers[1])
        monkeypatch.setenv("SIMCT_TEACHER_API_KEY", double.key)
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=4)
        assert len(teacher.rows(*samples).topk_ids)
    assert double.key not in caplog.text + repr(vars(teacher)) + repr(vars(teacher.served._client))


def test_requests_are_under_way_together_but_not_too_many(double, demo_tokenizers):
    running, most, lock, answer = 0, 0, threading.Lock(), double.answer
    together = threading.Barrier(3)

    def counted(*arguments):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if double.asked and len(double.asked) >= met:
            together.wait(60)
        try:
            return answer(*arguments)
        finally:
            with lock:
                running -= 1

    met = 1000
    double.answer = counted
    with serving(double) as url:
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=4, concurrency=3)
        met = len(double.asked)
        teacher.rows([[5]] * 12, [[7, i] for i in range(12)])
    assert most == 3


def test_one_refusal_ends_the_batch_at_once(double, demo_tokenizers):
    answer, busy = double.answer, []

    def refusing(method, route, body, key):
        if route == "/v1/completions" and body["prompt"][-1] == 99:
            return 400, {"error": {"message": "not\n\x1b[31m this one"}}
        if route == "/v1/completions" and body["prompt"][0] == 6:
            busy.append(body)
            return 503, {}
        return answer(method, route, body, key)

    double.answer = refusing
    with serving(double) as url:
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=4, patience=1e6)
        with pytest.raises(ValueError, match="answered 400: not \N{REPLACEMENT CHARACTER}\\[31m this one"):
            teacher.rows([[6], [6], [5]], [[7], [8], [99]])  # two are being waited for, with days of patience
        assert len(busy) < 10


def test_a_server_may_start_late_and_come_back(double, demo_tokenizers, local, samples):  # noqa: F811
    """Gone between two calls, and again in the middle of one; the second time other weights come back."""
    with serving(double) as url:
        port = int(url.rsplit(":", 1)[1])

    @contextmanager
    def served_after_a_failure(double):
        done = threading.Event()

        def serve():
            waited.wait()
            with serving(double, port):
                done.wait()

        with retried() as waited:
            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield
            finally:
                waited.set()
                done.set()
                thread.join()

    with served_after_a_failure(double):
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=4, wait=600, patience=600)
        assert_rows(teacher.rows(*samples), local, samples, 4)
    with served_after_a_failure(double):
        assert_rows(teacher.rows(*samples), local, samples, 4)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(double.model.config)
    with served_after_a_failure(Double(other, double.tokenizer)):
        with pytest.raises(ValueError, match="came back with other weights under the name 'teacher'"):
            teacher.rows(*samples)


# ---- Answers that are none ----

ENTRY = {
    "7": {"logprob": -1.0, "rank": 2, "decoded_token": "g"},
    "9": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
}


def vllm(*rows):
    return {"choices": [{"prompt_logprobs": list(rows)}]}


@pytest.mark.parametrize(
    "answer, message",
    [
        ({}, "has no prompt_logprobs"),
        (vllm(None), "prompt_logprobs of 1 entries for 2 tokens"),
        (vllm(None, None), "no log-probability of token 7 at position 1"),
        (vllm(None, {"9": ENTRY["9"]}), "no log-probability of token 7"),
        (vllm(None, {"7": ENTRY["7"]}), "1 log-probabilities in a row of which 2 were asked for"),
        (vllm(None, {"7": {**ENTRY["7"], "logprob": None}, "9": ENTRY["9"]}), "None as a log-probability"),
        (vllm(None, {"7": {**ENTRY["7"], "logprob": 3.0}, "9": ENTRY["9"]}), "raw logits"),
    ],
)
def test_an_answer_that_scores_something_else_is_an_error(answer, message):
    with pytest.raises(RuntimeError, match=message):
        VLLM().scores(answer, [5], [7], 2, 3072)


NAN = float("nan")


def entries(*rows):
    return {str(token): {"logprob": value, "rank": rank} for token, value, rank in rows}


@pytest.mark.parametrize(
    "entries, message",
    [
        (entries((7, -1.0, 2), (-9, -0.5, 1)), "token id -9: expected ids from 0 to 3071"),
        (entries((7, -1.0, 2), (3072, -0.5, 1)), "token id 3072: expected ids from 0 to 3071"),
        (entries((7, -1.0, 2), (10**30, -0.5, 1)), "what cannot be read .OverflowError"),
        (entries((7, -1.0, 2), ("nine", -0.5, 1)), "what cannot be read .ValueError.*'nine'"),
        (entries((7, -1.0, 1), (9, -0.5, 2)), "log-probabilities that do not fall with their rank"),
        (entries((7, -0.5, 1), (9, -1.0, 4)), "ranks .1, 4. ... at position 1"),
        (entries((7, -0.5, 3), (9, -1.0, 3)), "ranks .3, 3. ... at position 1"),
        (entries((7, -3.0, 3), ("07", -1.0, 2), (9, -0.5, 1)), "another log-probability of a token"),
        (entries((7, NAN, 2), (9, -0.5, 1)), "nan as a log-probability"),
        (entries((7, -1.0, 2), (9, NAN, 1)), "nan as a log-probability"),
        (entries((7, -1.0, 2), (9, 0.004, 1)), "0.004 as a log-probability: raw logits"),
        (entries((7, -1.0, 2), (9, float("inf"), 1)), "inf as a log-probability: raw logits"),
        (entries((7, -1.0, 2), (9, True, 1)), "True as a log-probability"),
        (entries((7, -1.0, 2), (9, "-1", 1)), "'-1' as a log-probability"),
        (
            entries((7, -9.0, 2), (9, -8.1, 1)),
            "-8.1 as the best log-probability of a row: the best of 3072 .* -8.03 or more",
        ),
        (entries((7, -9999.0, 2), (9, -9999.0, 1)), "-inf as the best log-probability"),
        (entries((7, -0.9, 9), (9, -0.5, 1), (8, -1.0, 2)), "another log-probability of a token than its place"),
        (entries((7, -0.1, 2), (9, -0.1, 1)), "add up to a probability of 1.81"),
        ({"7": {"logprob": -1.0}, "9": {"logprob": -0.5}}, "what cannot be read .KeyError: 'rank'"),
        ({"7": -1.0, "9": -0.5}, "what cannot be read"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error(entries, message):
    with pytest.raises(RuntimeError, match=message):
        VLLM().scores(vllm(None, entries), [5], [7], 2, 3072, 3072)


def test_a_padded_heads_ids_are_its_own():
    row = entries((7, -1.0, 2), (3100, -0.5, 1))
    assert VLLM().scores(vllm(None, row), [5], [7], 2, 3072, 3136).topk_ids.tolist() == [[3100, 7]]


def test_a_server_that_lies_in_a_run_is_found_out(double, demo_tokenizers):
    answer = double.answer

    def lying(*arguments):
        status, found = answer(*arguments)
        if lies and "choices" in found:
            found["choices"][0]["prompt_logprobs"][-1].popitem()
            found["choices"][0]["prompt_logprobs"][-1]["5000"] = {"logprob": -20.0, "rank": 4}
        return status, found

    lies, double.answer = [], lying
    with serving(double) as url:
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=4)
        lies.append(True)
        with pytest.raises(RuntimeError, match="token id 5000: expected ids from 0 to 3071"):
            teacher.rows([[5]], [[7, 9]])
        double.answer = lambda *arguments: (200, {"error": {"message": "CUDA\nerror", "code": 400}})
        with pytest.raises(ValueError, match="/v1/completions answered an error: CUDA error"):
            teacher.rows([[5]], [[7, 9]])


def test_what_cannot_be_is_minus_infinity_and_a_small_vocabulary_is_filled_up():
    entry = {"7": {"logprob": -9999.0, "rank": 3}, "9": {"logprob": 0.0, "rank": 1}, "2": {"logprob": -50.0, "rank": 2}}
    scores = VLLM().scores(vllm(None, entry), [5], [7], 4, 3)
    assert scores.topk_ids.tolist() == [[9, 2, 7, -1]]
    assert scores.topk_logprobs.tolist() == [[0.0, -50.0, -np.inf, -np.inf]] and scores.token_logprobs[0] == -np.inf


@pytest.mark.parametrize(
    "best, message",
    [
        ([[-1.5, 9, None], [-0.5, 8, None]], "do not fall with their rank"),
        ([[-0.5, 9, None], [-1.5, 9, None]], "a token id twice"),
        ([[-0.5, 9.0, None], [-1.5, 8, None]], "expected whole numbers"),
        ([[-0.5, 9, None], [-1.5, 99999, None]], "token id 99999: expected ids from 0 to 3071"),
        ([[-9.5, 9, None], [-9.6, 8, None]], "-9.5 as the best log-probability"),
    ],
)
def test_sglangs_best_are_checked(best, message):
    own = [[None, 5, None], [-2.0, 7, None]]
    answer = {"meta_info": {"input_token_logprobs": own, "input_top_logprobs": [None, best]}}
    with pytest.raises(RuntimeError, match=message):
        SGLang().scores(answer, [5], [7], 2, 3072, 3072)


def test_equal_ranks_leave_the_own_token_out():
    tied = {"7": {"logprob": -1.0, "rank": 2}, "9": {"logprob": -0.9, "rank": 1}, "3": {"logprob": -1.0, "rank": 2}}
    assert VLLM().scores(vllm(None, tied), [5], [7], 2, 3072).topk_ids.tolist() == [[9, 3]]


def test_sglangs_answer_must_be_of_the_tokens_asked_for():
    def answer(*own):
        return {"meta_info": {"input_token_logprobs": list(own), "input_top_logprobs": [None, [[-0.5, 9, None]]]}}

    good = SGLang().scores(answer([None, 5, None], [-1.0, 7, None]), [5], [7], 1, 3072)
    assert good.topk_ids.tolist() == [[9]] and good.token_logprobs.tolist() == [-1.0]
    for own, message in (
        (([None, 5, None],), "0 and 1 log-probabilities for 1 tokens"),
        (([None, 5, None], [-1.0, 8, None]), "token 8 where token 7 was asked for"),
        (([None, 5, None], [None, 7, None]), "None as a log-probability"),
        (([None, 5, None], [NAN, 7, None]), "nan as a log-probability"),
        (([None, 5, None], [-0.4, 7, None]), "another log-probability of a token than its place"),
        (([None, 5, None], [-1.0, 7]), None),
        (([None, 5, None], [-1.0]), "what cannot be read .IndexError"),
    ):
        if message is None:
            SGLang().scores(answer(*own), [5], [7], 1, 3072)
            continue
        with pytest.raises(RuntimeError, match=message):
            SGLang().scores(answer(*own), [5], [7], 1, 3072)


# ---- Runs ----


def words(output, **options):
    given = {
        "student": STUDENT, "teacher": TEACHER, "data": ASSETS / "train.jsonl", "max_steps": 2, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_new_tokens": 8, "logging_steps": 1,
        "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "eval_prompts": 4,
        "output_dir": output, **options,
    }  # fmt: skip
    return ["train", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


def history(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def run(output, **options):
    main(words(output, **options))
    return history(output)


def test_a_run_with_a_served_teacher_is_the_run_with_a_local_one(tmp_path, url, tokenizer_folder):
    data = tmp_path / "data.jsonl"  # short, as an answer holds the whole vocabulary for each token of a prompt as well
    data.write_text('{"prompt": "Return the"}\n{"prompt": "If a"}\n' * 6)
    options = dict(data=data, max_new_tokens=12, eval_prompts=2, inspect_samples=2)
    local_log = run(tmp_path / "local", **options)  # noqa: F811
    options |= {"teacher": tokenizer_folder, "teacher_url": url, "teacher_top_k": VOCABULARY}
    served = run(tmp_path / "served", **options)
    steps = [[row for row in log if "loss" in row] for log in (local_log, served)]
    assert len(steps[0]) == 2
    for ours, theirs in zip(*steps, strict=True):
        for name in "loss", "loss/single", "loss/longer", "grad_norm", "reverse_kl_per_byte", "response/length":
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
        assert "teacher_mass" in ours and "teacher_mass" not in theirs
        stops = [{name: row[name] for name in row if name.startswith("stop_mass/")} for row in (ours, theirs)]
        assert stops[1] == pytest.approx(stops[0], rel=1e-3)
        assert theirs["served/topk_mass"] == pytest.approx(1, abs=1e-4) and theirs["served/units_without_choice"] == 0
    evaluations = [[row for row in log if "eval_reverse_kl_per_byte" in row] for log in (local_log, served)]
    for ours, theirs in zip(*evaluations, strict=True):
        assert ours["eval_reverse_kl_per_byte"] == pytest.approx(theirs["eval_reverse_kl_per_byte"], rel=1e-3)
    pages = [Page((tmp_path / name / "inspect-2.html").read_text("utf-8")) for name in ("local", "served")]
    units = [[unit for text in page.texts for unit in text] for page in pages]
    assert len(units[0]) > 4
    for ours, theirs in zip(*units, strict=True):
        assert ours.rows == theirs.rows and ours.kind == theirs.kind
        if ours.kind != "unsupervised":
            assert ours.loss == pytest.approx(theirs.loss, abs=2e-3)


def test_a_run_with_few_log_probabilities_says_how_much_it_sees(tmp_path, url, tokenizer_folder):
    log = run(tmp_path, teacher=tokenizer_folder, teacher_url=url, teacher_top_k=2, eval_prompts=0)
    for row in log[:-1]:
        assert 0.2 < row["served/topk_mass"] < 0.999 and 0 < row["served/units_without_choice"] < 1
        assert row["loss"] > 0


@pytest.mark.slow
def test_a_run_outlives_a_restart_of_its_server(tmp_path, double, tokenizer_folder):
    """The server is stopped while the second step is scored, and started again when it was missed."""
    stop, answer, seen = threading.Event(), double.answer, []

    def counting(method, route, body, key):
        seen.append(route)
        if len(seen) == 10:  # five as they meet, four rows of the first step
            stop.set()
        return answer(method, route, body, key)

    double.answer = counting
    running = serving(double)
    url = running.__enter__()
    port, restarted, done = int(url.rsplit(":", 1)[1]), threading.Event(), threading.Event()

    def restart():
        stop.wait()
        with retried() as missed:
            running.__exit__(None, None, None)
            missed.wait()
        with serving(double, port):
            restarted.set()
            done.wait()

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    try:
        options = dict(teacher=tokenizer_folder, teacher_url=url, teacher_top_k=8, eval_prompts=0)
        interrupted = run(tmp_path / "interrupted", **options)
        assert restarted.is_set()
        undisturbed = run(tmp_path / "undisturbed", **options)
    finally:
        stop.set()
        done.set()
    for ours, theirs in zip(interrupted[:-1], undisturbed[:-1], strict=True):
        assert ours["loss"] == theirs["loss"] and ours["served/topk_mass"] == theirs["served/topk_mass"]


def test_one_of_several_teachers_is_served(tmp_path, url, tokenizer_folder):
    data = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()[:8]]
    data.write_text("\n".join(json.dumps({**row, "teacher": "far" if i % 2 else "near"}) for i, row in enumerate(rows)))
    options = dict(data=data, max_steps=1, temperature=0.0, eval_prompts=0)
    both = run(
        tmp_path / "both", teacher=json.dumps({"near": TEACHER, "far": str(tokenizer_folder)}),
        teacher_url=json.dumps({"far": url}), teacher_top_k=VOCABULARY, **options,
    )  # fmt: skip
    near = run(tmp_path / "near", teacher=json.dumps({"near": TEACHER, "far": TEACHER}), **options)
    assert both[0]["loss"] == pytest.approx(near[0]["loss"], rel=1e-4)
    assert "teacher_mass" in both[0] and "served/topk_mass" in both[0]


def config(tmp_path, **options):
    return SimCTConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "bpm"}, "objective is 'bpm', which reads the teacher's hidden states: expected 'simct'"),
        ({"objective": "uld"}, "objective is 'uld'"),
        ({"score": "mean_logit"}, "score is 'mean_logit', and a served teacher has no logits"),
        ({"teacher_server_kwargs": '{"api_key": "x"}'}, "names api_key, .*expected it in SIMCT_TEACHER_API_KEY"),
        ({"teacher_server_kwargs": {"retries": 3}}, "names 'retries': expected some of model_name, .*vocab_size"),
        ({"teacher_top_k": LIMIT + 1}, f"allows {LIMIT} log-probabilities"),
        ({"teacher_url": {"other": "http://h:1"}}, "expected addresses by the teachers' names, teacher"),
    ],
)
def test_options_that_a_served_teacher_cannot_follow(tmp_path, double, tokenizer_folder, options, message):
    with serving(double) as url:
        arguments = config(tmp_path, **{"teacher_url": url, **options})
        with pytest.raises(ValueError, match=message):
            SimCTTrainer(STUDENT, str(tokenizer_folder), arguments, [{"prompt": "Return"}])


def test_a_teacher_object_comes_in_as_it_is(tmp_path, double, demo_tokenizers):
    with serving(double) as url:
        teacher = ServedTeacher(url, demo_tokenizers[1], top_k=8)
        trainer = SimCTTrainer(STUDENT, teacher, config(tmp_path, max_new_tokens=8), [{"prompt": "Return the"}] * 8)
        trainer.train()
        assert trainer.teacher is teacher and trainer.state.global_step == 1
        with pytest.raises(ValueError, match="objective is 'alm'"):
            SimCTTrainer(STUDENT, teacher, config(tmp_path, objective="alm"), [{"prompt": "Return the"}])
        with pytest.raises(ValueError, match="teacher is a .*, but teacher_url is given: expected its name or folder"):
            SimCTTrainer(STUDENT, teacher, config(tmp_path, teacher_url=url), [{"prompt": "Return the"}])
        long = [{"prompt": "name " * 300}]
        with pytest.raises(ValueError, match=f"too many for the teacher's context of {MAX_MODEL_LEN - 2}"):
            SimCTTrainer(STUDENT, teacher, config(tmp_path, max_new_tokens=8), long)


def test_long_answers_are_read_in_processes_of_their_own(url, samples, demo_tokenizers, monkeypatch):  # noqa: F811
    monkeypatch.setattr("simct.teachers.server.LONG", 0)
    here, apart = (ServedTeacher(url, demo_tokenizers[1], top_k=5, readers=n) for n in (0, 1))
    assert here.served._readers is None
    for ours, theirs in zip(vars(apart.rows(*samples)).values(), vars(here.rows(*samples)).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(apart.served._readers._idle) == 1  # one that has read
    with pytest.raises(ValueError, match="readers is -1: expected 0"):
        ServedTeacher(url, demo_tokenizers[1], readers=-1)
