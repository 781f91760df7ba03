"""Where models, copies and checks are, on a GPU that is pretended."""

import gc

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from packages import needs_continuous_batching
from pretended_gpu import CUDA
from test_trainer import PROMPTS, STUDENT, TEACHER, config
from tiny import tiny_model, tokenizer
from transformers import AttentionInterface, AttentionMaskInterface, Trainer
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.masking_utils import flash_attention_mask

from simct import LocalTeacher, SimCTTrainer
from simct.models import hidden
from simct.models.hidden import Layout
from simct.rollouts.transformers_engines import attention_of_any_shape
from simct.teachers import local
from simct.training.evaluation import score

ran: list[tuple[torch.device, torch.dtype]] = []


def flash(module, query, key, value, attention_mask, **kwargs):
    """As flash-attn behind transformers: on a GPU and in 16 bits alone, those of autocast if it is on."""
    if query.device.type == "cpu":
        raise NotImplementedError(
            "Could not run 'flash_attn::_flash_attn_forward' with arguments from the 'CPU' backend"
        )
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        query = query.to(torch.get_autocast_dtype("cuda"))
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    ran.append((query.device, query.dtype))
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register("flash_of_this_test", flash)
AttentionMaskInterface.register("flash_of_this_test", flash_attention_mask)


@pytest.fixture(autouse=True)
def nothing_ran():
    ran.clear()


class SendInputs(ModelHook):
    """As `device_map` leaves a module: its inputs follow it. (accelerate's own hook moves weights in a way that knows no fake.)"""

    def __init__(self, device):
        self.device = device

    def pre_forward(self, module, *args, **kwargs):
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)


def trainer_on(gpu, tmp_path, student=None, teacher=None, **options):
    options = {"backend": "torch", "rollout_engine": "static", **options}
    models = [
        given if given is not None else tiny_model(name) for given, name in ((student, STUDENT), (teacher, TEACHER))
    ]
    return SimCTTrainer(
        *models, config(tmp_path, **options), PROMPTS,
        processing_class=tokenizer(STUDENT), teacher_processing_class=tokenizer(TEACHER),
    )  # fmt: skip


def with_flash(gpu, name, dtype=torch.float32):
    with gpu.fake:
        model = tiny_model(name).to(dtype)
    model.config._attn_implementation = "flash_of_this_test"
    return model


def devices(model):
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def test_models_with_flash_attention_are_checked_where_they_run(gpu, tmp_path):
    """A float32 student runs it under autocast only: without, it would be told to have no packed sequences."""
    student, teacher = with_flash(gpu, STUDENT), with_flash(gpu, TEACHER, torch.bfloat16)
    trainer = trainer_on(gpu, tmp_path, student, teacher, bf16=True, packing="on")
    assert devices(trainer.model) == devices(trainer.teacher.model) == {CUDA}
    assert trainer.layout == trainer.teacher.layout == Layout(packed=True, one_row=True, bounded=True)
    assert set(ran) == {(CUDA, torch.bfloat16)} and len(ran) >= 2 * (2 + 3)  # the head's two forwards, three of packing


def test_a_student_to_be_sharded_is_checked_though_flash_attention_has_no_cpu_kernel(tmp_path):
    model = tiny_model(STUDENT)
    model.config._attn_implementation = "flash_of_this_test"
    assert Layout.of(model, "on") == Layout(packed=True, one_row=True, bounded=True)
    LocalTeacher(model, tokenizer(STUDENT)).head  # noqa: B018
    assert model.config._attn_implementation == "flash_of_this_test" and not ran


@pytest.mark.parametrize("bf16", [True, False])
def test_samples_of_a_sharded_student_come_from_the_gpu(gpu, tmp_path, monkeypatch, bf16):
    """FSDP leaves the student in main memory until training begins."""
    original = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        original(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    trainer = trainer_on(gpu, tmp_path, bf16=bf16)
    assert devices(trainer.model) == {torch.device("cpu")}
    copy = trainer.engine.engine.model
    assert devices(copy) == {CUDA} and copy.dtype == (torch.bfloat16 if bf16 else torch.float32)
    trainer.engine.update_weights(trainer.model)
    assert devices(copy) == {CUDA}


def test_a_teacher_spread_over_devices_stays_where_it_is(gpu, tmp_path):
    second = torch.device("cuda", 1)
    with gpu.fake:
        teacher = tiny_model(TEACHER)
    places = dict.fromkeys(("model.layers.0", "model.norm", "lm_head"), second)
    teacher.hf_device_map = places | dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), CUDA)
    for name, device in teacher.hf_device_map.items():
        add_hook_to_module(teacher.get_submodule(name).to(device), SendInputs(device))
    trainer = trainer_on(gpu, tmp_path, teacher=teacher)
    assert devices(teacher) == {CUDA, second}
    hidden, head = trainer.teacher.rows([[1, 2]], [[3, 4, 5]])
    assert hidden.device == head.weight.device == CUDA
    assert teacher.lm_head.weight.device == second and trainer.teacher.layout.packed
    with pytest.raises(ValueError, match="offload_teacher is True, but the teacher is spread over devices"):
        trainer.teacher.place(CUDA, offload=True)


