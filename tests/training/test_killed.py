"""A run that is killed in the middle of a step, and goes on from its last checkpoint: the weights of a run that never was.

`test_resume.py` has this without a signal, in little time; `test_soak.py` has it two hundred times.
"""

import shutil
import signal
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
        "--num_iterations": 3, "--max_new_tokens": 8, "--logging_steps": 1, "--learning_rate": 1e-3,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    return ["simct.commands.cli", "train", *words, "--use_cpu", "--disable_tqdm", "true", *more]


def finish(programs, output, *more):
    programs.run(command(output, *more), output.with_suffix(".txt"))
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(programs, tmp_path):
    whole = finish(programs, tmp_path / "whole")
    killed = tmp_path / "killed"
    run = programs.start(command(killed), tmp_path / "first.txt")
    deadline = time.monotonic() + 120
    while newest_complete(killed) is None:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.02)  # into a step of the middle of a batch of rollouts
    run.kill()
    assert run.finish(30) == -signal.SIGKILL
    assert not (killed / "model.safetensors").exists()
    # A checkpoint that was being written, whatever the moment of the signal.
    found = newest_complete(killed)
    broken = killed / "checkpoint-99"
    shutil.copytree(found, broken)
    (broken / "trainer_state.json").write_text('{"epoch": 0.')
    with pytest.warns(UserWarning, match="checkpoint-99 is not complete"):
        assert newest_complete(killed) == found
    resumed = finish(programs, killed, "--resume_from_checkpoint", "latest")
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
