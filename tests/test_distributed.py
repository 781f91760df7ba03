"""Two processes (gloo, on the CPU) against one: the same prompts, the same loss, the same weights."""

import os
import subprocess
import sys

import pytest
import torch

RUN = """
import sys
from simct import SimCTConfig, SimCTTrainer
from simct.demo import ASSETS
from simct.prompts import read_prompts
import torch
torch.set_num_threads(1)
config = SimCTConfig(
    output_dir=sys.argv[1], max_steps=2, per_device_train_batch_size=int(sys.argv[2]), gradient_accumulation_steps=2,
    learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", warmup_steps=0, max_new_tokens=16,
    temperature=0.0,  # greedy: processes draw from random streams of their own
    logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
)
prompts = read_prompts(ASSETS / "train.jsonl")[:32]
trainer = SimCTTrainer(str(ASSETS / "student"), str(ASSETS / "teacher"), config, prompts, prompts[:5])
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    weights = {name: value for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}
    torch.save({"weights": weights, "logs": trainer.state.log_history, "metrics": metrics}, sys.argv[3])
"""


def run(tmp_path, processes: int, batch_size: int) -> dict:
    script, result = tmp_path / "run.py", tmp_path / f"{processes}.pt"
    script.write_text(RUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(script),
        str(tmp_path / "out"),
        str(batch_size),
        str(result),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(result, weights_only=True)


def test_two_processes_equal_one(tmp_path):
    one, two = run(tmp_path, 1, 8), run(tmp_path, 2, 4)
    for ours, theirs in zip(one["logs"], two["logs"], strict=True):
        for name in (
            "loss",
            "loss/single",
            "loss/longer",
            "tokens/longer",
            "response/length",
            "response/entropy",
            "teacher_mass",
        ):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], rtol=1e-4, atol=1e-6, msg=name)
    assert one["metrics"]["eval_samples"] + one["metrics"]["eval_samples_unscored"] == 5
    assert two["metrics"]["eval_samples"] + two["metrics"]["eval_samples_unscored"] == 5
