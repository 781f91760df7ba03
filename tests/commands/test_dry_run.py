"""The dry run of the paper's three pairs, with their real dimensions, on the meta device."""

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from real_configs import CONFIGS, PARAMETERS
from rich.console import Console

from simct import SimCTConfig
from simct.commands.cli import RunArguments, main
from simct.commands.dry_run import changes_that_fit, describe, meta_model, numbers_of
from simct.commands.recipe import find_recipe, read_options
from simct.demo import ASSETS
from simct.training.memory import RESERVE, estimate, fits

PAIRS = ("qwen2.5-7b_gemma-2-2b", "qwen2.5-7b_phi-4-mini", "phi-4-mini_gemma-2-2b")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders as a hub gives them, without weights, and with the demo's small tokenizers: Gemma-like and byte-level."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        config.save_pretrained(root / name)
        source = ASSETS / ("student" if name.startswith("gemma") else "teacher")
        for file in "tokenizer.json", "tokenizer_config.json":
            shutil.copy(source / file, root / name / file)
    return root


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"How much is {i} + {i * i}? Write a Python function."}) for i in range(200)]
    path.write_text("\n".join(lines))
    return path


def arguments(pair: str, models, data, tmp_path, **changes):
    """What the command line makes of a recipe: the run, its configuration, and the recipe's options."""
    teacher, student = pair.split("_")
    recipe = read_options(find_recipe(f"{pair}/distil"))
    run = RunArguments(str(models / student), str(models / teacher), str(data))
    known = {field.name for field in dataclasses.fields(SimCTConfig) if field.init}
    options = {k: v for k, v in recipe.items() if k not in ("student", "teacher", "data")} | {
        "output_dir": str(tmp_path), "use_cpu": True, **changes,
    }  # fmt: skip
    config = SimCTConfig(**{k: v for k, v in options.items() if k in known})
    for key in set(options) - known:  # fields that are being added beside this test
        setattr(config, key, options[key])
    return run, config, recipe


def dry_run(run, config, recipe, **options) -> tuple:
    console = Console(file=io.StringIO(), width=400)
    result = describe(run, config, console, recipe=recipe, **options)
    return result, console.file.getvalue()


@pytest.mark.parametrize("pair", PAIRS)
def test_the_papers_pairs_fit_a_card_of_80_gb(pair, models, data, tmp_path):
    result, text = dry_run(*arguments(pair, models, data, tmp_path), assume_memory_gb=80)
    assert result.fits and result.changes == [] and "It fits:" in text, text
    teacher, student = pair.split("_")
    memory = result.memory
    assert 0 <= memory.student_weights - 4 * PARAMETERS[student] < 10_000  # buffers of rotary frequencies
    assert 0 <= memory.teacher_weights - 2 * PARAMETERS[teacher] < 10_000
    assert memory.gradients == 4 * PARAMETERS[student] and memory.rollout_copy == 2 * PARAMETERS[student]
    assert (result.steps, result.tokens_per_step) == (8, 64 * 4096)  # 200 prompts, 64 a step, twice
    for shown in (
        "Tokenizer pair",
        "SimCT by bytes",
        "student: optimiser states",
        "8 optimiser steps",
        "80.0 GB available",
    ):
        assert shown in text, shown
    assert memory.peak > 50e9  # 16 bytes a weight of the student and 2 of the teacher: no small thing


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("step", ["distil", "distil-public"])
def test_from_the_command_line(pair, step, models, data, tmp_path, capsys):
    teacher, student = pair.split("_")
    command = ["train", "--recipe", f"{pair}/{step}", "--dry-run", "--assume_memory_gb", "80", "--use_cpu"]
    command += ["--student", models / student, "--teacher", models / teacher, "--data", data, "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as end:
        main(list(map(str, command)))
    output = capsys.readouterr().out
    assert end.value.code == 0, output
    assert "It fits:" in " ".join(output.split())


@pytest.mark.slow
def test_a_real_tokenizer(models, data, tmp_path, qwen):
    """Qwen's own, of 151,665 tokens, in a folder of its own."""
    shutil.copytree(models / "qwen2.5-7b", tmp_path / "qwen")
    qwen.save_pretrained(tmp_path / "qwen")
    run, config, recipe = arguments(PAIRS[0], models, data, tmp_path)
    result, text = dry_run(
        dataclasses.replace(run, teacher=str(tmp_path / "qwen")), config, recipe, assume_memory_gb=80
    )
    row = next(line for line in text.splitlines() if "teacher qwen" in line)
    assert f"{len(qwen):,}" in row and "<|im_end|> (151645)" in row
    assert result.fits and "9,544 bytes" in text


def test_the_options_say_where_they_come_from(models, data, tmp_path):
    run, config, recipe = arguments(PAIRS[0], models, data, tmp_path, learning_rate=3e-6, hub_token="hf_secret")
    _, text = dry_run(run, config, recipe, assume_memory_gb=80)
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in text.splitlines()
            if line.count("│") == 5}  # fmt: skip
    assert rows["learning_rate"] == ["3e-06", "1e-06", "command line (recipe: 1e-06)"]
    assert rows["num_train_epochs"] == ["2", "3.0", "recipe"]
    assert rows["student"][2].startswith("command line (recipe: runs/")
    assert "temperature" not in rows, "it is the default"
    assert "hf_secret" not in text


