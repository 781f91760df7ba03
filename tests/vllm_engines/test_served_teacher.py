"""A teacher behind a real vLLM server: `tests/served_contract.py`, runs of `simct train`, and what the double is held to."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from served_answers import CONTEXT, LIMIT, PATH, REQUESTS, assert_same, read
from served_contract import VOCABULARY, ServedContract, local, samples  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

from simct.demo import ASSETS
from simct.rollouts.vllm_server import ServedVLLM
from simct.teachers.served import ServedTeacher

from .conftest import free_port, run_server

pytestmark = pytest.mark.vllm
TEACHER = str(ASSETS / "teacher")


@contextmanager
def serve(log, port, max_logprobs, model=TEACHER):
    options = {
        "--max-logprobs": str(max_logprobs), "--max-model-len": str(CONTEXT), "--served-model-name": "teacher",
    }  # fmt: skip
    with run_server(model, port, log, options) as found:
        yield found


@pytest.fixture(scope="module")
def url(server_url, demo_teacher):
    """A server that allows all log-probabilities: the one that takes weights, with the demo teacher's own again."""
    ServedVLLM(server_url).update_weights(demo_teacher)
    return server_url


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A server that allows 64; (address, process)."""
    with serve(tmp_path_factory.mktemp("limited") / "log", free_port(), LIMIT) as found:
        yield found


class TestServed(ServedContract):
    pass


def test_the_recorded_answers_are_the_servers(limited):
    answers = []
    for route, body in REQUESTS:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(limited[0] + route, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        answers.append({"route": route, "body": body, "status": status, "answer": json.loads(content)})
    if os.environ.get("SIMCT_RECORD"):
        import vllm

        PATH.parent.mkdir(exist_ok=True)
        next(a["answer"] for a in answers if a["route"] == "/v1/models")["data"][0]["root"] = "the demo's teacher"
        lines = ",\n".join(json.dumps(answer) for answer in answers)
        PATH.write_text(f'{{"server": "vLLM {vllm.__version__}", "answers": [\n{lines}\n]}}\n', "utf-8")
    for ours, theirs in zip(answers, read()["answers"], strict=True):
        assert (ours["route"], ours["body"], ours["status"]) == (theirs["route"], theirs["body"], theirs["status"])
        assert_same(ours["answer"], theirs["answer"])


def test_a_limit_below_k_is_said_with_both_numbers(limited, demo_tokenizers):
    with pytest.raises(ValueError, match=rf"is {LIMIT + 1}, but .* allows {LIMIT} .*--max-logprobs {LIMIT + 1}"):
        ServedTeacher(limited[0], demo_tokenizers[1], top_k=LIMIT + 1)
    assert ServedTeacher(limited[0], demo_tokenizers[1], top_k=LIMIT).top_k == LIMIT


# ---- Runs, each a process of its own ----


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, demo_tokenizers):
    folder = tmp_path_factory.mktemp("tokenizer")
    demo_tokenizers[1].save_pretrained(folder)
    return folder


def words(output, **options):
    given = {
        "student": ASSETS / "student", "teacher": TEACHER, "data": ASSETS / "train.jsonl", "output_dir": output,
        "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "max_new_tokens": 16,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, **options,
    }  # fmt: skip
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def log_of(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def run(programs):
    def run(output, **options):
        programs.run(["simct.commands.cli", "train", *words(output, **options)], output.with_suffix(".txt"))
        return log_of(output)

    return run


def test_a_run_has_the_losses_of_the_run_with_a_local_teacher(tmp_path, url, tokenizer_folder, run):
    options = dict(eval_prompts=8, teacher_top_k=VOCABULARY)
    served = run(tmp_path / "served", teacher=tokenizer_folder, teacher_url=url, **options)
    near = run(tmp_path / "local", **options)
    compared = 0
    for ours, theirs in zip(served, near, strict=True):
        for name in "loss", "grad_norm", "reverse_kl_per_byte", "eval_reverse_kl_per_byte":
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
                compared += 1
    assert compared == 2 * 3 + 2


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory, demo_tokenizers):
    """310 MB of weights, any weights; the demo teacher's vocabulary."""
    folder = tmp_path_factory.mktemp("large")
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=12)
    config = AutoConfig.from_pretrained(TEACHER, **sizes, num_key_value_heads=12, head_dim=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    demo_tokenizers[1].save_pretrained(folder)
    return folder


def measured(output, **options):
    """The log of a run whose peak of memory is its own: a child of a shell, since one of this process, or a forked one, would begin
    with what is held here."""
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "simct.commands.cli", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words(output, **options)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return log_of(output)


@pytest.mark.slow
def test_a_run_does_without_the_teachers_memory(tmp_path, large_teacher, tokenizer_folder):
    near = measured(tmp_path / "local", teacher=large_teacher)
    with serve(tmp_path / "log", free_port(), LIMIT, large_teacher) as (address, _):
        served = measured(tmp_path / "served", teacher=tokenizer_folder, teacher_url=address, teacher_top_k=16)
    assert served[1]["served/topk_mass"] < 0.5  # far from all of it
    peaks = [log[1]["peak_memory_gb"] for log in (near, served)]
    assert peaks[1] < peaks[0] - 0.25, peaks


def test_a_run_outlives_a_killed_server(tmp_path, limited, tokenizer_folder, programs, run):
    """The last test here: the server of `limited` is killed in the middle, and another takes its place."""
    address, server = limited
    port = int(address.rsplit(":", 1)[1])
    options = dict(teacher=tokenizer_folder, teacher_url=address, teacher_top_k=8, max_steps=30)
    undisturbed = run(tmp_path / "undisturbed", **options)
    output, said = tmp_path / "interrupted", tmp_path / "interrupted.txt"
    process = programs.start(["simct.commands.cli", "train", *words(output, **options)], said)
    while not (said.exists() and "\nstep    3" in said.read_text()):
        assert process.poll() is None, "the run ended before the server did"
        time.sleep(0.02)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    time.sleep(2)
    assert process.poll() is None
    with serve(tmp_path / "log", port, LIMIT):
        assert process.finish(400) == 0, said.read_text()[-3000:]
    losses = [[row["loss"] for row in log if "loss" in row] for log in (undisturbed, log_of(output))]
    assert len(losses[1]) == 30 and losses[1] == pytest.approx(losses[0], rel=1e-3)
