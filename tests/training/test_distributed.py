"""Two processes (gloo, on the CPU) against one, whole or sharded: the same prompts, the same losses, the same weights."""

import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

RUN = """
import sys
sys.path.append(sys.argv[5])
import torch
from cpu_sharding import shard_on_a_cpu
from simct import SimCTConfig, SimCTTrainer
from simct.demo import ASSETS
from simct.data.records import read_prompts

output, result, batch_size, sharded = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "fsdp"
torch.set_num_threads(1)
options = {}
if sharded:
    shard_on_a_cpu()
    fsdp = {"transformer_layer_cls_to_wrap": ["Gemma2DecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
    options = dict(fsdp=True, fsdp_config=fsdp)
config = SimCTConfig(
    output_dir=output, max_steps=2, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2,
    learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", warmup_steps=0, max_new_tokens=16,
    temperature=0.0,  # greedy: processes draw from random streams of their own
    max_tokens_per_batch=40,  # the processes cut their share into different numbers of micro-batches
    logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
)
prompts = read_prompts(ASSETS / "train.jsonl")[:32]
trainer = SimCTTrainer(str(ASSETS / "student"), str(ASSETS / "teacher"), config, prompts, prompts[:5])
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(result + "-saved")
assert sharded == trainer.teacher.sharded == any(cls.__name__ == "FSDPModule" for cls in type(trainer.model).__mro__)
named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in named}
if trainer.is_world_process_zero():
    torch.save({"logs": trainer.state.log_history, "metrics": metrics, "weights": weights}, result)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(programs, command: list, output: Path, processes: int) -> None:
    """A script in so many processes that know of each other, to its end."""
    launched = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in map(str, range(processes)):
        environment = launched | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        started.append(programs.start(command, Path(f"{output}-{rank}"), module=False, **environment))
    for program in started:
        assert program.finish() == 0, program.output.read_text()[-3000:]


def run(programs, tmp_path, processes: int, batch_size: int, kind: str = "whole") -> dict:
    script, result = tmp_path / "run.py", tmp_path / f"{processes}-{kind}"
    script.write_text(RUN)
    command = [script, tmp_path / "out", result, batch_size, kind, Path(__file__).parent]
    launch(programs, command, tmp_path / f"output-{kind}", processes)
    return torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def one(programs, tmp_path_factory):
    return run(programs, tmp_path_factory.mktemp("one"), 1, 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "fsdp"])
def test_two_processes_equal_one(programs, tmp_path, one, kind):
    ours, theirs = one, run(programs, tmp_path, 2, 4, kind)
    names = (
        "loss",
        "loss/single",
        "loss/longer",
        "tokens/longer",
        "response/length",
        "response/entropy",
        "teacher_mass",
    )
    for a, b in zip(ours["logs"], theirs["logs"], strict=True):
        for name in names:
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert set(ours["weights"]) == set(theirs["weights"])
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], rtol=1e-4, atol=1e-6, msg=name)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"2-{kind}-saved", dtype=torch.float32)
    for name, weight in saved.named_parameters():
        torch.testing.assert_close(weight.detach(), theirs["weights"][name], rtol=0, atol=0, msg=name)
    for metrics in ours["metrics"], theirs["metrics"]:
        assert metrics["eval_samples"] + metrics["eval_samples_unscored"] == 5
