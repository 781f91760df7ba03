"""Keys, tokens and passwords: read once, and in nothing that a run prints or writes."""

import copy
import json
import logging
import pickle
import re
import traceback
from pathlib import Path

import pytest
from json_server import serving
from served_double import Double

from simct import SimCTConfig
from simct.commands.cli import main
from simct.demo import ASSETS
from simct.secrets import hide, read_address, read_key, redact, shown_address, without_secrets

KEY, HUB, STUDENT_HUB, TEACHER_HUB = (
    "server-key/41+5",
    "hub-token-of-mine",
    "token-for-the-student",
    "token-for-the-teacher",
)
GATEWAY, PASSWORD = "gateway-key-0815", "pa55word/4711x4711"
SECRETS = (KEY, HUB, STUDENT_HUB, TEACHER_HUB, GATEWAY, PASSWORD, "4711x4711")


# ---- Reading ----


@pytest.mark.parametrize("given", ["a-key-9", " a-key-9\n", "a-key-9\r\n", "\ta-key-9"])
def test_white_space_around_a_key_is_no_part_of_it(given, monkeypatch):
    monkeypatch.setenv("SOME_KEY", given)
    assert read_key("api_key", None, "SOME_KEY") == read_key("api_key", given) == "a-key-9"
    assert redact(f"x{given}y") == f"x{given}y".replace("a-key-9", "***")


