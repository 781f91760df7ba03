"""Packed rows by PyTorch's own variable-length attention. Its kernel is a GPU's: here sequences one by one take its place."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import flash_attention_mask

from simct.models import hidden, varlen
from simct.models.hidden import Layout, PackedSequences, response_hidden_states

PROMPTS, RESPONSES = [[5, 6, 7], [8], [9, 10, 11, 12, 13]], [[20, 21], [22, 23, 24, 25], [30]]


def one_by_one(query, key, value, ends, scale, groups):
    """[T, heads, D]."""
    assert ends.dtype == torch.int32 and query.is_contiguous() and ends[-1] == len(query)
    found = []
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (each[begin:end].transpose(0, 1)[None] for each in (query, key, value))
        found.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups)[0])
    return torch.cat(found, 1).transpose(0, 1)


def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0) and max_q == max_k == cu_seq_q.diff().max() and enable_gqa
    return one_by_one(query, key, value, cu_seq_q, scale, True)


def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """As PyTorch 2.10 has it."""
    assert is_causal and query.shape == key.shape
    return one_by_one(query, key, value, cu_seq_q, None, False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()


@pytest.mark.parametrize("kernel", [new, old])
def test_a_frozen_model_of_16_bits_needs_no_mask_and_no_filling(model, monkeypatch, kernel):
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(hidden, "has_kernel", lambda *_: True)
    assert Layout.of(model) == Layout(packed=True), "with gradients its layers may be computed again, outside"
    layout = Layout.of(model, frozen=True)
    assert layout == Layout(packed=True, one_row=True, bounded=True, varlen=True)
    sequences = layout.build(PROMPTS, RESPONSES)
    assert sequences.input_ids.shape == (1, 4 + 4 + 5) and sequences.boundaries.tolist() == [0, 4, 8, 13]
    with torch.no_grad():
        found = response_hidden_states(model, sequences)
        padded = response_hidden_states(model, PackedSequences.build(PROMPTS, RESPONSES))
    torch.testing.assert_close(found, padded, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa", "it has its own attention back, to sample with"


def wrong(query, *_, window_size=None, scale=None, enable_gqa=None):
    return torch.zeros_like(query)


def missing(*_, window_size=None, scale=None, enable_gqa=None):
    raise NotImplementedError("no kernel for this head size")


@pytest.mark.parametrize("kernel", [wrong, missing])
def test_a_kernel_that_does_not_serve_the_model_is_not_used(model, monkeypatch, kernel):
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(hidden, "has_kernel", lambda *_: True)
    assert Layout.of(model, frozen=True) == Layout(packed=True)
    assert model.config._attn_implementation == "sdpa"


def test_it_is_tried_where_there_is_a_gpu_and_16_bits(model, gpu):
    assert not varlen.has_kernel(model)
    with gpu.fake:
        on_gpu = nn.Module.to(LlamaForCausalLM(model.config), "cuda")
    assert not varlen.has_kernel(on_gpu) and varlen.has_kernel(on_gpu.bfloat16())
    on_gpu.config._attn_implementation = "eager"
    assert not varlen.has_kernel(on_gpu)


@pytest.mark.parametrize(
    "options", [{"softcap": 50.0}, {"s_aux": torch.ones(1)}, {"dropout": 0.1}, {"cu_seq_lens_q": None}], ids=str
)
def test_what_the_kernel_does_not_compute_is_refused(options):
    tensors = [torch.ones(1, 2, 3, 8)] * 3
    ends = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    with pytest.raises(ValueError, match="variable-length attention"):
        varlen.attention(None, *tensors, None, **{**ends, **options})


def test_a_window_is_the_kernels_where_a_sequence_is_longer(monkeypatch):
    seen = []

    def kernel(query, *_, window_size, scale, enable_gqa):
        seen.append(window_size)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    tensors, ends = [torch.ones(1, 2, 6, 8)] * 3, torch.tensor([0, 6], dtype=torch.int32)
    for window in 4, 6, None:
        out, _ = varlen.attention(None, *tensors, None, sliding_window=window, cu_seq_lens_q=ends, max_length_q=6)
        assert out.shape == (1, 6, 2, 8)
    assert seen == [(3, 0), (-1, 0), (-1, 0)]
    monkeypatch.setattr(varlen, "varlen_attn", old)
    with pytest.raises(ValueError, match="has no window"):
        varlen.attention(None, *tensors, None, sliding_window=4, cu_seq_lens_q=ends, max_length_q=6)


def test_flash_attention_is_told_where_sequences_begin(model, monkeypatch):
    """transformers would find out in every layer, and wait for the device each time."""
    told = []

    def flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        told.append((cu_seq_lens_q, max_length_q))
        return query.transpose(1, 2), None

    AttentionInterface.register("flash_of_boundaries", flash)
    AttentionMaskInterface.register("flash_of_boundaries", flash_attention_mask)
    model.config._attn_implementation = "flash_of_boundaries"
    layout = Layout(packed=True, one_row=True, bounded=True)
    with torch.no_grad():
        response_hidden_states(model, layout.build(PROMPTS, RESPONSES))
    assert len(told) == 2 and all(ends.tolist() == [0, 4, 8, 13] and longest == 5 for ends, longest in told)


def test_a_batch_is_sent_without_waiting(monkeypatch):
    """By pinned memory: a plain copy would wait for all that the device has to do before."""
    sent = []
    monkeypatch.setattr(hidden, "to_device", lambda tensor, device: sent.append(tensor.shape) or tensor)
    sequences = Layout(packed=True, one_row=True, bounded=True).build(PROMPTS, RESPONSES)
    sequences.to("cuda")
    assert sent == [(1, 13), (1, 13), (7,), (4,)]


def test_attention_that_the_kernel_lacks_is_not_tried(monkeypatch):
    parameter = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    own = LlamaConfig(attn_implementation="sdpa")
    model = SimpleNamespace(parameters=lambda: iter([parameter]), config=own)
    monkeypatch.setattr(varlen, "varlen_attn", old)
    assert varlen.has_kernel(model)
    own.sliding_window = 16  # a probe of few tokens would not see it
    assert not varlen.has_kernel(model)
    monkeypatch.setattr(varlen, "varlen_attn", new)
    assert varlen.has_kernel(model)
    own.layer_types = ["chunked_attention"]
    assert not varlen.has_kernel(model)
