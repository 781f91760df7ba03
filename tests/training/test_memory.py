"""The estimates against what a step on this machine really holds."""

import io

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

from simct.demo import ASSETS
from simct.training.memory import (
    PARTS,
    PHASES,
    activation_bytes,
    device_memory,
    estimate,
    fits,
    kv_cache_bytes_of,
    memory_table,
    optimizer_bytes,
    weight_bytes,
)

SIZES = dict(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=1,
)
TINY = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
}
NUMBERS = dict(batch_tokens=512, prompt_tokens=32, response_tokens=96, rollouts=8)


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def meta_pair():
    return tuple(on_meta(AutoConfig.from_pretrained(ASSETS / side)).float() for side in ("student", "teacher"))


def test_weights_gradients_and_optimizer_are_exact(demo_student, demo_teacher, meta_pair):
    memory = estimate(*meta_pair, **NUMBERS)
    optimizer = torch.optim.AdamW(demo_student.parameters(), lr=1e-4, fused=True)
    demo_student(input_ids=torch.arange(20)[None]).logits.sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    assert memory.optimizer == sum(t.numel() * t.element_size() for t in states)
    assert memory.gradients == sum(p.grad.numel() * p.grad.element_size() for p in demo_student.parameters())
    for model, size in (demo_student, memory.student_weights), (demo_teacher, memory.teacher_weights):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())  # rotary frequencies are in no state dict
        assert size == sum(storages.values()) + buffers


