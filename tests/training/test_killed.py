"""A run that is killed in the middle of a step, and goes on from its last checkpoint: the weights of a run that never was."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from simct.demo import ASSETS
from simct.training.checkpoints import newest_complete


def command(output, *more):
    options = {
        "--student": ASSETS / "student", "--teacher": ASSETS / "teacher", "--data": ASSETS / "train.jsonl",
        "--output_dir": output, "--max_steps": 6, "--save_steps": 2, "--per_device_train_batch_size": 4,
        "--num_iterations": 3, "--max_new_tokens": 16, "--logging_steps": 1, "--learning_rate": 1e-3,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "simct.commands.cli", "train", *words, "--use_cpu", "--disable_tqdm", "true", *more]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def finish(output, *more):
    done = subprocess.run(command(output, *more), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()


def test_killed_and_resumed_equals_never_killed(tmp_path):
    whole = finish(tmp_path / "whole")
    killed = tmp_path / "killed"
    run = subprocess.Popen(command(killed), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while newest_complete(killed) is None:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.02)  # into a step of the middle of a batch of rollouts
    run.send_signal(signal.SIGKILL)
    assert run.wait(timeout=30) == -signal.SIGKILL
    assert not (killed / "model.safetensors").exists()
    # A checkpoint that was being written, whatever the moment of the signal.
    found = newest_complete(killed)
    broken = killed / "checkpoint-99"
    shutil.copytree(found, broken)
    (broken / "trainer_state.json").write_text('{"epoch": 0.')
    with pytest.warns(UserWarning, match="checkpoint-99 is not complete"):
        assert newest_complete(killed) == found
    resumed = finish(killed, "--resume_from_checkpoint", "latest")
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
