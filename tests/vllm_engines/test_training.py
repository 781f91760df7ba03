"""Training with responses from a vLLM in this process (`test_served` has the other): the losses of transformers' `generate`."""

import json

import pytest

pytest.importorskip("vllm")

from simct.demo import ASSETS

pytestmark = pytest.mark.vllm


def trained(programs, folder, student_folder, engine, **options):
    """The log of a run of `simct train`, in a process of its own: vLLM stays in one to its end."""
    given = {
        "student": student_folder, "teacher": ASSETS / "teacher", "data": ASSETS / "train.jsonl", "output_dir": folder / engine,
        "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_new_tokens": 16,
        "temperature": 0.0,  # greedy: the engines draw from random streams of their own
        "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "rollout_engine": engine, **options,
    }  # fmt: skip
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    programs.run(["simct.commands.cli", "train", *words], folder / f"{engine}.txt", **environment)
    history = json.loads((folder / engine / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def check_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["response/length"] == b["response/length"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert all(row["rollout/logprob_gap"] < 1e-3 for row in ours)


def test_greedy_training_runs_agree(tmp_path, student_folder, programs):
    check_equal(*(trained(programs, tmp_path, student_folder, engine) for engine in ("vllm", "static")))
