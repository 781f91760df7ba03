"""The command line, end to end."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import console
from simct.commands.cli import main
from simct.commands.train import quiet_libraries
from simct.data import records
from simct.demo import ASSETS

STUDENT, TEACHER = str(ASSETS / "student"), str(ASSETS / "teacher")
SMALL = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "4",
    "--max_new_tokens",
    "12",
    "--use_cpu",
    "--disable_tqdm",
    "true",
]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    for stream in console.console, console.errors:  # made at import; a dumb terminal does not ask for COLUMNS again
        monkeypatch.setattr(stream, "_width", 160)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def simct(capsys):
    def run(*arguments, code: int = 0, ends: bool = False) -> str:
        if code or ends:
            with pytest.raises(SystemExit) as end:
                main([str(word) for word in arguments])
            assert end.value.code == code
        else:
            main([str(word) for word in arguments])
        output = capsys.readouterr()
        return output.out + output.err

    return run


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text((ASSETS / "train.jsonl").read_text())
    return path


def improvement(printed):
    """The demo's result, and by how many standard errors the student is nearer to the teacher than before (negative: nearer)."""
    result = next(line for line in printed.splitlines() if "sequence reverse KL, nats per byte" in line)
    return result, float(result.split("(")[1].split(" standard errors")[0])


@pytest.mark.usefixtures("pictures")
def test_a_short_demo(simct, tmp_path, monkeypatch):
    """All that it shows and writes, with few held-out prompts. What it does for the student: `test_the_demo_repeats_itself`."""
    read = records.read_prompts
    monkeypatch.setattr(records, "read_prompts", lambda path: read(path)[: 4 if path.name == "eval.jsonl" else None])
    output = simct("demo", "--steps", 2, "--output", "one")
    _, change = improvement(output)
    assert change != 0 and "SimCT by bytes" in output and "Distilling: 2 steps of 32" in output
    assert (tmp_path / "one" / "curves.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one" / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "student")
    assert len(tokenizer) == student.config.vocab_size
    untrained = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=student.dtype).state_dict()
    assert any(not torch.equal(weight, untrained[name]) for name, weight in student.state_dict().items())


@pytest.mark.slow
def test_the_demo_repeats_itself(tmp_path):
    runs = []
    for folder in "one", "two":  # in processes of their own, as a user would
        command = [sys.executable, "-m", "simct.commands.cli", "demo", "--steps", "20", "--output", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(done.stdout)
    first, second = runs
    result, change = improvement(first)
    assert result in second
    assert change < -2, result
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / folder / "student") for folder in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_demo_needs_steps_and_a_folder_to_write_to(simct, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "--steps is 0" in simct("demo", "--steps", 0, code=2)
    assert "cannot be written" in simct("demo", "--output", "file/demo", code=2)


@pytest.mark.usefixtures("pictures")
def test_train_with_held_out_prompts(simct, tmp_path, data):
    output = simct(
        "train", "--student", STUDENT, "--teacher", TEACHER, "--data", data, "--output_dir", tmp_path / "run",
        "--eval_prompts", 8, "--logging_steps", 1, "--save_strategy", "no", *SMALL,
    )  # fmt: skip
    assert "SimCT by bytes" in output and "Held-out prompts (8 before, 8 after)" in output
    assert (tmp_path / "run" / "model.safetensors").exists()
    for name in "curves.png", "timeline.png":
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2]
    assert [row["step"] for row in history if "eval_reverse_kl_per_byte" in row] == [0, 2]


def test_a_run_as_it_comes(simct, tmp_path, data):
    """Its first steps are logged, and a resumed one says from where and compares with the evaluation before the first step."""
    options = [
        "--recipe",
        "demo/distil",
        "--output_dir",
        "run",
        "--data",
        data,
        "--eval_prompts",
        4,
        "--max_new_tokens",
        8,
    ]
    saving = ["--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 1]
    first = simct("train", *options, *saving, "--max_steps", 2)
    assert not [
        noise for noise in ("FutureWarning", "gemm_4bit", "Loading weights", "Writing model", "it/s") if noise in first
    ]
    assert "step    1 loss " in first and "step    2 loss " in first
    before = json.loads((tmp_path / "run" / "evaluation_before.json").read_text())
    resumed = simct("train", *options, *saving, "--max_steps", 3, "--resume_from_checkpoint", "latest")
    assert "resuming from run/checkpoint-2" in resumed and "Held-out prompts (4 before, 4 after)" in resumed
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[0] == {"step": 0, **before}
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]
    # Held-out prompts would become prompts to train on.
    changed = [word if word != 4 else 2 for word in options]
    refused = simct("train", *changed, *saving, "--max_steps", 4, "--resume_from_checkpoint", "latest", code=2)
    assert "is of another run: the data are not the same" in refused
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- Recipe: `demo/distil`" in card and "| held-out prompts | step 0 | step 3 |" in card


