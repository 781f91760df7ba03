import copy
import warnings
from dataclasses import replace

import pytest
import torch
from packages import needs_continuous_batching
from torch.overrides import TorchFunctionMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from simct.data.prompts import render_prompt
from simct.rollouts import transformers_engines
from simct.rollouts.protocol import Response, Sampling
from simct.rollouts.transformers_engines import ContinuousBatching, StaticBatching, make_engine
from simct.rollouts.vllm_requests import to_response

CONTINUOUS = pytest.param("continuous", marks=needs_continuous_batching)
PROMPTS = ["The", "Return the", "This method is called", "If the", "A list of names that"]


@pytest.fixture
def prompts(demo_tokenizers):
    return [render_prompt(text, demo_tokenizers[0]) for text in PROMPTS]


def sampling(tokenizer, **options):
    return Sampling((tokenizer.eos_token_id,), tokenizer.pad_token_id, **{"max_new_tokens": 24, **options})


@pytest.mark.parametrize("engine", [CONTINUOUS, "static"])
def test_one_seed_gives_one_sample(engine, demo_student, demo_tokenizers, prompts):
    engine = make_engine(demo_student, engine)
    settings = sampling(demo_tokenizers[0])
    first = engine.generate(prompts, settings, seed=7)
    assert first == engine.generate(prompts, settings, seed=7)
    assert first != engine.generate(prompts, settings, seed=8)
    assert len(first) == len(prompts)


@needs_continuous_batching
def test_engines_agree_on_greedy_responses(demo_student, demo_tokenizers, prompts):
    settings = sampling(demo_tokenizers[0], temperature=0.0)
    static = StaticBatching(demo_student, batch_size=2).generate(prompts, settings, seed=0)
    continuous = ContinuousBatching(demo_student).generate(prompts, settings, seed=0)
    assert [replace(r, logprobs=None) for r in static] == [replace(r, logprobs=None) for r in continuous]


@pytest.mark.parametrize("engine", [CONTINUOUS, "static"])
def test_responses_end_with_the_end_of_turn_or_run_out_of_budget(engine, demo_student, demo_tokenizers, prompts):
    tokenizer = demo_tokenizers[0]
    comma = tokenizer.convert_tokens_to_ids(",")
    settings = Sampling((tokenizer.eos_token_id, comma), tokenizer.pad_token_id, max_new_tokens=16)
    responses = make_engine(demo_student, engine).generate(prompts * 4, settings, seed=1)
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for response in responses:
        ends = [token in settings.end_ids for token in response.token_ids]
        if response.finish_reason == "stop":
            assert ends[-1] and not any(ends[:-1])
        else:
            assert len(response.token_ids) == 16 and not any(ends)


def test_the_first_of_several_ends_cuts():
    settings = Sampling((5, 6), 0, max_new_tokens=9)
    assert settings.response([1, 6, 5, 0, 0]) == Response([1, 6], "stop")
    assert settings.response([1, 2]) == Response([1, 2], "length")
    assert settings.response([5]) == Response([5], "stop")


@pytest.mark.parametrize("engine", [CONTINUOUS, "static"])
def test_the_callers_mode_and_random_state_come_back(engine, demo_student, demo_tokenizers, prompts):
    demo_student.train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_engine(demo_student, engine).generate(prompts, sampling(demo_tokenizers[0]), seed=0)
    assert torch.equal(torch.rand(4), expected)
    assert demo_student.training


@pytest.mark.parametrize("engine", [CONTINUOUS, "static"])
def test_the_models_own_sampling_defaults_are_not_used(engine, demo_student, demo_tokenizers, prompts):
    engine = make_engine(demo_student, engine)
    plain = engine.generate(prompts, sampling(demo_tokenizers[0]), seed=7)
    demo_student.generation_config.update(repetition_penalty=1.7, min_p=0.4, min_new_tokens=20)
    own = demo_student.generation_config
    assert engine.generate(prompts, sampling(demo_tokenizers[0]), seed=7) == plain
    assert demo_student.generation_config is own


@needs_continuous_batching
def test_a_soft_cap_that_is_left_out_is_said(demo_student):
    with pytest.warns(UserWarning, match=r"without its attention soft cap \(50\)"):
        make_engine(demo_student, "continuous")


