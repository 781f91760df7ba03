"""In which precision a student is trained, and what cannot be trained at all."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from pretended_gpu import CUDA
from test_trainer import PROMPTS, STUDENT, TEACHER, config
from tiny import tiny_model, tiny_trainer, tokenizer
from torch.distributed.fsdp import MixedPrecisionPolicy

from simct import SimCTConfig, SimCTTrainer
from simct.training.checks import check_run
from simct.training.defaults import numbers_of
from simct.training.memory import estimate
from simct.training.placement import moved_share, settle_processes

STILL = "the student's weights are bfloat16"


@pytest.mark.parametrize("rate", [1e-6, 1e-4])
def test_the_share_of_weights_that_move_is_that_of_a_real_step(rate):
    torch.manual_seed(0)
    model = tiny_model(STUDENT).bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    told = moved_share(list(model.parameters()), rate)
    torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0).step()
    changed = sum(int((p != old).sum()) for p, old in zip(model.parameters(), before, strict=True))
    assert told == pytest.approx(changed / sum(p.numel() for p in before), rel=0.1)
    assert told < 0.02 if rate == 1e-6 else told > 0.1


def test_weights_that_would_stand_still_are_told_with_their_share(tmp_path):
    student = tiny_model(STUDENT).bfloat16()
    with pytest.warns(UserWarning, match=STILL) as told:
        tiny_trainer(tmp_path, student=student, learning_rate=1e-6)
    (message,) = (str(each.message) for each in told if STILL in str(each.message))
    share = float(re.search(r"moves ([\d.]+)% of them", message)[1]) / 100
    assert share == pytest.approx(moved_share(list(student.parameters()), 1e-6), abs=1e-3) and share < 0.03


@pytest.mark.parametrize("options", [{"learning_rate": 1e-6}, {"optim": "sgd"}], ids=str)
def test_float32_weights_and_updates_of_unknown_size_are_not(tmp_path, options):
    student = tiny_model(STUDENT)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=STILL)
        tiny_trainer(tmp_path, student=student.bfloat16() if "optim" in options else student, **options)


@pytest.mark.parametrize("by_launcher", [False, True])
def test_deepspeed_is_refused_before_any_work(tmp_path, monkeypatch, by_launcher):
    if by_launcher:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="deepspeed is .*: expected none.*--fsdp"):
        SimCTConfig(output_dir=str(tmp_path), use_cpu=True, **{} if by_launcher else {"deepspeed": "zero2.json"})


def test_a_teacher_without_weights_in_most_processes_is_refused(tmp_path, monkeypatch):
    """accelerate's configuration has it on by default: zeros would be a teacher that passes every check."""
    for name in "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING":
        monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading on: expected False"):
        tiny_trainer(tmp_path)


def test_the_frozen_weights_under_an_adapter_stay_in_their_own_16_bits(gpu, tmp_path):
    """They are on the device once: two bytes each, no float32 masters, no copy to sample from."""
    tiny_model(STUDENT).bfloat16().save_pretrained(tmp_path / "student")
    tokenizer(STUDENT).save_pretrained(tmp_path / "student")
    with gpu.fake:
        teacher = tiny_model(TEACHER)
    adapter = LoraConfig(target_modules=["q_proj"], r=2)
    arguments = config(tmp_path, bf16=True, backend="torch", rollout_engine="static")
    trainer = SimCTTrainer(
        str(tmp_path / "student"), teacher, arguments, PROMPTS, peft_config=adapter, teacher_processing_class=tokenizer(TEACHER),
    )  # fmt: skip
    kinds = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    assert trainer.engine.model is trainer.model.get_base_model()
    assert trainer.teacher.head.weight.device == CUDA
    own = sum(p.numel() * p.element_size() for model in (trainer.model, teacher) for p in model.parameters())
    assert own <= gpu.held() < 1.1 * own


def test_without_an_adapter_a_student_of_16_bits_has_float32_masters(tmp_path):
    tiny_model(STUDENT).bfloat16().save_pretrained(tmp_path / "student")
    student = tokenizer(STUDENT)
    student.save_pretrained(tmp_path / "student")
    trainer = tiny_trainer(tmp_path, student=str(tmp_path / "student"), bf16=True)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


# ---- Several processes ----


def test_what_accelerate_hands_to_ddp_and_fsdp(tmp_path):
    """Gradients once, no buffers sent around, a loss that is not rounded to 16 bits."""
    trainer = tiny_trainer(tmp_path)
    handler = trainer.accelerator.ddp_handler
    assert handler.gradient_as_bucket_view and handler.broadcast_buffers is False
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    accelerator = SimpleNamespace(ddp_handler=None, state=SimpleNamespace(fsdp_plugin=plugin))
    settle_processes(SimpleNamespace(accelerator=accelerator, args=trainer.args))
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, None)


def test_a_spread_teacher_has_the_other_gpus(tmp_path, monkeypatch):
    """Without a launcher transformers counts all of them, and would copy the student to each."""
    args = config(tmp_path, teacher_model_init_kwargs={"device_map": "auto"})
    args._n_gpu = 4
    check_run(args, PROMPTS, None)
    assert args.n_gpu == 1
    args = config(tmp_path)
    args._n_gpu = 4
    with pytest.raises(ValueError, match="4 GPUs in one process: expected one process for each"):
        check_run(args, PROMPTS, None)


def test_ddp_keeps_gradients_from_step_to_step():
    model = tiny_model(STUDENT)
    numbers = dict(batch_tokens=64, prompt_tokens=8, response_tokens=8, rollouts=4)
    one, two = (estimate(model, model, **numbers, processes=n) for n in (1, 2))
    sharded = estimate(model, model, **numbers, processes=2, shard_student=True)
    for phase in "rollout", "teacher":
        assert two.phase(phase) == one.phase(phase) + one.gradients
    assert two.phase("loss") == one.phase("loss") and not sharded.keeps_gradients


def test_teachers_of_unlike_kinds_are_counted(tmp_path):
    """What "auto" leaves open is counted as the costlier of the two."""
    model, args = tiny_model(STUDENT), config(tmp_path, objective="auto")
    assert numbers_of(args, model, 8, 64)["objective"] == "escd"