@pytest.mark.parametrize("given", [None, "", " \n"])
def test_no_key_is_none(given, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert read_key("api_key", given, "SOME_KEY") is None


@pytest.mark.parametrize("given", ["two\nlines-1", "a blank-2", "naïve-3", "nul\0-4", "del\x7f-5"])
def test_a_key_that_no_header_carries_is_refused_unseen(given):
    with pytest.raises(ValueError, match=rf"api_key has U\+00.. as character \d of {len(given)}: expected") as error:
        read_key("api_key", given)
    assert given[-4:] not in str(error.value)


@pytest.mark.parametrize(
    "address, shown",
    [
        ("http://host:8000", "http://host:8000"),
        ("https://host/", "https://host"),
        ("http://host/v1", "http://host/v1"),
        ("http://host:1/some/where", "http://host:1/***"),
        ("http://me:secret@host:1", "http://host:1"),
        ("http://me:se/cret@host:1", "***"),
        ("http://host?key=secret", "http://host"),
        ("me:secret@host:1", "***"),
        ("host:8000", "host:8000"),
        ("http://[half:8000", "***"),
    ],
)
def test_what_is_shown_of_an_address(address, shown):
    assert shown_address(address) == shown


@pytest.mark.parametrize(
    "address, message",
    [
        ("http://me:pa55word/4711x4711@host:1", "was given with a user or key in it"),
        ("http://host:1?key=pa55word/4711x4711", "'http://host:1' was given with a user or key in it"),
        ("http://host:1/#pa55word/4711x4711", "was given with a user or key in it"),
        ("ftp://host/pa55word/4711x4711", r"is 'ftp://host/\*\*\*': expected 'http://HOST:PORT'"),
        ("me:pa55word/4711x4711@host", "with a user or key"),
        ("http://host:port/pa55word/4711x4711", "expected 'http://HOST:PORT'"),
        ("http://:80", "expected 'http://HOST:PORT'"),
    ],
)
def test_addresses_that_are_refused(address, message):
    with pytest.raises(ValueError, match=message) as error:
        read_address("teacher_url", address)
    assert "4711x4711" not in str(error.value) and "pa55" not in str(error.value)


def test_addresses_inside_of_messages():
    message = "GET https://me:pw@host/a?page=2&key=x#top failed, see http://host/b?c=d and ftp://u@h (what? a=b)"
    shown = "GET https://***@host/a?page=***&key=***#top failed, see http://host/b?c=*** and ftp://***@h (what? a=b)"
    assert redact(message) == shown
    assert redact("token hf_abcdefghij of the hub") == "token *** of the hub"


def test_a_long_message_takes_no_time():
    for text in ("x" * 100_000, "a.b-" * 30_000, "?" * 100_000, "://" * 30_000, "http://" + "?&" * 50_000):
        assert len(redact(text)) == len(text)


def test_a_secret_in_an_address_is_hidden_there_too():
    hide("a/b+c=d-of-mine")
    assert redact("http://h/a%2Fb%2Bc%3Dd-of-mine/x") == "http://h/***/x"


# ---- Options ----


@pytest.fixture
def config(tmp_path):
    kwargs = {"token": STUDENT_HUB, "revision": "main", "deeper": {"api_key": KEY}}
    options = dict(hub_token=f"{HUB}\n", model_init_kwargs=kwargs, teacher_url=f"http://127.0.0.1:1/{GATEWAY}/")
    return SimCTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(
    "shown",
    [str, repr, lambda c: json.dumps(c.to_dict()), lambda c: c.to_json_string(), lambda c: str(c.to_sanitized_dict())],
)
def test_options_are_logged_without_keys(config, shown):
    assert not [secret for secret in SECRETS if secret in shown(config)]
    assert "revision" in shown(config) and "http://127.0.0.1:1/***" in shown(config)


def test_options_are_stored_without_keys_and_copied_with_them(config):
    stored = pickle.dumps(config)
    assert not [secret for secret in SECRETS if secret.encode() in stored]
    again = pickle.loads(stored)
    assert again.hub_token is None and again.model_init_kwargs == {"revision": "main", "deeper": {}}
    for same in copy.copy(config), copy.deepcopy(config), config:
        assert same.hub_token == HUB and same.model_init_kwargs["token"] == STUDENT_HUB
        assert same.teacher_url == f"http://127.0.0.1:1/{GATEWAY}"


def test_only_what_is_secret_is_left_out():
    assert without_secrets("special_tokens", {"<|im_end|>": "<eos>"}) == {"<|im_end|>": "<eos>"}
    assert without_secrets("teacher_url", {"a": "http://h:1/x"}) == {"a": "http://h:1/***"}
    assert without_secrets("output_dir", "runs/a") == "runs/a" and without_secrets("seed", 3) == 3


# ---- A run ----


def words(output, url, **options):
    given = {
        "student": ASSETS / "student", "teacher": ASSETS / "teacher", "data": ASSETS / "train.jsonl", "max_steps": 1,
        "max_new_tokens": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "report_to": "none", "output_dir": output, "teacher_top_k": 8, "eval_prompts": 2,
        "teacher_url": f"{url}/{GATEWAY}", "hub_token": HUB, "inspect_samples": 1, "log_level": "debug",
        "model_init_kwargs": json.dumps({"token": STUDENT_HUB}),
        "teacher_model_init_kwargs": json.dumps({"token": TEACHER_HUB}), **options,
    }  # fmt: skip
    return ["train", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


@pytest.fixture
def gateway(demo_teacher, demo_tokenizers):
    """A server behind a path that is a secret. What it refuses it says with all that it knows, of scores those after `after`."""
    double = Double(demo_teacher, demo_tokenizers[1], key=KEY)
    answer, double.after = double.answer, 10**9

    def gatekeeper(method, path, body, authorization):
        double.asked_with = authorization
        echo = {"error": {"message": f"{method} {path}: 'Authorization: {authorization}' \n is no good"}}
        if not path.startswith(f"/{GATEWAY}/"):
            return 404, echo
        status, found = answer(method, path.removeprefix(f"/{GATEWAY}"), body, authorization)
        scored = sum(route == "/v1/completions" for route, _ in double.asked)
        return (400, echo) if scored > double.after else (status, echo if status == 401 else found)

    double.answer = gatekeeper
    return double


@pytest.fixture
def everything(capfd, caplog, tmp_path, monkeypatch):
    """A function: all that was printed, logged and written."""
    monkeypatch.setenv("SIMCT_TEACHER_API_KEY", f"{KEY}\n")
    monkeypatch.setenv("COLUMNS", "1000")
    caplog.set_level(logging.DEBUG)

    def found(more=""):
        printed = "".join(capfd.readouterr()) + caplog.text + more
        files = {str(path): path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file()}
        return {"printed": printed.encode(), **files}

    return found


def leaks(found):
    return [(name, secret) for name, content in found.items() for secret in SECRETS if secret.encode() in content]


def test_a_run_shows_and_stores_no_secret(tmp_path, gateway, everything):
    with serving(gateway) as url:
        main(words(tmp_path / "run", url))
    found = everything()
    assert gateway.asked_with == f"Bearer {KEY}" and len(found["printed"]) > 1000
    assert {"training_args.bin", "trainer_state.json", "tokenizer_config.json", "config.json"} <= {
        Path(name).name for name in found
    }
    assert leaks(found) == []


def test_a_server_that_echoes_the_key_in_a_run(tmp_path, gateway, everything):
    with serving(gateway) as url:
        gateway.after = 2  # the probes
        with pytest.raises(SystemExit) as ended:
            main([*words(tmp_path / "run", url, eval_prompts=0), "--traceback"])
    found = everything("".join(traceback.format_exception(ended.value)))
    assert b"answered 400: POST /***/v1/completions: 'Authorization: Bearer ***' is no good" in found["printed"]
    assert b"in _ask" in found["printed"]  # the traceback
    assert leaks(found) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dry_run": True}, "The teacher is served at http://127.0.0.1:"),
        ({"teacher_url": f"http://me:{PASSWORD}@127.0.0.1:1"}, "with a user or key in it"),
        ({"teacher_url": f"http://me:{PASSWORD}@127.0.0.1:1", "dry_run": True}, "with a user or key in it"),
        ({"teacher_url": f"http://127.0.0.1:1/?key={PASSWORD}"}, "with a user or key in it"),
        ({"rollout_engine": "vllm-server", "vllm_server_url": f"http://me:{PASSWORD}@127.0.0.1:1"}, "with a user or"),
        ({"model_init_kwargs": json.dumps({"token": STUDENT_HUB})[:-1]}, r"model_init_kwargs is '\{\"token\": \*\*\*:"),
        (
            {"teacher_url": json.dumps({"a": f"http://me:{PASSWORD}@h"})[:-1]},
            "teacher_url is .*://\\*\\*\\*@h.*expected a JSON",
        ),
        (
            {"model_init_kwargs": json.dumps({"token": "two\nlines of 4711x4711"})},
            "token of model_init_kwargs has U.000A as character 4",
        ),
        ({"teacher_server_kwargs": json.dumps({"api_key": KEY})}, "names api_key, which checkpoints would keep"),
        ({"teacher_server_kwargs": json.dumps({"api_key": KEY}), "dry_run": True}, "The teacher is served at"),
        ({"hub_tokenn": "of 4711x4711"}, r"unrecognized arguments: --hub_tokenn \*\*\* \(did you mean --hub_token"),
        ({"config": "hub_token: of 4711x4711: x"}, r"is not YAML: .*hub_token: \*\*\*"),
        ({"config": "hub_token: [of 4711x4711]"}, r"hub_token is \*\*\*: expected one value"),
        (
            {"config": 'model_init_kwargs: {token: "of 4711x4711", when: 2020-01-01}'},
            "token': \\*\\*\\*: expected what JSON",
        ),
        ({"hub_token": "two\nlines of 4711x4711"}, "hub_token has U.000A as character 4"),
        ({"teacher_url": "{url}/other-4711x4711"}, r"answered 404: .*'Authorization: Bearer \*\*\*'"),
    ],
)
def test_a_command_that_ends_early_shows_no_secret(tmp_path, gateway, everything, options, message):
    if "config" in options:
        (tmp_path.parent / "options.yaml").write_text(options["config"])
        options = {"config": tmp_path.parent / "options.yaml"}
    with serving(gateway) as url:
        options = {name: str(value).replace("{url}", url) for name, value in options.items()}
        with pytest.raises(SystemExit):
            main(words(tmp_path / "run", url, **options))
    found = everything()
    assert leaks(found) == []
    assert re.search(message, " ".join(found["printed"].decode().split()))


def test_a_key_that_is_refused_is_not_shown(tmp_path, gateway, everything, monkeypatch):
    monkeypatch.setenv("SIMCT_TEACHER_API_KEY", "another-key-4711x4711\n")
    with serving(gateway) as url, pytest.raises(SystemExit):
        main(words(tmp_path / "run", url))
    found = everything()
    assert b"answered 401: GET /***/v1/models: 'Authorization: Bearer ***' is no good" in found["printed"]
    assert leaks(found) == []