@needs_continuous_batching
@pytest.mark.parametrize(
    ("dtype", "flash", "cap", "expected"),
    [
        (torch.float32, True, 50.0, StaticBatching),
        (torch.bfloat16, False, 50.0, StaticBatching),
        (torch.bfloat16, True, 50.0, ContinuousBatching),
        (torch.bfloat16, False, None, ContinuousBatching),
    ],
)
def test_auto_takes_an_engine_that_keeps_the_soft_cap(demo_student, monkeypatch, dtype, flash, cap, expected):
    """On an accelerator: the model says that it is on one, and continuous batching's test of it is taken for passed."""
    model = demo_student.to(dtype)
    model.config.attn_logit_softcapping = cap
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(transformers_engines, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(ContinuousBatching, "generate", lambda *_, **__: [])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine = make_engine(model, "auto")
    assert type(engine) is expected
    said = [str(warning.message) for warning in told if "soft cap" in str(warning.message)]
    assert bool(said) == (expected is StaticBatching)
    assert all("using static batches" in text for text in said)
    # And where it is taken, whether it is as quick as it can be.
    slow = any("without CUDA graphs" in str(warning.message) for warning in told)
    assert slow == (expected is ContinuousBatching and not flash)


def test_a_model_that_continuous_batching_cannot_serve_is_refused():
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = GPTNeoXForCausalLM(config)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM cannot be sampled from by continuous batching"):
        make_engine(model, "continuous")
    assert isinstance(make_engine(model, "auto"), StaticBatching)


@needs_continuous_batching
def test_a_kept_cache_changes_no_sample(demo_student, demo_tokenizers, prompts):
    """The manager stays from call to call, whatever the seed, the settings and the weights of the next one."""
    fresh = copy.deepcopy(demo_student)  # a kept manager hangs on its model
    kept = ContinuousBatching(demo_student, kv_cache_gb=0.01)

    def check(seed, **options):
        settings = sampling(demo_tokenizers[0], max_new_tokens=12, **options)
        responses = kept.generate(prompts, settings, seed=seed)
        assert responses == ContinuousBatching(fresh).generate(prompts, settings, seed=seed)
        return responses

    try:
        first = check(7)
        assert check(8) != first
        check(7, temperature=0.5)
        with torch.no_grad():
            for parameter in (*demo_student.parameters(), *fresh.parameters()):
                parameter.mul_(1.05)
        assert check(7) != first  # of these weights, under the settings and the seed of the first call
    finally:
        demo_student.destroy_cached_continuous_batching_manager()


@needs_continuous_batching
def test_too_small_a_cache_is_named(demo_student, demo_tokenizers, prompts):
    with pytest.raises(ValueError, match="kv_cache_gb is 1e-06: expected room for two pages of 64 tokens"):
        ContinuousBatching(demo_student, kv_cache_gb=1e-6).generate(prompts, sampling(demo_tokenizers[0]), seed=0)


def test_static_batches_give_the_head_contiguous_rows(demo_student, demo_tokenizers, prompts):
    head, seen = demo_student.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    StaticBatching(demo_student).generate(prompts, sampling(demo_tokenizers[0]), seed=0)
    hook.remove()
    assert seen and all(seen)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("engine", [CONTINUOUS, "static"])
def test_no_prompts(engine, demo_student, demo_tokenizers):
    assert make_engine(demo_student, engine).generate([], sampling(demo_tokenizers[0]), seed=0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_ids": ()}, "end_ids is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"end_ids": (1,), "pad_id": 0, "max_new_tokens": 4, **options})


def test_an_unknown_engine_is_named(demo_student):
    with pytest.raises(ValueError, match="rollout_engine is 'vllm'"):
        make_engine(demo_student, "vllm")


@pytest.mark.parametrize(
    ("engine", "drawn"),
    [
        ("static", {"temperature": 0.6, "top_p": 0.9}),
        pytest.param("continuous", {}, marks=needs_continuous_batching),
        pytest.param("continuous", {"temperature": 0.0}, marks=needs_continuous_batching),
    ],
)
def test_logits_that_are_no_numbers_are_not_sampled_from(engine, drawn, demo_student, demo_tokenizers, prompts):
    engine = make_engine(demo_student, engine)
    with torch.no_grad():
        demo_student.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="logits are no finite numbers"):
        engine.generate(prompts, sampling(demo_tokenizers[0], max_new_tokens=2, **drawn), seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None])
def test_log_probabilities_of_a_server_that_are_no_numbers_are_no_sample(value):
    """vLLM's JSON has null for what is no number."""
    settings = Sampling((5,), 0, max_new_tokens=4)
    assert to_response([1, 2, 5], "stop", 5, [-0.5, -1.0, -0.1], settings).logprobs == [-0.5, -1.0, -0.1]
    with pytest.raises(FloatingPointError, match="token 1 of a sampled response has the log-probability"):
        to_response([1, 2, 5], "stop", 5, [-0.5, value, -0.1], settings)


class Reads(TorchFunctionMode):
    """How often lists are read from tensors, each time waiting for a GPU."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.tolist
        return function(*args, **(kwargs or {}))


def test_static_batches_are_read_at_once(demo_student, demo_tokenizers, prompts):
    """Not response by response."""
    settings, counted = sampling(demo_tokenizers[0], max_new_tokens=6), []
    for several in prompts[:1], prompts * 4:
        with Reads() as reads:
            StaticBatching(demo_student).generate(several, settings, seed=0)
        counted.append(reads.count)
    assert counted[0] == counted[1] >= 2
