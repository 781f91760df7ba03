"""The vLLM engines without a vLLM: requests, answers, servers that are not what they should be. `vllm_engines` has a real one."""

import copy
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from json_server import replying, serving
from safetensors.torch import load_file

from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.transformers_engines import StaticBatching
from simct.rollouts.vllm_engine import ColocatedVLLM, colocated_from_model
from simct.rollouts.vllm_plugin import BACKEND
from simct.rollouts.vllm_requests import request_seed, request_settings, to_response
from simct.rollouts.vllm_server import ServedVLLM

pytest.importorskip("httpx")
SETTINGS = Sampling(end_ids=(1,), pad_id=0, max_new_tokens=4)
MODEL = {"logprobs_mode": "raw_logprobs", "generation_config": "vllm"}
CHOICE = {"token_ids": [7, 1], "finish_reason": "stop", "stop_reason": 1, "logprobs": {"token_logprobs": [-0.5, -0.25]}}


def answers(**changed):
    routes = {
        "/health": {},
        "/v1/models": {"data": [{"id": "student", "max_model_len": 64}]},
        "/server_info": {"vllm_config": {"model_config": MODEL}},
        "/is_paused": {"is_paused": False},
        "/v1/completions": {"choices": [CHOICE]},
        "/pause": {},
        "/resume": {},
        "/collective_rpc": {"results": [None]},
        "/reset_prefix_cache": {"success": True},
    }
    return routes | {"/" + route.replace("__", "/"): answer for route, answer in changed.items()}


@contextmanager
def server(routes):
    """Answers each route with JSON, (status, JSON) or what a function makes of the body. Gives the address and what was asked."""
    asked = []

    def answer(method, path, body, authorization):
        route = path.split("?")[0]
        asked.append((route, body, authorization))
        found = routes.get(route, (404, {"detail": "Not Found"}))
        found = found(body) if callable(found) else found
        return found if isinstance(found, tuple) else (200, found)

    with serving(SimpleNamespace(answer=answer)) as url:
        yield url, asked


def test_requests_say_all_that_shapes_the_distribution():
    settings = request_settings(Sampling((1, 5), 0, 9, temperature=0.7, top_p=0.9, stop_strings=("\n\n",)), seed=3)
    assert settings["stop_token_ids"] == [1, 5] and settings["ignore_eos"] and settings["stop"] == ["\n\n"]
    assert (settings["max_tokens"], settings["temperature"], settings["top_p"], settings["seed"]) == (9, 0.7, 0.9, 3)
    assert (settings["top_k"], settings["min_p"], settings["repetition_penalty"], settings["logprobs"]) == (
        0,
        0.0,
        1.0,
        0,
    )


