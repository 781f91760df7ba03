"""A teacher whose layers are shared out, in a process that has all the shares, and one that comes a layer at a time."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import CUDA
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from simct import LocalTeacher
from simct.demo import ASSETS
from simct.teachers import offload
from simct.teachers.offload import Offloaded, pinned
from simct.teachers.sharded import layers_of
from simct.training.memory import estimate

PROMPTS, RESPONSES = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "teacher")


def model_of(kind: str, vocabulary: int):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=33, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    if kind == "untied":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=5.0))


@contextmanager
def alone():
    """The only process of a run."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_shared_teacher_gives_the_rows_of_a_whole_one(kind, offloaded, tokenizer):
    model = model_of(kind, len(tokenizer))
    whole, shared = LocalTeacher(copy.deepcopy(model), tokenizer), LocalTeacher(model, tokenizer)
    whole.place(torch.device("cpu"))
    with alone() as mesh:
        shared.place(torch.device("cpu"), offload=offloaded, mesh=mesh)
        rows, head = shared.rows(PROMPTS, RESPONSES)
        assert shared.rows([], [])[0].shape == (0, 16)  # the other processes may have some
        expected, own = whole.rows(PROMPTS, RESPONSES)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)
        torch.testing.assert_close(head.weight, own.weight, rtol=0, atol=0)
        sharded = {name for name, p in model.named_parameters() if hasattr(p, "to_local")}
        whole_names = {name for name, _ in model.named_parameters()} - sharded
        assert whole_names == ({"lm_head.weight"} if kind == "untied" else {"model.embed_tokens.weight"})
        assert head is shared.head and shared.layout == whole.layout


def test_what_has_no_memory_is_read_in_halves(tokenizer):
    """But not a shared one: the other processes would wait for the second try."""
    teacher = LocalTeacher(model_of("untied", len(tokenizer)), tokenizer)
    teacher.place(torch.device("cpu"))
    prompts, responses = [[1, 2], [3], [4, 5, 6]], [[7], [], [8, 9]]
    expected = teacher.hidden_states(prompts, responses)

    def limit(module, args, kwargs):
        if kwargs["input_ids"].numel() > 5:
            raise torch.OutOfMemoryError("tried to allocate too much")

    teacher.model.model.register_forward_pre_hook(limit, with_kwargs=True)
    with pytest.warns(UserWarning, match="out of memory with .* tokens of the teacher at once: in halves"):
        torch.testing.assert_close(teacher.hidden_states(prompts, responses), expected)
    with pytest.raises(RuntimeError, match="in a forward pass of the teacher: set max_tokens_per_batch to 3 or less"):
        teacher.hidden_states([[1] * 6], [[1]])
    teacher.sharded = True
    with pytest.raises(RuntimeError, match="in a forward pass of the teacher: set max_tokens_per_batch"):
        teacher.hidden_states(prompts, responses)


def test_only_the_layers_are_layers(tokenizer):
    model = model_of("tied", len(tokenizer))
    assert layers_of(model) == list(model.model.layers)
    model._no_split_modules = None
    assert layers_of(model) == list(model.model.layers)


def test_a_teacher_that_stays_is_not_shared(tokenizer):
    teacher = LocalTeacher(model_of("untied", len(tokenizer)), tokenizer)
    teacher.model.is_quantized = True
    with pytest.raises(
        ValueError, match="shard_teacher is True, but the teacher is quantised: its weights cannot be moved"
    ):
        teacher.place(torch.device("cpu"), mesh=SimpleNamespace())


def test_shares_add_up(tokenizer):
    """Of all processes together: each weight once, the head and the buffers in each, rows that do not divide filled up."""
    model = model_of("untied", len(tokenizer))
    numbers = dict(batch_tokens=64, prompt_tokens=8, response_tokens=8, rollouts=4)
    one, three = (
        estimate(model, model, **numbers, processes=n, shard_teacher=True, shard_student=True) for n in (1, 3)
    )
    head = model.lm_head.weight.nbytes
    filled = sum((-len(p) % 3) * p[0].nbytes for p in model.parameters() if p is not model.lm_head.weight)
    buffers = sum(b.nbytes for b in model.buffers())
    assert 3 * (three.teacher_weights - head - buffers) == one.teacher_weights - head - buffers + filled
    assert three.teacher_working > one.teacher_working and three.student_weights < one.student_weights
    assert one.gradients < 3 * three.gradients < one.gradients + 3 * 4 * filled + 3 * 4 * 16
    assert three.optimizer < one.optimizer / 2.5


