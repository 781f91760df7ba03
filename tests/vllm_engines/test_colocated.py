import random

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from simct.rollouts import vllm_engine
from simct.rollouts.vllm_engine import ColocatedVLLM, colocated_from_model

from .conftest import MAX_MODEL_LEN, greedy, plain, take_steps
from .engine_contract import EngineContract

pytestmark = pytest.mark.vllm
PROCESS = {}


@pytest.fixture(scope="module")
def made(tokenizer, tied_folder):
    """An engine made of a student that no folder holds, and that student."""
    pytest.importorskip("vllm")
    model = AutoModelForCausalLM.from_pretrained(tied_folder, dtype=torch.float32)
    take_steps(model)
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    expected = (torch.rand(1).item(), random.random(), numpy.random.rand())
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    engine = colocated_from_model(
        model,
        tokenizer,
        max_model_len=MAX_MODEL_LEN,
        dtype="float32",
        max_num_seqs=64,
        gpu_memory_utilization=0.2,
        seeded=True,
    )
    drawn = (torch.rand(1).item(), random.random(), numpy.random.rand())
    PROCESS.update(
        threads=torch.get_num_threads() == threads, setter=torch.set_num_threads is setter, random=drawn == expected
    )
    yield engine, model
    engine.close()


@pytest.fixture
def engine(made):
    return made[0]


def test_starts_with_the_live_models_weights(made, prompts, sampling):
    engine, model = made
    settings = sampling(temperature=0.0)
    assert plain(engine.generate(prompts, settings, seed=0)) == greedy(model, prompts, settings)


def test_sleeps_between_calls_and_wakes_with_the_students_weights(engine, student, prompts, sampling):
    """vLLM's scheduler takes no request while it sleeps; without a GPU no memory goes back."""
    assert engine.sleeps and engine.asleep is False  # just woken, for the student's weights
    executor = engine.llm.llm_engine.engine_core.engine_core.model_executor
    settings = sampling(temperature=0.0)
    expected = greedy(student, prompts, settings)
    for _ in range(2):
        assert plain(engine.generate(prompts, settings, seed=0)) == expected
        assert engine.asleep and executor.is_sleeping
    take_steps(student)
    engine.update_weights(student)
    assert not executor.is_sleeping
    assert plain(engine.generate(prompts, settings, seed=0)) == greedy(student, prompts, settings) != expected


def test_a_tied_head_that_stays_old_is_found(engine, student, monkeypatch):
    """vLLM without a GPU, left to itself, keeps the packed copy of the old head."""
    monkeypatch.setattr(vllm_engine, "pack_heads", lambda model: None)
    take_steps(student, steps=10)
    with pytest.raises(RuntimeError, match="vLLM took the student's weights, but its log-probabilities of"):
        engine.update_weights(student)


def test_the_context_is_what_was_asked_for(engine):
    assert engine.max_model_len == MAX_MODEL_LEN < engine.llm.llm_engine.model_config.hf_config.max_position_embeddings


def test_leaves_the_process_as_it_was(made):
    assert PROCESS == {"threads": True, "setter": True, "random": True}


def test_sampling_does_not_draw_from_the_processs_generators(engine, prompts, sampling):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    engine.generate(prompts, sampling(), seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_one_seed_a_call_gives_one_sample(engine, student, prompts, sampling, monkeypatch):
    monkeypatch.setattr(engine, "seeded", False)
    first, again, other = (plain(engine.generate(prompts * 2, sampling(), seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert first[: len(prompts)] != first[len(prompts) :]  # a repeated prompt is drawn anew


def test_a_folder_without_a_model_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="vLLM cannot serve"):
        ColocatedVLLM(tmp_path, max_model_len=MAX_MODEL_LEN)


class TestColocated(EngineContract):
    pass
