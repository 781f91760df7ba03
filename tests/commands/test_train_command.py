"""`simct train` as users run it, on the demo's tiny models: what each group of options does to the log and to the weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from kernels.cases import slow
from packages import needs_continuous_batching
from same_samples import greedy_shortfall
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct.commands.cli import main
from simct.demo import ASSETS
from simct.rollouts.transformers_engines import ContinuousBatching

STUDENT, TEACHER = str(ASSETS / "student"), str(ASSETS / "teacher")
BASE = {
    "student": STUDENT, "teacher": TEACHER, "data": ASSETS / "train.jsonl", "max_steps": 2, "optim": "sgd", "learning_rate": 0.1,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "max_new_tokens": 16, "per_device_train_batch_size": 8,
    "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def words(output, **options):
    given = {**BASE, "output_dir": output, **options}
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def read(output):
    """The log of the steps, and the weights that were saved."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    weights = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
    return [row for row in history if "loss" in row], weights


def run(output, **options):
    main(words(output, **options))
    return read(output)


def assert_equal(ours, theirs, rtol=1e-5):
    for a, b in zip(ours[0], theirs[0], strict=True):
        for name in "loss", "loss/single", "loss/longer", "tokens/longer", "response/length", "teacher_mass":
            assert a[name] == pytest.approx(b[name], rel=rtol), name
    for name, weight in ours[1].items():
        torch.testing.assert_close(weight, theirs[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    output = tmp_path_factory.mktemp("plain")
    return (*run(output, packing="off"), output)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": "on", "max_tokens_per_batch": 60, "gradient_checkpointing": True},
        {"offload_teacher": True, "rollout_dtype": "float32"},
        *slow(  # the trainer's own tests have these
            {"packing": "on"},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        ),
    ],
    ids=str,
)
def test_how_the_work_is_cut_changes_nothing(tmp_path, plain, options):
    assert_equal(run(tmp_path, **options), plain)


def test_the_phases_are_in_the_log(plain):
    log, _, _ = plain
    for phase in "rollout", "teacher", "align", "student", "loss", "optimiser":
        assert all(row[f"seconds/{phase}"] >= 0 for row in log), phase


@needs_continuous_batching
def test_a_kept_cache_serves_every_step(tmp_path, monkeypatch):
    """With the weights of each step: a response is the greedy one of the student that the step has. Paged attention does not know
    Gemma-2's soft cap on scores."""
    shortfalls = []
    generate = ContinuousBatching.generate

    def checked(engine, prompts, sampling, *, seed):
        responses = generate(engine, prompts, sampling, seed=seed)
        if sampling.temperature == 0:  # else it is the trial of a new engine
            shortfalls.append(greedy_shortfall(engine.model, prompts, responses))
        return responses

    monkeypatch.setattr(ContinuousBatching, "generate", checked)
    uncapped = json.dumps({"attn_logit_softcapping": None})
    options = dict(rollout_engine="continuous", kv_cache_gb=0.01, temperature=0.0, model_init_kwargs=uncapped)
    _, weights = run(tmp_path, **options)
    assert len(shortfalls) == 2 and max(shortfalls) < 1e-3, shortfalls
    before = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_an_adapter_on_a_quantised_student(tmp_path, tape):
    """QLoRA trains as LoRA on the weights that the 4 bits stand for, on the same responses, over steps that sample in between."""
    pytest.importorskip("bitsandbytes")
    quantised = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32, quantization_config=dict(quantised))
    model.dequantize().save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(tmp_path / "student")
    adapter = json.dumps({"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]})
    options = dict(peft_config=adapter, temperature=0.0, max_steps=3, learning_rate=1.0)
    main(words(tmp_path / "lora", student=tmp_path / "student", **options))
    tape.rewind()
    main(words(tmp_path / "qlora", model_init_kwargs=json.dumps({"quantization_config": quantised}), **options))
    lora, qlora = (
        [
            row
            for row in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in row
        ]
        for name in ("lora", "qlora")
    )
    assert lora[0]["loss"] > 1.01 * lora[2]["loss"], "the steps are too small to compare gradients by"
    for a, b in zip(lora, qlora, strict=True):
        for name in "loss", "grad_norm", "response/length", "teacher_mass":
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """The command, started by torch's launcher. `training/test_distributed.py` has the trainer in two processes."""
    one = run(tmp_path / "one", temperature=0.0)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "simct.commands.cli",
    ]
    two = words(tmp_path / "two", temperature=0.0, per_device_train_batch_size=4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*launcher, *two], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(read(tmp_path / "two"), one, rtol=1e-4)


def test_rollout_options(tmp_path):
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()[:16]]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({**row, "completion": " nothing at all"}) for row in rows))
    options = dict(num_generations=2, num_iterations=2, on_policy_fraction=0.5, stop_strings="e", max_steps=4)
    log, _ = run(tmp_path / "run", data=data, per_device_train_batch_size=4, **options)
    assert len(log) == 4
    # What a batch of rollouts is, is logged at its first step; the second uses it again.
    fresh = [row for row in log if "response/off_policy" in row]
    assert [row["step"] for row in fresh] == [1, 3]
    assert 0 < sum(row["response/off_policy"] for row in fresh) / 2 < 1
    assert all(row["response/length"] < 16 for row in fresh)  # nothing goes on after an "e"


def test_teachers_by_a_column_with_what_only_they_see(tmp_path):
    prompts = [json.loads(line)["prompt"] for line in (ASSETS / "train.jsonl").read_text().splitlines()[:8]]
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": p, "teacher": "one" if i % 2 else "two"} for i, p in enumerate(prompts)]
    data.write_text("\n".join(map(json.dumps, rows)))
    teachers = json.dumps({"one": TEACHER, "two": TEACHER})
    options = dict(data=data, temperature=0.0, max_steps=1)
    both = run(tmp_path / "both", teacher=teachers, **options)
    one = run(tmp_path / "one", **options)
    assert_equal(both, one, rtol=1e-4)
    data.write_text("\n".join(json.dumps({**row, "teacher_context": "Return the name."}) for row in rows))
    told, _ = run(tmp_path / "told", **options)
    assert told[0]["response/length"] == one[0][0]["response/length"]  # the student saw nothing of it
    assert told[0]["loss"] != pytest.approx(one[0][0]["loss"], rel=1e-3)


def test_bad_rows_are_left_out_and_said(tmp_path):
    data = tmp_path / "data.jsonl"
    lines = (ASSETS / "train.jsonl").read_text().splitlines()[:16]
    data.write_text("\n".join([*lines[:3], '{"prompt": 7}', *lines[3:], "not JSON"]))
    with pytest.raises(SystemExit):
        main(words(tmp_path / "stop", data=data))
    with pytest.warns(UserWarning, match=r"2 of 18 rows of .*data.jsonl, line 4: .*; .*line 18: "):
        log, _ = run(tmp_path / "skip", data=data, on_bad_row="skip")
    assert len(log) == 2