def saved_bytes(model, rows: int, length: int, dtype: torch.dtype | None) -> int:
    """Storages that the decoder's forward keeps for its backward, without those of the model and of its weights' casts."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    matrices = {shape for p in model.parameters() if p.dim() == 2 for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        cast_weight = dtype is not None and tuple(tensor.shape) in matrices
        if tensor.untyped_storage().data_ptr() not in own and not cast_weight:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    ids = torch.randint(3, 400, (rows, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        model.train().get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


CASES = [(name, kind) for name in ("demo", *TINY) for kind in ("sdpa", "eager")]


@pytest.mark.parametrize(
    ("name", "attention"),
    [case for case in CASES if case not in (("demo", "sdpa"), ("gemma2", "sdpa"))],  # its soft-cap is not in SDPA
)
@pytest.mark.parametrize("mode", ["float32", "autocast", "checkpointing", "bfloat16"])
def test_activations_are_within_a_quarter(name, mode, attention):
    torch.manual_seed(0)
    if name == "demo":
        model = AutoModelForCausalLM.from_pretrained(ASSETS / "student", attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_config(TINY[name], attn_implementation=attention)
    model = model.bfloat16() if mode == "bfloat16" else model.float()
    dtype = torch.bfloat16 if mode == "autocast" else None
    checkpointing = mode == "checkpointing"
    if checkpointing:
        model.gradient_checkpointing_enable()
    measured = saved_bytes(model, 3, 96, dtype)
    estimated = activation_bytes(model, 3 * 96, 96, compute_dtype=dtype, checkpointing=checkpointing)
    assert measured / 1.25 < estimated < measured * 1.25, (measured, estimated)


def test_a_low_rank_adapter_counts_as_what_is_trained(meta_pair):
    peft = pytest.importorskip("peft")
    student = on_meta(AutoConfig.from_pretrained(ASSETS / "student")).float()
    whole = estimate(*meta_pair, **NUMBERS)
    with torch.device("meta"):
        adapted = peft.get_peft_model(student, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    memory = estimate(adapted, meta_pair[1], **NUMBERS)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained > 0 and memory.gradients == 4 * trained
    assert memory.student_weights == whole.student_weights + 4 * trained
    assert memory.loss < whole.loss  # a frozen head has no gradient


def test_kv_cache_against_a_real_one(demo_student):
    ids = torch.arange(3, 23)[None]
    cache = demo_student(input_ids=ids, use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    real = sum(t.numel() * t.element_size() for t in tensors)
    assert kv_cache_bytes_of(demo_student, 20, 4) == real


def test_sliding_windows_bound_the_cache():
    config = Gemma2Config(**SIZES, head_dim=16, sliding_window=32)
    model = on_meta(config)
    assert config.layer_types.count("sliding_attention") == 2
    assert kv_cache_bytes_of(model, 100, 2) == 2 * (2 * 32 + 2 * 100) * 2 * 16 * 2
    assert kv_cache_bytes_of(model, 20, 2) == 2 * 4 * 20 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch", 2 * 4 * 65_546 + 8),
        ("sgd", 0),
        ("adamw_bnb_8bit", 2 * (65_536 + 4 * 256) + 8 * 10),
        ("paged_adamw_8bit", 2 * (65_536 + 4 * 256) + 8 * 10),
        ("lion_8bit", 65_536 + 4 * 256 + 4 * 10),
        ("adafactor", 4 * (512 + 10)),
    ],
)
def test_optimizers_by_name(optim, expected):
    parameters = [torch.nn.Parameter(torch.empty(256, 256)), torch.nn.Parameter(torch.empty(10))]
    assert optimizer_bytes(parameters, optim) == expected


def test_bad_numbers_are_refused(meta_pair):
    with pytest.raises(ValueError, match="optim is 'galore_adamw': its memory is not known"):
        estimate(*meta_pair, **NUMBERS, optim="galore_adamw")
    with pytest.raises(ValueError, match="rollouts is 0: expected at least 1"):
        estimate(*meta_pair, **{**NUMBERS, "rollouts": 0})


def test_the_peak_is_the_largest_phase(meta_pair):
    memory = estimate(*meta_pair, **NUMBERS)
    assert memory.peak == max(memory.phase(phase) for phase in PHASES) == memory.phase(memory.peak_phase)
    away = estimate(*meta_pair, **NUMBERS, offload_teacher=True)
    head = weight_bytes(meta_pair[1].get_output_embeddings())
    assert (
        memory.phase("student") - away.phase("student") == memory.teacher_weights - head > 0
    )  # the loss reads the head
    assert memory.phase("teacher") == away.phase("teacher")
    more = estimate(*meta_pair, **{**NUMBERS, "rollouts": 10**6})
    assert more.peak_phase == "rollout" and more.kv_cache == memory.kv_cache * 10**6 // 8
    assert estimate(*meta_pair, **{**NUMBERS, "rollouts": 10**6}, kv_cache_bytes=12345).kv_cache == 12345


def test_a_vllm_takes_its_share_while_it_samples(meta_pair):
    plain = estimate(*meta_pair, **NUMBERS)
    beside, elsewhere = (estimate(*meta_pair, **NUMBERS, vllm_bytes=size) for size in (10**9, 0))
    assert plain.kv_cache > 0 == beside.kv_cache == elsewhere.kv_cache
    assert beside.phase("rollout") - elsewhere.phase("rollout") == 10**9
    assert beside.phase("student") == elsewhere.phase("student") == plain.phase("student")


def test_options_move_the_parts_that_they_should(meta_pair):
    plain = estimate(*meta_pair, **NUMBERS)
    checkpointed = estimate(*meta_pair, **NUMBERS, gradient_checkpointing=True)
    assert checkpointed.activations < plain.activations / 4 and checkpointed.working > plain.working
    cast = estimate(*meta_pair, **NUMBERS, compute_dtype=torch.bfloat16, rollout_dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in meta_pair[0].parameters())
    assert cast.rollout_copy == 2 * parameters and 0 < cast.cast_weights <= 2 * parameters
    assert plain.rollout_copy == plain.cast_weights == 0
    assert estimate(*meta_pair, **NUMBERS, chunk_rows=1).loss < plain.loss


def test_the_loss_of_each_objective(meta_pair):
    """At one chunk of all rows, what is held grows with the chunk by the matrices that were counted."""
    ours, theirs = (model.get_output_embeddings().weight for model in meta_pair)
    columns = max(len(ours), len(theirs))
    for objective, matrices in ("uld", 11), ("alm", 3), ("bpm", 7), ("escd", 7):
        one, nine = (estimate(*meta_pair, **NUMBERS, objective=objective, chunk_rows=n).loss for n in (1, 9))
        assert nine - one == 4 * matrices * 8 * columns
        assert one > 4 * ours.numel()  # the head's gradient in float32
    tables = [estimate(*meta_pair, **NUMBERS, objective=name, chunk_rows=1).loss for name in ("bpm", "alm")]
    assert tables[0] - tables[1] - 4 * 4 * columns == 50 * len(ours) + 160 * len(theirs)


def test_fits_and_its_table(meta_pair):
    memory = estimate(*meta_pair, **NUMBERS)
    assert fits(memory, "cpu") and device_memory("cpu") > 10**8
    assert not fits(memory, memory.peak) and fits(memory, 2 * memory.peak)
    with pytest.raises(ValueError, match="'meta' does not say how much memory"):
        fits(memory, "meta")
    console = Console(width=160, file=io.StringIO())
    console.print(memory_table(memory, 80 * 10**9))
    text = console.file.getvalue()
    shown = {part for part, name in PARTS.items() if name in text}
    assert shown == {part for part in PARTS if getattr(memory, part)} and "80.0 GB available" in text
    assert f"{memory.peak / 1e9:.2f}" in text


def test_weight_bytes_counts_a_tied_head_once(meta_pair):
    student = meta_pair[0]
    assert student.config.tie_word_embeddings
    untied = {id(p): p for p in student.parameters()}
    assert weight_bytes(student) == sum(4 * p.numel() for p in untied.values()) + sum(
        b.numel() * b.element_size() for b in student.buffers()
    )
