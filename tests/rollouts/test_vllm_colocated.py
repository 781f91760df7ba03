"""The vLLM in this process, without one: what it is made with, when it sleeps and wakes, who shares it."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from simct.data.prompts import render_prompt
from simct.rollouts import vllm_engine
from simct.rollouts.protocol import Sampling
from simct.rollouts.transformers_engines import StaticBatching
from simct.rollouts.vllm_engine import ColocatedVLLM, PromptGroup, colocated_from_model, memory_share
from simct.rollouts.vllm_requests import request_seed

MADE = []


class LLM:
    """As much of `vllm.LLM` as the engine uses, on a copy of the demo student. Asleep at level 2 its weights are gone."""

    model: torch.nn.Module

    def __init__(self, **options):
        MADE.append(self)
        self.options, self.calls, self.sleeping, self.takes_weights = options, [], set(), True
        self.drawn = []
        self.model = copy.deepcopy(LLM.model).eval()
        length = options.get("max_model_len", 512)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=length, dtype=torch.float32, get_vocab_size=lambda: 2048)
        )

    def reset_prefix_cache(self):
        pass

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.sleeping = {"weights", "kv_cache"}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()

    def wake_up(self, tags):
        self.calls.extend(f"wake {tag}" for tag in tags)
        self.sleeping -= set(tags)

    @torch.no_grad()
    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and "weights" not in self.sleeping
        self.calls.append("load")
        own = dict(self.model.named_parameters())
        for name, tensor in kwargs["weights_iterator"]:
            if self.takes_weights:
                own[name].copy_(tensor)

    def apply_model(self, function):
        pass

    def generate(self, requests, settings, use_tqdm):
        assert not self.sleeping
        self.calls.append(f"generate {len(requests)}")
        self.seeds = [setting.seed for setting in settings]
        self.drawn.append(torch.rand(1).item())
        one = settings[0]  # greedy
        sampling = Sampling(tuple(one.stop_token_ids), 0, one.max_tokens, one.temperature)
        outputs = []
        for found in StaticBatching(self.model).generate([r["prompt_token_ids"] for r in requests], sampling, seed=0):
            logprobs = [
                {token: SimpleNamespace(logprob=value)}
                for token, value in zip(found.token_ids, found.logprobs, strict=True)
            ]
            sample = SimpleNamespace(
                token_ids=found.token_ids, finish_reason=found.finish_reason, stop_reason=None, logprobs=logprobs
            )
            outputs.append(SimpleNamespace(outputs=[sample]))
        return outputs


@pytest.fixture
def vllm(monkeypatch, demo_student):
    """A stand-in for the library; gives the engines that are made."""
    MADE.clear()
    LLM.model = demo_student
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    )
    for name in "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS":
        monkeypatch.setenv(name, "0")  # put back afterwards
    for name in "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND":
        monkeypatch.setenv(name, "1")
    return MADE


@pytest.fixture
def settings(demo_tokenizers):
    tokenizer = demo_tokenizers[0]
    return Sampling((tokenizer.eos_token_id,), tokenizer.pad_token_id, max_new_tokens=6, temperature=0.0)


@pytest.fixture
def prompts(demo_tokenizers):
    return [render_prompt(text, demo_tokenizers[0]) for text in ("The", "Return the")]


def shift(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def test_it_sleeps_between_its_calls_and_wakes_with_the_students_weights(
    vllm, demo_student, demo_tokenizers, settings, prompts
):
    engine = colocated_from_model(demo_student, demo_tokenizers[0], max_model_len=64)
    plain = StaticBatching(demo_student)
    assert engine.generate(prompts, settings, seed=0) == plain.generate(prompts, settings, seed=0)
    assert vllm[0].calls == ["generate 2", "sleep 2"]
    vllm[0].calls.clear()
    shift(demo_student)
    engine.update_weights(demo_student)
    # Weights before the cache: while they are loaded, there is room for what is gathered of them.
    assert vllm[0].calls == ["wake weights", "load", "wake kv_cache", "generate 4"]
    assert engine.generate(prompts, settings, seed=0) == plain.generate(prompts, settings, seed=0)
    # A call without a change of weights finds them gone, and takes them again.
    assert engine.generate(prompts, settings, seed=0) == plain.generate(prompts, settings, seed=0)
    assert vllm[0].calls[-5:] == ["wake weights", "load", "wake kv_cache", "generate 2", "sleep 2"]


def test_it_sleeps_though_nothing_is_sampled(vllm, demo_student, demo_tokenizers, settings):
    """A step of the data's answers alone: the change of weights has woken it."""
    engine = colocated_from_model(demo_student, demo_tokenizers[0], sleep=True)
    engine.update_weights(demo_student)
    assert not engine.asleep
    assert engine.generate([], settings, seed=0) == [] and engine.asleep


def test_without_sleep_it_stays_awake(vllm, demo_student, demo_tokenizers, settings, prompts):
    engine = colocated_from_model(demo_student, demo_tokenizers[0], sleep=False)
    for _ in range(2):
        engine.generate(prompts, settings, seed=0)
    assert vllm[0].calls == ["generate 2"] * 2


def test_one_seed_is_for_a_whole_call(vllm, demo_student, demo_tokenizers, settings, prompts):
    engine = colocated_from_model(demo_student, demo_tokenizers[0], sleep=False)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for seed in (7, 7, 8):
        engine.generate(prompts, settings, seed=seed)
    drawn = vllm[0].drawn
    assert drawn[0] == drawn[1] != drawn[2]
    assert vllm[0].seeds == [None, None]  # with one of its own each would be drawn by the slower of vLLM's samplers
    assert torch.equal(torch.rand(1), expected), "the process's own draws go on as if nothing had been"
    engine.seeded = True
    engine.generate(prompts, settings, seed=8)
    assert vllm[0].seeds == [request_seed(8, 0), request_seed(8, 1)]


