"""Training with responses from a vLLM in this process (`test_served` has the other): the losses of transformers' `generate`."""

import pytest

pytest.importorskip("vllm")

import torch
from transformers import AutoTokenizer

from simct import SimCTConfig, SimCTTrainer
from simct.demo import ASSETS
from simct.prompts import read_prompts

pytestmark = pytest.mark.vllm


def trained(folder, student_folder, engine, **options):
    config = SimCTConfig(
        output_dir=str(folder / engine), max_steps=3, per_device_train_batch_size=8, learning_rate=1e-3, max_new_tokens=16,
        temperature=0.0,  # greedy: the engines draw from random streams of their own
        lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
        rollout_engine=engine, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    prompts = read_prompts(ASSETS / "train.jsonl")[:24]
    trainer = SimCTTrainer(str(student_folder), str(ASSETS / "teacher"), config, prompts, processing_class=tokenizer)
    trainer.train()
    if engine == "vllm":
        trainer.engine.close()
    return [row for row in trainer.state.log_history if "loss" in row]


def check_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["response/length"] == b["response/length"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert all(row["rollout/logprob_gap"] < 1e-3 for row in ours)


def test_greedy_training_runs_agree(tmp_path, student_folder):
    torch.set_num_threads(1)
    check_equal(*(trained(tmp_path, student_folder, engine) for engine in ("vllm", "static")))