def test_what_does_not_fit_is_said_with_what_would(models, data, tmp_path):
    given = arguments(PAIRS[0], models, data, tmp_path, gradient_checkpointing=False)
    result, text = dry_run(*given, assume_memory_gb=80)
    assert not result.fits and "It will NOT fit" in text
    assert "--gradient_checkpointing true" in result.changes
    assert f"It would fit with {' '.join(result.changes)}" in " ".join(text.split())
    result, text = dry_run(*given, assume_memory_gb=24)
    assert not result.fits and result.changes is None and "train an adapter (LoRA)" in text


def test_changes_do_what_they_promise(models, data, tmp_path):
    _, config, _ = arguments(PAIRS[1], models, data, tmp_path, gradient_checkpointing=False, optim="adamw_torch_fused")
    student = meta_model(str(models / "phi-4-mini"), "student", {"dtype": torch.float32})
    teacher = meta_model(str(models / "qwen2.5-7b"), "teacher", {"dtype": torch.bfloat16})
    numbers = numbers_of(config, student, 512, 98_863)
    assert numbers["batch_tokens"] == 8192 and numbers["rollout_dtype"] == torch.bfloat16
    changes = changes_that_fit(student, teacher, numbers, 80 * 10**9)
    assert "--optim adamw_bnb_8bit" in changes
    options = dict(change.removeprefix("--").split() for change in changes)
    for name, value in options.items():
        setattr(config, name, {"true": True}.get(value, int(value) if value.isdigit() else value))
    assert fits(estimate(student, teacher, **numbers_of(config, student, 512, 98_863)), 80 * 10**9)
    # None is idle: without any one of them it does not fit, or another one was needed for it.
    before = estimate(student, teacher, **numbers).peak
    assert before > 80e9 * (1 - RESERVE)


@pytest.mark.parametrize("said", [True, False])
def test_what_the_run_would_choose_is_told(said, models, data, tmp_path):
    """On the device that is assumed; the configuration stays as it was given."""
    own = dict(bf16=True, gradient_checkpointing=True, max_tokens_per_batch=8192) if said else {}
    open_options = dict(bf16=None, gradient_checkpointing=None, max_tokens_per_batch=None)
    run, config, recipe = arguments(PAIRS[0], models, data, tmp_path, **{**open_options, **own})
    result, text = dry_run(run, config, recipe, assume_memory_gb=80)
    line = "Chosen for a GPU of 80 GB, as the run does not say: bf16 true, gradient_checkpointing true, max_tokens_per_batch "
    assert (line in text) == (not said) and result.fits
    of_bf16 = next(row for row in text.splitlines() if row.startswith("│ bf16 "))
    assert "chosen by the device" not in of_bf16 if said else "chosen by the device" in of_bf16
    assert config.bf16 is said and config.max_tokens_per_batch == (8192 if said else None)
    assert result.memory.rollout_copy == 2 * PARAMETERS["gemma-2-2b"]  # of what computes in bfloat16