def test_libraries_are_quiet():
    """No bars of loading and writing, no word of kernels that are for a GPU."""
    import datasets
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    try:
        quiet_libraries()
        assert not transformers_logging.is_progress_bar_enabled() and datasets.are_progress_bars_disabled()
        assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
        assert logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.ERROR)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def test_a_dry_run_needs_neither_the_data_nor_the_device(simct, tmp_path):
    recipe = ["--recipe", "demo/distil", "--data", "nowhere.jsonl", "--bf16", "--max_steps", 7, "--dry_run"]
    output = " ".join(simct("train", *recipe, code=0, ends=True).split())
    assert (
        "nowhere.jsonl is not here: it is assumed to hold prompts, of at most 512 student tokens; 7 optimiser" in output
    )
    assert "80.0 GB" in output or torch.accelerator.is_available()
    assert "It fits" in output and not (tmp_path / "runs").exists()


def test_train_from_a_yaml_file_with_the_command_line_on_top(simct, tmp_path, data):
    (tmp_path / "run.yaml").write_text(
        f"student: {STUDENT}\nteacher: {TEACHER}\ndata: {data}\noutput_dir: {tmp_path / 'yaml'}\nmax_steps: 5\nbeta: 0.5\n"
        "units: single\nspecial_tokens: {'<eos>': '<|endoftext|>'}\nuse_cpu: true\ndisable_tqdm: true\nmax_new_tokens: 8\n"
        "per_device_train_batch_size: 4\nlogging_steps: 1\nsave_steps: 1\n"
    )
    simct("train", "--config", "run.yaml", "--max_steps", 1)
    arguments = torch.load(tmp_path / "yaml" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (arguments.beta, arguments.units, arguments.max_steps) == (0.5, "single", 1)
    assert arguments.special_tokens == {"<eos>": "<|endoftext|>"}
    assert not (tmp_path / "yaml" / "checkpoint-5").exists()


def test_inspect(simct, tmp_path):
    (tmp_path / "text.txt").write_text("Return the codec's StreamWriter.\n\nNa\u00efve caf\u00e9, 12 345.")
    output = simct("inspect", STUDENT, TEACHER, "--text", "text.txt")
    assert "shared vocabulary" in output and "2 texts" in output and "by bytes (units=single)" in output
    assert "100.0%" not in next(line for line in output.splitlines() if "by string (SimpleOPD, public code)" in line)
    assert output.index("What follows from the figures") < output.index("by bytes (units=single)")
    assert "by script" not in output
    words = " ".join(output.replace("│", " ").split())
    assert "the public code's rule (alignment=anchored)" in words and "not equal as strings" in words
    assert "not_matched" not in output and "longer_unit" not in output
    verbose = simct("inspect", STUDENT, TEACHER, "--verbose")
    assert "SimCT by bytes" in verbose and "Shared vocabulary by script" in verbose


def test_train_an_adapter_on_parquet_with_graded_answers(simct, tmp_path, data):
    from datasets import Dataset

    rows = [{**json.loads(line), "answer": "7"} for line in data.read_text().splitlines()[:24]]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "prompts.parquet"))
    adapter = json.dumps({"r": 4, "target_modules": ["q_proj", "v_proj"]})
    simct(
        "train", "--student", STUDENT, "--teacher", TEACHER, "--data", "prompts.parquet", "--output_dir", "lora",
        "--eval_prompts", 4, "--eval_num_generations", 2, "--eval_temperature", 1, "--peft_config", adapter,
        "--merge_adapter", "--logging_steps", 1, "--save_strategy", "no", *SMALL,
    )  # fmt: skip
    assert not (tmp_path / "lora" / "adapter_config.json").exists()  # merged
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora").state_dict()
    first = AutoModelForCausalLM.from_pretrained(STUDENT).state_dict()
    changed = {name for name in first if not torch.equal(first[name], merged[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    history = json.loads((tmp_path / "lora" / "trainer_state.json").read_text())["log_history"]
    (before, _) = (row for row in history if "eval_accuracy" in row)
    assert 0 <= before["eval_accuracy"] <= 1 and before["eval_accuracy_prompts"] == 4
    assert before["eval_accuracy_samples"] == 2 and before["eval_samples"] == 4
    for phase in "rollout", "teacher", "student", "loss", "optimiser":
        assert any(row.get(f"seconds/{phase}", 0) > 0 for row in history), phase


def test_train_on_a_stream(simct, tmp_path, data):
    options = ["--student", STUDENT, "--teacher", TEACHER, "--data", data, "--streaming", "--output_dir", "stream"]
    simct("train", *options, "--logging_steps", 1, "--save_strategy", "no", *SMALL)
    history = json.loads((tmp_path / "stream" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2]
    output = simct("train", *options, *SMALL, "--max_steps", "-1", code=2)
    assert "max_steps is -1, but train_dataset is streamed" in " ".join(output.split())


@pytest.mark.parametrize(
    "objective",
    [*(["--objective", name] for name in ("bpm", "escd", "uld", "alm")), ["--units", "merged"], ["--mask_longer", 1]],
)
def test_baselines_and_ablations_train(simct, tmp_path, data, objective):
    options = ["--student", STUDENT, "--teacher", TEACHER, "--data", data, "--output_dir", "run", *objective]
    simct("train", *options, "--logging_steps", 1, "--save_strategy", "no", *SMALL, "--max_steps", 1)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in history if "loss" in row]
    assert len(rows) == 1 and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    if "--mask_longer" in objective:
        assert all(row["tokens/longer"] == 0 and row["unsupervised/masked_longer_unit"] > 0 for row in rows)


def test_a_recipe_is_shown_found_and_dry_run(simct, tmp_path, data):
    assert "qwen2.5-7b_gemma-2-2b/distil" in simct("recipes")
    assert simct("recipes", "qwen2.5-7b_gemma-2-2b/sft").strip().endswith("qwen2.5-7b_gemma-2-2b/sft.yaml")
    assert "did you mean qwen2.5-7b_gemma-2-2b/distil" in " ".join(
        simct("recipes", "qwen2.5-7b_gemma-2-2b/distill", code=2).split()
    )
    recipe = ["--recipe", "qwen2.5-7b_gemma-2-2b/distil", "--student", STUDENT, "--teacher", TEACHER, "--data", data]
    shorter = ["--max_new_tokens", 64, "--output_dir", "dry", "--use_cpu", "--bf16", "false", "--dry-run"]
    with pytest.raises(SystemExit) as end:
        simct("train", *recipe, *shorter)
    assert end.value.code == 0
    with pytest.raises(SystemExit) as end:
        simct("train", *recipe, *shorter, "--assume_memory_gb", 0.001)
    assert end.value.code == 1
    assert not (tmp_path / "dry" / "model.safetensors").exists()


def test_answers_are_written(simct, tmp_path, data):
    (tmp_path / "few.jsonl").write_text("\n".join(data.read_text().splitlines()[:6]))
    output = simct(
        "answers", "--model", TEACHER, "--data", "few.jsonl", "--output", "answers.jsonl", "--samples", 2,
        "--max_new_tokens", 48, "--dtype", "float32", "--temperature", 1,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert rows and all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert "answers: answers.jsonl" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data": "nowhere.jsonl"}, "data file 'nowhere.jsonl' does not exist"),
        ({"--data": "bad.jsonl"}, "bad.jsonl, line 2: expected a field 'prompt' or 'messages'"),
        ({"--data": "empty.jsonl"}, "data file 'empty.jsonl' is empty"),
        ({"--student": "nowhere"}, "student 'nowhere' cannot be loaded"),
        ({"--beta": "2"}, "beta is 2.0: expected a number in [0, 1]"),
        ({"--output_dir": "file/run"}, "output_dir 'file/run' cannot be written"),
        ({"--config": "missing.yaml"}, "config file 'missing.yaml' does not exist"),
        ({"--special_tokens": '{"<eos>": "<nothing>"}'}, "special_tokens names '<nothing>'"),
        ({"--eval_prompts": "800"}, "eval_prompts is 800"),
        ({"--resume_from_checkpoint": "latest"}, "resume_from_checkpoint is 'latest'"),
        ({"--model_init_kwargs": '{"dtype": "floaty"}'}, "student"),
        ({"--recipe": "gemma"}, "recipe 'gemma' does not exist"),
        ({"--peft_config": "lora"}, "peft_config is 'lora': expected a JSON object"),
        ({"--merge_adapter": "true"}, "merge_adapter is True, but there is no peft_config"),
        ({"--teacher_model_init_kwargs": "{dtype}"}, "teacher_model_init_kwargs is '{dtype}'"),
    ],
)
def test_bad_input_ends_before_any_work(simct, tmp_path, data, changes, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "file").write_text("in the way")
    options = {"--student": STUDENT, "--teacher": TEACHER, "--data": data, "--output_dir": "run", **changes}
    output = simct("train", *[word for pair in options.items() for word in pair], *SMALL, code=2)
    assert message in " ".join(output.split())
    assert "Traceback" not in output
