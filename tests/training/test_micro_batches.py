import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretended_gpu import CUDA
from test_trainer import STUDENT
from tiny import tiny_model
from torch.overrides import TorchFunctionMode
from transformers import BloomConfig, BloomForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from simct.models import hidden
from simct.models.hidden import Layout, PackedSequences, first_fit, response_hidden_states
from simct.rollouts.protocol import Response
from simct.training.micro_batches import split
from simct.training.samples import Sample, Samples

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4]]
RESPONSES = [[20, 21], [22, 23, 24, 25], [30], [7, 8, 9]]


def sample(prompt=3, response=2, teacher="teacher"):
    return Sample([1] * prompt, [1], Response([2] * response, "length"), [2], teacher)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_first_fit_holds_each_once_within_the_capacity(sizes, capacity):
    bins = first_fit(sizes, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in members) <= capacity or len(members) == 1 for members in bins)
    # Of two bins that are not full, the second could not have been put into the first.
    assert sum(2 * sum(sizes[i] for i in members) <= capacity for members in bins) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from("ab")), max_size=20),
    st.integers(1, 60),
    st.booleans(),
)
def test_a_split_holds_each_sample_once_within_the_budget(shapes, budget, packed):
    samples = Samples(sample(*shape) for shape in shapes)
    parts = split(samples, Layout(packed), budget, "a")
    assert sorted(id(s) for part in parts for s in part.samples) == sorted(map(id, samples))
    for part in parts:
        assert {s.teacher for s in part.samples} <= {part.teacher}
        assert part.packed.input_ids.numel() <= budget or len(part.samples) <= 1
    assert parts  # a process without samples still takes part in a step


def test_packed_rows_equal_padded_ones(demo_student, demo_teacher):
    for model in demo_student, demo_teacher:
        padded = response_hidden_states(model, PackedSequences.build(PROMPTS, RESPONSES))
        for row_length in 1, 8, 1000:
            packed = PackedSequences.build(PROMPTS, RESPONSES, row_length=row_length)
            assert packed.tokens == sum(map(len, PROMPTS)) + sum(map(len, RESPONSES)) - len(PROMPTS)
            torch.testing.assert_close(response_hidden_states(model, packed), padded, rtol=1e-4, atol=1e-4)
        assert packed.input_ids.shape == (1, packed.tokens)  # nothing is filled up where all of it is one row


def test_packing_saves_the_padding():
    layout = Layout(packed=True)
    prompts, responses = [[1] * 2] * 9, [[2] * n for n in (99, 9, 9, 9, 9, 9, 9, 9, 30)]
    packed, padded = layout.build(prompts, responses), Layout().build(prompts, responses)
    assert padded.input_ids.numel() == 9 * 100
    assert packed.input_ids.shape == (3, 100) or packed.input_ids.shape == (2, 100)


def test_nothing_to_learn_is_one_token():
    empty = Layout(packed=True).build([], [])
    assert empty.input_ids.shape == (1, 1) and len(empty.rows) == 0 and empty.tokens == 0


def test_the_layout_is_found_by_trying(demo_student):
    assert Layout.of(demo_student) == Layout(packed=True)
    assert Layout.of(demo_student, "off") == Layout()
    sizes = dict(vocab_size=50, hidden_size=16, num_attention_heads=2)
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, num_hidden_layers=1, **sizes)).eval()
    assert Layout.of(neox).packed
    # ALiBi: position ids are not even read.
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_head=2, n_layer=2)).train()
    assert Layout.of(bloom) == Layout() and bloom.training
    try:
        Layout.of(bloom, "on")
        raise AssertionError("expected a refusal")
    except ValueError as error:
        assert "packing is 'on', but BloomForCausalLM cannot read packed sequences" in str(error)


class MaskBytes(TorchFunctionMode):
    """What attention is given as masks, each counted once a layer."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.calls += 1
            mask = (kwargs or {}).get("attn_mask")
            self.bytes += 0 if mask is None else mask.nbytes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("lengths", "rows", "masked"),
    [
        ([40, 39, 38, 40], 4, False),  # to share rows would save none
        ([40, 4, 4, 4, 4, 4, 4, 4, 4, 4], 2, True),  # eight of ten
    ],
)
def test_rows_are_shared_where_the_mask_costs_less_than_the_filling(lengths, rows, masked):
    """With attention by SDPA, as on a GPU without flash attention."""
    model = tiny_model(STUDENT).eval()
    responses = [[2] * (n // 2 + 1) for n in lengths]
    prompts = [[7] * (n - n // 2) for n in lengths]
    layout = Layout(packed=True, hidden_size=model.config.hidden_size)
    sequences = layout.build(prompts, responses)
    with torch.no_grad(), MaskBytes() as seen:
        found = response_hidden_states(model, sequences)
    assert sequences.input_ids.shape == (rows, 40) and seen.calls == model.config.num_hidden_layers
    assert seen.bytes == (rows * 40 * 40 if masked else 0)
    with torch.no_grad():
        alone = [
            response_hidden_states(model, PackedSequences.build([p], [r]))
            for p, r in zip(prompts, responses, strict=True)
        ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=20), st.integers(30, 200), st.integers(1, 200))
def test_a_split_stays_within_the_budget_however_rows_are_laid_out(lengths, budget, hidden_size):
    samples = Samples(sample(length - 1, 1) for length in lengths)
    parts = split(samples, Layout(packed=True, hidden_size=hidden_size), budget, "a")
    assert sorted(id(s) for part in parts for s in part.samples) == sorted(map(id, samples))
    assert all(part.packed.input_ids.numel() <= budget or len(part.samples) == 1 for part in parts)
    told = {part.packed.position_ids is None for part in parts}
    assert len(told) == 1 and all(part.packed.attention_mask is None for part in parts)


def test_a_model_on_a_gpu_is_laid_out_by_its_width(gpu, monkeypatch):
    monkeypatch.setattr(hidden, "_packing_problem", lambda *_: None)
    with gpu.fake:
        model = tiny_model(STUDENT).to(CUDA)
    assert model.config._attn_implementation == "sdpa"
    assert Layout.of(model) == Layout(packed=True, hidden_size=16)
    assert Layout.of(model, "off") == Layout(hidden_size=16) and Layout.of(model, "on") == Layout(packed=True)
    assert Layout.of(tiny_model(STUDENT)) == Layout(packed=True), "on a CPU as ever"