def test_an_engine_that_sleeps_without_a_student_says_what_is_missing(vllm, tmp_path, settings, prompts):
    engine = ColocatedVLLM(tmp_path, sleep=True)
    engine.generate(prompts, settings, seed=0)
    with pytest.raises(RuntimeError, match="vLLM sleeps, and its weights are gone: expected update_weights first"):
        engine.generate(prompts, settings, seed=0)


def test_weights_that_are_not_taken_end_the_run(vllm, demo_student, demo_tokenizers):
    engine = colocated_from_model(demo_student, demo_tokenizers[0], sleep=False)
    engine.update_weights(demo_student)
    vllm[0].takes_weights = False
    shift(demo_student)
    with pytest.raises(RuntimeError, match="vLLM took the student's weights, but its log-probabilities of"):
        engine.update_weights(demo_student)


def test_on_a_gpu_it_is_made_to_sleep_within_what_the_training_leaves(vllm, demo_student, demo_tokenizers, monkeypatch):
    free, total = 60 << 30, 80 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(vllm_engine.torch.random, "fork_rng", lambda devices: torch.no_grad())
    colocated_from_model(demo_student, demo_tokenizers[0], max_model_len=96)
    options = vllm[0].options
    assert options["enable_sleep_mode"] and options["max_model_len"] == 96 and not options["enforce_eager"]
    size = sum(p.numel() for p in demo_student.parameters())
    coming = 8 * size + 4 * size  # it waits on the CPU, and then there will be the moments
    assert options["gpu_memory_utilization"] == pytest.approx((free - coming - (2 << 30)) / total, rel=1e-9)
    colocated_from_model(demo_student, demo_tokenizers[0], shards=4, max_model_len=9)
    assert vllm[-1].options["max_model_len"] == 16  # what is compared after a change of weights
    assert vllm[-1].options["gpu_memory_utilization"] == pytest.approx((free - coming // 4 - (2 << 30)) / total)
    colocated_from_model(demo_student, demo_tokenizers[0], sleep=False, gpu_memory_utilization=0.4)
    assert "enable_sleep_mode" not in vllm[-1].options and vllm[-1].options["gpu_memory_utilization"] == 0.4


def test_the_memory_share_leaves_room_to_train():
    gib = 1 << 30
    assert memory_share(70 * gib, 80 * gib, 20 * gib, sleep=True) == pytest.approx(0.6)
    assert memory_share(70 * gib, 80 * gib, 20 * gib, sleep=False) == pytest.approx(0.3)
    assert memory_share(80 * gib, 80 * gib, 0, sleep=True) == 0.9
    with pytest.raises(
        ValueError, match=r"the training leaves 2.1 of 85.9 GB for it: expected a vLLM server on another"
    ):
        memory_share(24 * gib, 80 * gib, 20 * gib, sleep=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_share_an_engine_ask_for_all_prompts_and_keep_their_own(monkeypatch, rank):
    parts = [([[1], [2]], 11), ([[3]], 12)]

    def all_gather_object(found, mine, group):
        assert mine == parts[rank] and group == "a group"
        found[:] = parts

    distributed = SimpleNamespace(
        new_subgroups=lambda size: ("a group", None), get_rank=lambda group: rank, all_gather_object=all_gather_object
    )
    monkeypatch.setattr(torch, "distributed", distributed)
    group = PromptGroup(2)
    assert group.gather(*parts[rank]) == ([[1], [2], [3]], 11)
    assert group.own(["a", "b", "c"]) == [["a", "b"], ["c"]][rank]


def test_a_tensor_parallel_size_that_does_not_divide_the_processes_is_named(tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel_size is 2: expected a divisor of 1, the training processes"):
        ColocatedVLLM(tmp_path, tensor_parallel_size=2)


def test_a_prompt_longer_than_those_of_the_data_names_the_option(vllm, demo_student, demo_tokenizers, settings):
    engine = colocated_from_model(demo_student, demo_tokenizers[0], max_model_len=20)
    with pytest.raises(ValueError, match=r"that is 26: .* max_model_len, 20 .*vllm_kwargs=\{'max_model_len': 26\}"):
        engine.generate([[5] * 20], settings, seed=0)


def test_a_context_that_nobody_gave_is_told_with_the_refusal(vllm, monkeypatch, tmp_path):
    """That of a model may take more keys and values than there is room for."""

    def refuse(self, **_):
        raise ValueError("a request of 131072 tokens needs 16 GiB")

    monkeypatch.setattr(LLM, "__init__", refuse)
    with pytest.raises(ValueError, match=r"\(max_model_len is not given: the model's whole context is\): a request"):
        ColocatedVLLM(tmp_path)
    with pytest.raises(ValueError, match=r"': a request of 131072"):
        ColocatedVLLM(tmp_path, max_model_len=64)


def attention_in_16_bits(module, query, key, value, attention_mask, **kwargs):
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


def test_a_float32_student_with_flash_attention_is_compared_in_16_bits(vllm, demo_student, demo_tokenizers):
    """Before the Trainer has put autocast around its forward: an evaluation before the training."""
    AttentionInterface.register("flash_in_16_bits", attention_in_16_bits)
    AttentionMaskInterface.register("flash_in_16_bits", eager_mask)
    engine = colocated_from_model(demo_student, demo_tokenizers[0], max_model_len=64, dtype="bfloat16")
    engine.dtype = "torch.bfloat16"
    demo_student.config._attn_implementation = "flash_in_16_bits"
    engine.update_weights(demo_student)
    assert vllm[0].calls[-1] == "generate 4"
