"""Run by test_processes.py in each of two gloo processes: an FSDP2 student, and a vLLM in each process that takes its weights."""

import sys

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from simct.checkpoint_weights import checkpoint_weights
from simct.rollout import Sampling, StaticBatching
from simct.vllm_engine import ColocatedVLLM

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
student = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
torch.manual_seed(0)
with torch.no_grad():
    for parameter in student.parameters():
        parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.05)
prompts, sampling = [[2, 312, 366], [2, 310, 1344, 370]], Sampling((1,), 0, max_new_tokens=16, temperature=0.0)
expected = StaticBatching(student).generate(prompts, sampling, seed=0)
whole = {name: tensor.clone() for name, tensor in checkpoint_weights(student)}

mesh = init_device_mesh("cpu", (2,))
for layer in student.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(student, mesh=mesh)
gathered = dict(checkpoint_weights(student))
assert gathered.keys() == whole.keys() and all(torch.equal(gathered[name], whole[name]) for name in whole)

engine = ColocatedVLLM(sys.argv[1], max_model_len=128, dtype="float32", gpu_memory_utilization=0.2)
before = engine.generate(prompts, sampling, seed=0)
assert [r.token_ids for r in before] != [r.token_ids for r in expected]
engine.update_weights(student)
mine = slice(rank, None)  # another number of prompts in each process: no engine waits for another
assert [r.token_ids for r in engine.generate(prompts[mine], sampling, seed=0)] == [r.token_ids for r in expected][mine]
print(f"process {rank} is done", flush=True)
