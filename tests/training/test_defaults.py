"""What a run on a GPU does where nobody says: its precision, and how its passes are cut. With devices of 24, 80 and 141 GB."""

import pytest
import torch
from pretended_gpu import load_guard, pretended_gpu
from real_configs import GEMMA_2_2B, QWEN_2_5_7B
from test_trainer import PROMPTS, STUDENT, TEACHER, config
from tiny import tiny_model, tokenizer
from transformers import AutoModelForCausalLM, TrainingArguments

from simct import SimCTConfig, SimCTTrainer
from simct.training import defaults
from simct.training.defaults import PASSES, choose, numbers_of
from simct.training.memory import RESERVE, estimate

PROMPT, SHARED = 500, 97_675
GB = 10**9


@pytest.fixture(scope="module")
def pair():
    """Gemma-2-2B, of float32 master weights, and Qwen2.5-7B: on the meta device."""
    with torch.device("meta"):
        return tuple(
            AutoModelForCausalLM.from_config(each, dtype=dtype)
            for each, dtype in ((GEMMA_2_2B, torch.float32), (QWEN_2_5_7B, torch.bfloat16))
        )


def run_of(tmp_path, **options):
    options = {
        "per_device_train_batch_size": 64,
        "max_new_tokens": 1500,
        "offload_teacher": True,
        "bf16": True,
        **options,
    }
    return config(tmp_path, **options)


def fits(run, pair, available, **changes):
    memory = estimate(*pair, **{**numbers_of(run, pair[0], PROMPT, SHARED, available=available), **changes})
    return max(memory.phase(name) for name in PASSES) <= available * (1 - RESERVE)


def test_a_card_of_80_gb_takes_passes_that_fit_and_no_smaller_ones(tmp_path, pair):
    run = run_of(tmp_path)
    line = choose(run, *pair, PROMPT, SHARED, 80 * GB)
    assert f"gradient_checkpointing {str(run.gradient_checkpointing).lower()}" in line
    assert f"max_tokens_per_batch {run.max_tokens_per_batch}" in line and "GPU of 80 GB" in line and "bf16" not in line
    assert 2000 <= run.max_tokens_per_batch < 64 * 2000
    assert fits(run, pair, 80 * GB) and not fits(run, pair, 80 * GB, batch_tokens=2 * run.max_tokens_per_batch)
    # Activations are made again only where passes of a good size would not fit otherwise.
    enough = {"gradient_checkpointing": False, "batch_tokens": defaults.ENOUGH}
    assert run.gradient_checkpointing and not fits(run, pair, 80 * GB, **enough)


def test_more_memory_is_used(tmp_path, pair):
    small, large = run_of(tmp_path), run_of(tmp_path)
    choose(small, *pair, PROMPT, SHARED, 80 * GB)
    choose(large, *pair, PROMPT, SHARED, 141 * GB)
    assert fits(large, pair, 141 * GB)
    assert (not large.gradient_checkpointing, large.max_tokens_per_batch or 64 * 2000) > (
        not small.gradient_checkpointing, small.max_tokens_per_batch,
    )  # fmt: skip


def test_where_nothing_fits_it_is_the_least(tmp_path, pair):
    """A card of 24 GB has no room for the student's optimiser: the dry run says so, and the run tries."""
    run = run_of(tmp_path)
    choose(run, *pair, PROMPT, SHARED, 24 * GB)
    assert run.gradient_checkpointing and run.max_tokens_per_batch == PROMPT + 1500
    assert not fits(run, pair, 24 * GB)


@pytest.mark.parametrize(
    "said",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "max_tokens_per_batch": 3000},
        {"max_tokens_per_batch": 4096, "bf16": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("gigabytes", [24, 80, 141])
def test_what_is_said_stays(tmp_path, pair, said, gigabytes):
    run = run_of(tmp_path, **said)
    line = choose(run, *pair, PROMPT, SHARED, gigabytes * GB)
    assert {name: getattr(run, name) for name in said} == said
    assert not [name for name in said if f"{name} " in line]
    assert bool(line) == (set(said) < {"gradient_checkpointing", "max_tokens_per_batch", "bf16"}) or len(said) == 2


def test_a_small_run_needs_neither(tmp_path):
    models = tiny_model(STUDENT), tiny_model(TEACHER)
    run = run_of(tmp_path, per_device_train_batch_size=2, max_new_tokens=8, offload_teacher=False)
    choose(run, *models, 20, 100, 24 * GB)
    assert (run.gradient_checkpointing, run.max_tokens_per_batch) == (False, None)


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"bf16": False}, True, False),
        ({"fp16": True}, True, False),
        ({"use_cpu": True}, True, False),
    ],
    ids=str,
)
def test_a_gpu_that_has_bfloat16_computes_in_it(tmp_path, monkeypatch, options, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it looks for the device
    assert SimCTConfig(str(tmp_path), **options).bf16 is expected


def test_a_cpu_is_as_ever(tmp_path, capsys):
    run = config(tmp_path)
    assert run.bf16 is False and run.unsaid == {"bf16", "gradient_checkpointing"}
    defaults.settle(run, tiny_model(STUDENT), {}, 10)
    assert not run.gradient_checkpointing and run.max_tokens_per_batch is None and capsys.readouterr().out == ""


def test_a_run_begins_with_what_was_chosen(request, tmp_path, capsys):
    """For a device so small that not all of the batch goes through at once."""
    load_guard(request.config.cache.mkdir("pretended-gpu"))
    with pretended_gpu(SimCTConfig, memory=12 * 10**6):
        options = dict(
            per_device_train_batch_size=16, max_new_tokens=40, backend="torch", rollout_engine="static", packing="off"
        )
        trainer = SimCTTrainer(
            tiny_model(STUDENT), tiny_model(TEACHER), config(tmp_path, **options), PROMPTS,
            processing_class=tokenizer(STUDENT), teacher_processing_class=tokenizer(TEACHER),
        )  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    budget = trainer.args.max_tokens_per_batch
    assert f"as the run does not say: bf16 false, gradient_checkpointing true, max_tokens_per_batch {budget}" in out
    assert trainer.args.gradient_checkpointing and 50 <= budget < 16 * 80


def test_what_fsdp_makes_anew_is_said(tmp_path, monkeypatch):
    """Beside FSDP's own checkpointing the Trainer refuses its one: it is not to be chosen."""
    said = config(tmp_path, fsdp_config={"activation_checkpointing": True})
    assert said.fsdp_checkpoints and "gradient_checkpointing" not in said.unsaid
    numbers = defaults.numbers_of(said, tiny_model(STUDENT), 10, 50)
    assert numbers["gradient_checkpointing"]
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert config(tmp_path).fsdp_checkpoints
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "false")
    assert not config(tmp_path).fsdp_checkpoints


def test_what_was_set_since_stays(tmp_path):
    run = config(tmp_path)
    run.gradient_checkpointing = True
    student = tiny_model(STUDENT)
    numbers = defaults.numbers_of(run, student, 10, 50)
    assert "gradient_checkpointing" not in defaults.fitting_passes(run, student, None, numbers, int(80e9))