def test_seeds_of_neighbours_do_not_meet():
    seeds = {request_seed(seed, index) for seed in range(30) for index in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(3, 4) == request_seed(3, 4)


@pytest.mark.parametrize(
    "tokens, reason, stop, expected",
    [([7, 1], "stop", 1, "stop"), ([7, 8], "stop", "ab", "stop_string"), ([7, 8], "length", None, "length")],
)
def test_finish_reasons(tokens, reason, stop, expected):
    assert to_response(tokens, reason, stop, [-1, -2], SETTINGS) == Response(tokens, expected, [-1.0, -2.0])


@pytest.mark.parametrize(
    "tokens, reason, stop", [([7, 8], "stop", None), ([7], "abort", None), ([], "stop", 1), ([7], None, None)]
)
def test_an_answer_that_is_no_response_is_an_error(tokens, reason, stop):
    with pytest.raises(RuntimeError, match="vLLM ended a response with"):
        to_response(tokens, reason, stop, None, SETTINGS)


@pytest.mark.parametrize(
    "tokens, logprobs, message",
    [
        ([-7, 1], [-1, -1], "token id -7: expected ids from 0 to 99"),
        ([100, 1], [-1, -1], "token id 100: expected ids from 0 to 99"),
        (["7", 1], [-1, -1], "cannot be read"),
        ([7.5, 1], [-1, -1], "cannot be read"),
        (7, [-1, -1], "cannot be read"),
        ([7, 1], [-1, "none"], "cannot be read"),
        ([7, 1], [-1, 0.5], "0.5 as a log-probability: expected 0 or less"),
        ([7] * 9, [-1] * 9, "has 9 tokens: expected at most 4"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error(tokens, logprobs, message):
    with pytest.raises(RuntimeError, match=message):
        to_response(tokens, "stop", 1, logprobs, SETTINGS, 100)


def test_an_answer_short_of_log_probabilities_is_an_error():
    with pytest.raises(RuntimeError, match="1 log-probabilities to 2 tokens"):
        to_response([7, 1], "stop", 1, [-1.0], SETTINGS)


def test_prompts_and_responses_travel_as_ids_each_with_its_seed(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    with server(answers()) as (url, asked):
        engine = ServedVLLM(url)
        responses = engine.generate([[5, 6], [5, 6]], SETTINGS, seed=3)
    assert responses == [Response([7, 1], "stop", [-0.5, -0.25])] * 2
    sent = [body for route, body, _ in asked if route == "/v1/completions"]
    assert all(body["prompt"] == [5, 6] and body["return_token_ids"] and body["model"] == "student" for body in sent)
    assert {body["seed"] for body in sent} == {request_seed(3, 0), request_seed(3, 1)}
    assert {key for _, _, key in asked} == {"Bearer of-the-environment"}
    with server(answers()) as (url, asked):
        ServedVLLM(url, seeded=False).generate([[5, 6]], SETTINGS, seed=3)
    assert asked[-1][1]["seed"] is None
    assert "of-the-environment" not in repr(vars(engine))


def test_an_address_without_a_server_is_refused():
    with server({}) as (url, _):
        pass  # closed again: a port where nothing listens
    with pytest.raises(
        ConnectionError, match=rf"no vLLM server answers at {url}/health .*VLLM_SERVER_DEV_MODE=1 vllm serve"
    ):
        ServedVLLM(url)
    for wrong in ("127.0.0.1:8000", url + "/v1"):
        with pytest.raises(ValueError, match="base_url is .*expected 'http://HOST:PORT'"):
            ServedVLLM(wrong)


def test_a_server_that_is_still_starting_is_waited_for():
    starting = iter([(503, {}), (503, {}), {}])
    with server(answers(health=lambda body: next(starting))) as (url, _):
        assert ServedVLLM(url, wait=10).max_model_len == 64


@pytest.mark.parametrize(
    "routes, options, message",
    [
        ({"server_info": (404, {})}, {}, "does not open vLLM's development routes .*VLLM_SERVER_DEV_MODE=1"),
        (
            {"server_info": {"vllm_config": {"model_config": MODEL | {"generation_config": "auto"}}}},
            {},
            "--generation-config vllm",
        ),
        (
            {"server_info": {"vllm_config": {"model_config": MODEL | {"logprobs_mode": "processed_logprobs"}}}},
            {},
            "logprobs_mode of .* is 'processed_logprobs'.*--logprobs-mode raw_logprobs",
        ),
        ({}, {"max_model_len": 65}, "is 64, prompt and response may need 65 tokens"),
        ({}, {"model_name": "other"}, "model_name is 'other': .* serves, student"),
        ({}, {"vocab_size": 100}, "has token id 100, the student has 100 token ids"),
        (
            {"v1__completions": (400, {"error": {"message": "out of vocabulary"}})},
            {"vocab_size": 100},
            "has not token id 99",
        ),
        ({"v1__models": {"data": [{"id": "gpt"}]}}, {}, "does not say its max_model_len: expected a vLLM server"),
    ],
)
def test_servers_that_cannot_serve_the_student_are_refused(routes, options, message):
    with server(answers(**routes)) as (url, _), pytest.raises(ValueError, match=message):
        ServedVLLM(url, **options)


def test_a_slow_server_is_a_timeout(clock):
    with server(answers(v1__completions=lambda body: clock.move(1000) or too_late.wait() or {})) as (url, _):
        too_late = threading.Event()
        engine = ServedVLLM(url, timeout=200)
        with pytest.raises(TimeoutError, match=r"/v1/completions did not answer within 200 seconds"):
            engine.generate([[5]], SETTINGS, seed=0)
        too_late.set()


def test_a_request_that_reached_the_server_is_not_sent_again(clock):
    """It may still be running there: weights are not loaded twice, and no response is sampled twice."""
    with server(answers(v1__completions=(503, {}))) as (url, asked):
        with pytest.raises(RuntimeError, match="answered 503"):
            ServedVLLM(url).generate([[5]], SETTINGS, seed=0)
    assert [route for route, _, _ in asked].count("/v1/completions") == 1


def test_redirects_are_not_followed_and_a_wrong_key_is_said(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password of-the-netrc\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("VLLM_API_KEY", "the-key-in-use\n")
    with server(answers()) as (other, elsewhere):
        with replying(307, Location=f"{other}/health") as (url, _):
            with pytest.raises(RuntimeError, match="/health answered 307: a redirect to .*not followed"):
                ServedVLLM(url)
    assert not elsewhere
    with server({"/health": (401, {"error": "no such key: the-key-in-use"})}) as (url, asked):
        with pytest.raises(PermissionError, match=r"answered 401: no such key: \*\*\*: expected a key .*VLLM_API_KEY"):
            ServedVLLM(url)
    assert asked[0][2] == "Bearer the-key-in-use"


@pytest.mark.parametrize("url", ["http://me:pa55word@host:1", "http://host:1?key=pa55word", "http://host:1/#pa55word"])
def test_an_address_with_a_password_is_refused_without_it(url):
    with pytest.raises(ValueError, match="was given with a user or key in it") as error:
        ServedVLLM(url)
    assert "pa55word" not in str(error.value)


def test_an_error_with_status_200_says_the_servers_words():
    with server(answers(v1__completions={"error": {"message": "engine\nis dead"}})) as (url, _):
        with pytest.raises(RuntimeError, match="/v1/completions answered an error: engine is dead"):
            ServedVLLM(url).generate([[5]], SETTINGS, seed=0)


def test_a_failed_request_says_the_servers_words_on_one_line():
    with server(answers(v1__completions=(500, {"error": {"message": "engine\nis dead"}}))) as (url, _):
        with pytest.raises(RuntimeError, match=r"/v1/completions answered 500: engine is dead"):
            ServedVLLM(url).generate([[5]], SETTINGS, seed=0)


def test_a_server_that_returns_text_alone_is_refused():
    with server(answers(v1__completions={"choices": [CHOICE | {"token_ids": None}]})) as (url, _):
        with pytest.raises(RuntimeError, match="text without token ids"):
            ServedVLLM(url).generate([[5]], SETTINGS, seed=0)


def completions(model, apart=0.0):
    """Answers as a vLLM with the model's weights would give them: greedy, `apart` off in each log-probability."""
    model = copy.deepcopy(model).eval()

    def answer(body):
        settings = Sampling(tuple(body["stop_token_ids"]), 0, body["max_tokens"], temperature=0.0)
        (response,) = StaticBatching(model).generate([body["prompt"]], settings, seed=0)
        logprobs = [value - apart for value in response.logprobs]
        choice = {"token_ids": response.token_ids, "finish_reason": response.finish_reason, "stop_reason": None}
        return {"choices": [choice | {"logprobs": {"token_logprobs": logprobs}}]}

    return answer


FILES = {
    "vllm_config": {"model_config": MODEL | {"dtype": "torch.bfloat16"}, "weight_transfer_config": {"backend": BACKEND}}
}


def test_weights_are_loaded_while_the_server_pauses(demo_student, tmp_path):
    with server(answers(v1__completions=completions(demo_student))) as (url, asked):
        ServedVLLM(url, sync_folder=tmp_path).update_weights(demo_student)
    routes = [route for route, _, _ in asked]
    start = routes.index("/pause")
    assert routes[start : start + 4] == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert set(routes[start + 4 :]) == {"/v1/completions"}  # the comparison with the student
    rpc = dict((route, body) for route, body, _ in asked)["/collective_rpc"]
    assert rpc["method"] == "reload_weights" and rpc["kwargs"]["weights_path"].startswith(str(tmp_path))


def test_weights_go_by_vllms_own_routes_where_the_server_has_the_engine_for_files(demo_student, tmp_path):
    dtypes = []

    def look(body):
        (file,) = Path(body["update_info"]["folder"]).glob("*.safetensors")
        dtypes.extend(tensor.dtype for tensor in load_file(file).values())
        return {}

    routes = {"/start_weight_update": {}, "/update_weights": look, "/finish_weight_update": {}}
    routes["/init_weight_transfer_engine"] = {}
    found = answers(v1__completions=completions(demo_student), server_info=FILES) | routes
    with server(found) as (url, asked):
        engine = ServedVLLM(url, sync_folder=tmp_path)
        engine.update_weights(demo_student)
        engine.update_weights(demo_student)
    changes = [route for route, _, _ in asked if "completions" not in route][4:]
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
    assert changes == ["/pause", "/init_weight_transfer_engine", *update, "/pause", *update]
    assert set(dtypes) == {torch.bfloat16}, "float32 master weights travel as the server computes"


@pytest.mark.parametrize(
    ("dtype", "apart", "refused"),
    [("bfloat16", 0.1, False), ("bfloat16", 0.3, True), ("float32", 0.03, False), ("float32", 0.1, True)],
)
def test_a_server_that_samples_from_other_weights_ends_the_run(demo_student, tmp_path, dtype, apart, refused):
    info = {"vllm_config": {"model_config": MODEL | {"dtype": f"torch.{dtype}"}}}
    demo_student.train()
    with server(answers(v1__completions=completions(demo_student, apart), server_info=info)) as (url, _):
        engine = ServedVLLM(url, sync_folder=tmp_path, sync_dtype="float32")
        message = r"its log-probabilities of \d+ tokens are 0.[0-9]+ from the student's"
        with pytest.raises(RuntimeError, match=message) if refused else nullcontext():
            engine.update_weights(demo_student)
    assert demo_student.training and not list(tmp_path.iterdir())


def test_a_tied_head_that_keeps_its_old_weights_ends_the_run(demo_student, tmp_path):
    """What `reload_weights` did on a CPU: all but the packed copy of the head was new."""
    stale = copy.deepcopy(demo_student)
    stale.lm_head.weight = torch.nn.Parameter(demo_student.lm_head.weight.detach() * 1.2)
    with server(answers(v1__completions=completions(stale))) as (url, _):
        with pytest.raises(RuntimeError, match="it samples from other weights, or computes this model otherwise"):
            ServedVLLM(url, sync_folder=tmp_path).update_weights(demo_student)


def test_a_weight_transfer_that_is_not_known_is_named():
    info = {"vllm_config": {"model_config": MODEL, "weight_transfer_config": {"backend": "ipc"}}}
    with server(answers(server_info=info)) as (url, _):
        with pytest.raises(ValueError, match=f"takes weights by 'ipc': expected .* the backend nccl or {BACKEND}"):
            ServedVLLM(url)


@pytest.mark.parametrize("route, answer", [("collective_rpc", (500, {})), ("reset_prefix_cache", {"success": False})])
def test_a_server_that_does_not_take_weights_goes_on_and_the_error_is_told(demo_student, tmp_path, route, answer):
    with server(answers(**{route: answer})) as (url, asked):
        with pytest.raises(RuntimeError, match="answered 500|did not empty its prefix cache"):
            ServedVLLM(url, sync_folder=tmp_path).update_weights(demo_student)
    assert asked[-1][0] == "/resume" and not list(tmp_path.iterdir())


def test_settings_of_the_colocated_engine_are_checked_before_vllm_is_imported(demo_student, demo_tokenizers, tmp_path):
    with pytest.raises(ValueError, match="gpu_memory_utilization is 1.5"):
        ColocatedVLLM(tmp_path, gpu_memory_utilization=1.5)
    with pytest.raises(ValueError, match="max_model_len is 1"):
        ColocatedVLLM(tmp_path, max_model_len=1)
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="is not empty: expected a new one"):
        colocated_from_model(demo_student, demo_tokenizers[0], tmp_path)