# ---- Offloaded ----


class Streams:
    """In CUDA's place: what is put into which stream, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.inside: list = []

    def Stream(self, device):  # noqa: N802
        return SimpleNamespace(
            name="copies",
            wait_stream=lambda other: self.said.append(f"copies wait for {other.name}"),
            record_event=self.event,
        )

    def event(self):
        self.said.append(f"event of {self.inside[-1].name}")
        return SimpleNamespace(number=sum(line.startswith("event") for line in self.said) - 1)

    def current_stream(self, device=None):
        return SimpleNamespace(name="main", wait_event=lambda event: self.said.append(f"main waits for {event.number}"))

    @contextmanager
    def stream(self, stream):
        self.inside.append(stream)
        yield
        self.inside.pop()


def test_a_layer_runs_while_those_behind_it_are_copied(gpu, tokenizer, monkeypatch):
    streams = Streams()
    for name in "Stream", "current_stream", "stream":
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    monkeypatch.setattr(offload, "has_streams", lambda device: True)
    monkeypatch.setattr(offload, "pinned", lambda size, device: torch.empty(size, dtype=torch.uint8))
    with gpu.fake:
        model = model_of("untied", len(tokenizer)).to(CUDA)
    head = model.lm_head.weight
    held = Offloaded(model, CUDA, (head,))
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: streams.said.append("a layer"))
    ids = torch.tensor([[1, 2, 3]], device=CUDA)
    with torch.no_grad(), held.on_device():
        model.model(input_ids=ids, use_cache=False)
        model.model(input_ids=ids, use_cache=False)
    begun = ["copies wait for main", *["event of copies"] * 4, "main waits for 0"]
    first = [line for n in (1, 2, 3) for line in (f"main waits for {n}", "a layer")]
    assert streams.said == [*begun, *first, *["a layer"] * 3]
    # The memory of one that did not run is free after the phase: nothing may still write to it.
    streams.said.clear()
    with held.on_device():
        pass
    assert streams.said == [*begun, *(f"main waits for {n}" for n in (1, 2, 3))]


def test_nothing_is_left_where_memory_runs_out(gpu, tokenizer, monkeypatch):
    """Half of the layers are there by then: what tries again, with less, needs their room."""
    with gpu.fake:
        model = model_of("untied", len(tokenizer)).to(CUDA)
    held = Offloaded(model, CUDA)
    before, fetch, times = gpu.held(), offload.Piece.fetch, []

    def fail(self, stream):
        times.append(self)
        if len(times) == 3:
            raise torch.OutOfMemoryError("no room")
        fetch(self, stream)

    monkeypatch.setattr(offload.Piece, "fetch", fail)
    with pytest.raises(torch.OutOfMemoryError), held.on_device():
        raise AssertionError("it is not there")
    assert gpu.held() == before and {p.device.type for p in model.parameters()} == {"cpu"}
    with held.on_device():
        assert {p.device.type for p in model.parameters()} == {"cuda"}


class Runtime:
    """CUDA's, of which memory of this size is registered."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.registered = error, {}

    def cudaHostRegister(self, place, size, flags):  # noqa: N802
        self.registered[place] = size
        return self.error

    def cudaHostUnregister(self, place):  # noqa: N802
        del self.registered[place]


def test_pinned_memory_is_as_large_as_the_weights(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = pinned(5_000_000, CUDA)
    assert runtime.registered == {memory.data_ptr(): 5_000_000} and memory.untyped_storage().nbytes() == 5_000_000
    del memory
    assert not runtime.registered
    runtime.error = 2
    with pytest.warns(UserWarning, match="could not be pinned .CUDA error 2.: it will be copied slowly"):
        assert len(pinned(1000, CUDA)) == 1000


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_an_offloaded_model_is_the_same(kind, tokenizer):
    """Its weights, in one piece a layer, give what they gave; a tied head stays where it is."""
    model = model_of(kind, len(tokenizer)).eval()
    whole, head, ids = copy.deepcopy(model), model.get_output_embeddings().weight, torch.tensor([[1, 2, 3]])
    held = Offloaded(model, torch.device("cpu"), (head,))
    with torch.no_grad(), held.on_device(), held.on_device():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=0)
    assert model.get_output_embeddings().weight is head
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
        assert ours is head or ours.data_ptr() % 4 == 0 and not ours.requires_grad
    pieces = {p.untyped_storage().data_ptr() for p in model.parameters() if p is not head}
    assert len(pieces) == 4  # three layers, and the rest