def test_an_offloaded_teacher_goes_one_way(gpu, tmp_path):
    """Its frozen weights are in main memory all the time: leaving the device moves nothing. The head stays, for the loss."""
    trainer = trainer_on(gpu, tmp_path, offload_teacher=True)
    teacher = trainer.teacher
    head = teacher.head.weight

    def away():
        return {p.device.type for p in teacher.model.parameters() if p is not head}

    before, waits = gpu.held(), len(gpu.waits)
    assert head.device == CUDA and away() == {"cpu"}
    with teacher.on_device(), teacher.on_device():
        assert devices(teacher.model) == {CUDA}
        hidden, _ = teacher.rows([[1, 2]], [[3, 4, 5]])
        assert hidden.device == CUDA
    del hidden
    assert away() == {"cpu"} and gpu.held() == before and len(gpu.waits) == waits


def test_a_share_in_main_memory_is_read_as_the_device_can(gpu, monkeypatch):
    """Its layers come to the device: what that has kernels for decides, not where the weights wait."""
    monkeypatch.setattr(local, "shard", lambda *_, **__: None)
    monkeypatch.setattr(hidden, "_packing_problem", lambda *_: None)
    monkeypatch.setattr(local, "check_head", lambda *_: None)
    asked = []
    monkeypatch.setattr(local, "response_hidden_states", lambda _, sequences: asked.append(sequences) or sequences.rows)
    teacher = LocalTeacher(tiny_model(TEACHER).bfloat16(), tokenizer(TEACHER))
    teacher.place(CUDA, offload=True, mesh=object())
    assert devices(teacher.model) == {torch.device("cpu")} and teacher.layout.varlen
    teacher.rows([[1, 2]], [[3]])
    assert asked[0].varlen and asked[0].input_ids.device == CUDA


def test_an_evaluation_fetches_an_offloaded_teacher_once(tmp_path, monkeypatch):
    trainer = trainer_on(None, tmp_path, per_device_eval_batch_size=2)
    entered, original = [], LocalTeacher.on_device
    monkeypatch.setattr(LocalTeacher, "on_device", lambda self: entered.append(self) or original(self))
    score(trainer, trainer.draw(PROMPTS[:6]))
    assert entered == [trainer.teacher]


@needs_continuous_batching
@pytest.mark.parametrize("copied", [False, True])
def test_the_cache_of_keys_and_values_is_free_while_teacher_and_student_run(tmp_path, monkeypatch, copied):
    """It is sized by kv_cache_gb, and no part of what the dry run counts for those phases. On a CPU: the engine is a real one."""
    options = dict(rollout_engine="continuous", kv_cache_gb=0.02, max_new_tokens=4, max_steps=1)
    options |= dict(rollout_dtype="bfloat16") if copied else {}
    trainer = trainer_on(None, tmp_path, **options)
    held = {}

    def look(name, function):
        def looked(*args, **kwargs):
            caches = [found for found in gc.get_objects() if isinstance(found, PagedAttentionCache)]
            held.setdefault(name, len(caches))
            return function(*args, **kwargs)

        return looked

    monkeypatch.setattr(trainer, "_score", look("teacher", trainer._score))
    monkeypatch.setattr(trainer, "training_step", look("student", trainer.training_step))
    gc.collect()
    trainer.train()
    assert held == {"teacher": 0, "student": 0}


def test_no_attention_that_plans_for_each_shape(gpu, tmp_path):
    """cuDNN's, which PyTorch prefers on an H100: every micro-batch, and every sampled token, has a shape of its own."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        attention_of_any_shape(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        trainer_on(gpu, tmp_path, packing="off")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("options", [{}, {"bf16_full_eval": True, "bf16": True}], ids=str)
def test_the_engine_is_made_of_a_student_in_its_place(gpu, tmp_path, options):
    trainer = trainer_on(gpu, tmp_path, **options)
    assert devices(trainer.engine.model) == devices(trainer.model) == {CUDA}
