"""What a run makes its vLLM with."""

import pytest

from simct import SimCTConfig, SimCTTrainer
from simct.data.prompts import render_prompt
from simct.demo import ASSETS
from simct.rollouts import engines
from simct.rollouts.transformers_engines import StaticBatching

STUDENT, TEACHER = str(ASSETS / "student"), str(ASSETS / "teacher")
PROMPTS = [{"prompt": text} for text in ("Return", "The name of the file that is to be read, and its encoding", "If")]


@pytest.fixture
def made(monkeypatch):
    """The options of each engine that would be made."""
    found = []

    class Module:
        @staticmethod
        def colocated_from_model(student, tokenizer, **options):
            found.append(options)
            return StaticBatching(student)

    monkeypatch.setattr(engines, "_vllm_engine", lambda: Module)
    return found


def trainer(folder, data, **options):
    given = dict(use_cpu=True, report_to=[], max_new_tokens=20, rollout_engine="vllm", max_steps=1)
    return SimCTTrainer(STUDENT, TEACHER, SimCTConfig(str(folder), **given | options), data)


def test_the_context_is_the_longest_prompt_and_a_response(made, tmp_path, demo_tokenizers):
    trainer(tmp_path, PROMPTS, vllm_kwargs='{"max_num_seqs": 9}', max_logprob_gap=0.1)
    longest = max(len(render_prompt(record["prompt"], demo_tokenizers[0])) for record in PROMPTS)
    assert made == [{"max_model_len": longest + 20, "max_num_seqs": 9, "max_logprob_gap": 0.1, "dtype": "float32"}]


def test_options_that_are_given_are_over_those_that_are_found(made, tmp_path):
    trainer(tmp_path, PROMPTS, vllm_kwargs={"max_model_len": 300, "sleep": False}, vllm_gpu_memory_utilization=0.5)
    ((options),) = made
    assert (options["max_model_len"], options["sleep"], options["gpu_memory_utilization"]) == (300, False, 0.5)


def test_options_that_a_servers_client_has_not_are_named(tmp_path):
    url = {"rollout_engine": "vllm-server", "vllm_server_url": "http://127.0.0.1:9"}
    with pytest.raises(ValueError, match="vllm_kwargs names 'sleep': expected some of model_name, max_model_len"):
        trainer(tmp_path, PROMPTS, vllm_kwargs={"sleep": True}, **url)
