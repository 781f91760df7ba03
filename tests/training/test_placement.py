"""In which precision a student is trained, and what cannot be trained at all."""

import re
import warnings

import pytest
import torch
from peft import LoraConfig
from pretended_gpu import CUDA
from test_trainer import PROMPTS, STUDENT, TEACHER, config
from tiny import tiny_model, tiny_trainer, tokenizer

from simct import SimCTConfig, SimCTTrainer
from simct.training.placement import moved_share

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