def test_an_adapter_on_a_small_card(models, data, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    given = arguments(PAIRS[0], models, data, tmp_path, max_new_tokens=1024, max_tokens_per_batch=2048, kv_cache_gb=4,
                      model_init_kwargs={"dtype": "bfloat16"})  # fmt: skip
    result, text = dry_run(*given, assume_memory_gb=32, peft_config=lora)
    trained = result.memory.gradients // 4  # PEFT keeps an adapter in float32
    layers, width, ours, theirs = 26, 2304, 8 * 256, 4 * 256
    assert trained == layers * 8 * ((width + ours) + (width + theirs))
    assert f"{trained:,} of the student's" in text and result.fits, text


@pytest.mark.parametrize("generations", [1, 4])
def test_numbers_of_a_configuration(generations, models, data, tmp_path):
    run, config, _ = arguments(
        PAIRS[0], models, data, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        max_new_tokens=100, num_generations=generations, max_tokens_per_batch=None, kv_cache_gb=None, bf16=False,
    )  # fmt: skip
    student = meta_model(run.student, "student", {"dtype": torch.float32})
    numbers = numbers_of(config, student, 20, 50)
    assert numbers["batch_tokens"] == 2 * generations * 120 and numbers["rollouts"] == 6 * generations
    assert numbers["compute_dtype"] is numbers["rollout_dtype"] is numbers["kv_cache_bytes"] is None
    config.max_tokens_per_batch = 60  # a sequence is never cut
    assert numbers_of(config, student, 20, 50)["batch_tokens"] == 120


@pytest.mark.parametrize(
    ("engine", "share", "least"), [("vllm", 0.3, 24e9), ("vllm", None, 2 * 2_614_341_888), ("vllm-server", None, 0)]
)
def test_a_vllm_in_the_process_counts_with_its_share(engine, share, least, models, data, tmp_path):
    options = dict(vllm_server_url="http://127.0.0.1:9", vllm_gpu_memory_utilization=share)
    given = arguments(PAIRS[0], models, data, tmp_path, rollout_engine=engine, **options)
    memory = dry_run(*given, assume_memory_gb=80)[0].memory
    assert least <= memory.vllm <= least * 1.2 and memory.kv_cache == memory.rollout_copy == 0


def test_prompts_that_leave_no_room_are_counted(models, data, tmp_path):
    run, config, recipe = arguments(PAIRS[0], models, data, tmp_path, max_new_tokens=8190)
    _, text = dry_run(run, config, recipe, assume_memory_gb=80)
    assert "200 of the first 200 prompts leave no room for 8,190 tokens in the student's context of 8,192" in text


def test_models_are_made_without_memory(models):
    model = meta_model(str(models / "gemma-2-2b"), "student", {"dtype": "bfloat16"})
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.dtype == torch.bfloat16


def test_bad_input(models, data, tmp_path):
    run, config, recipe = arguments(PAIRS[0], models, data, tmp_path)
    console = Console(file=io.StringIO())
    for change, message in (
        ({"student": str(tmp_path / "nowhere")}, "student .* has no configuration of a causal language model"),
        ({"teacher": str(tmp_path / "nowhere")}, "teacher .* has no configuration of a causal language model"),
        ({"data": str(tmp_path / "nowhere.jsonl")}, "data file .* does not exist"),
    ):
        changed = SimpleNamespace(**{**vars(run), **change})
        with pytest.raises(ValueError, match=message):
            describe(changed, config, console, assume_memory_gb=80)
    with pytest.raises(ValueError, match="assume_memory_gb is -1"):
        describe(run, config, console, assume_memory_gb=-1)


def test_a_served_teacher_takes_no_memory_but_its_rows(models, data, tmp_path):
    """Its folder needs a tokenizer alone, and nobody is asked at its address."""
    pair = PAIRS[0]
    run, config, recipe = arguments(pair, models, data, tmp_path, teacher_url="http://127.0.0.1:9", teacher_top_k=64)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(ASSETS / "teacher" / file, folder)
    run.teacher = str(folder)
    served, said = dry_run(run, config, recipe, assume_memory_gb=80)
    local, _ = dry_run(*arguments(pair, models, data, tmp_path), assume_memory_gb=80)
    memory, other = served.memory, local.memory
    assert memory.teacher_weights == memory.teacher_working == 0 < other.teacher_weights
    responses = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert memory.teacher_hidden == responses * config.max_new_tokens * (64 * 12 + 4)
    assert memory.student_weights == other.student_weights and memory.shared_rows == 0 < other.shared_rows
    assert (
        memory.loss > 4 * 256_000 * 2304
    )  # the head's gradient in float32: counted, more than a local teacher's loss holds
    assert "The teacher is served at http://127.0.0.1:9" in " ".join(said.split())
    config.objective = "bpm"
    with pytest.raises(ValueError, match="objective is 'bpm'"):
        dry_run(run, config, recipe)


def test_a_teacher_too_large_for_the_device_is_told_what_fits(models, data, tmp_path):
    given = arguments(PAIRS[0], models, data, tmp_path)
    _, text = dry_run(*given, assume_memory_gb=14)
    assert "The teacher's weights, 15 GB, do not fit this device whole" in text and '"device_map": "auto"' in text
    assert "do not fit this device whole" not in dry_run(*given, assume_memory_gb=80)[1]


def test_a_run_on_this_machines_cpu_says_so(models, data, tmp_path):
    given = arguments(PAIRS[0], models, data, tmp_path)
    assert "This is a run on this machine's CPU." in dry_run(*given)[1]
    assert "this machine's CPU" not in dry_run(*given, assume_memory_gb=80)[1]


def test_a_quantised_teacher_is_whole_in_each_process(models, data, tmp_path):
    """What cannot be moved is not shared out, whatever becomes of the student."""
    quantised = {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}
    given = arguments(PAIRS[0], models, data, tmp_path, fsdp=True, teacher_model_init_kwargs=quantised)
    result, text = dry_run(*given, assume_memory_gb=80, assume_processes=4)
    whole, _ = dry_run(*given, assume_memory_gb=80, assume_processes=1)
    assert result.memory.teacher_weights == whole.memory.teacher_weights
    assert result.memory.student_weights < whole.memory.student_weights and "The teacher of 4 processes" not in text
