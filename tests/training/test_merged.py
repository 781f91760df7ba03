"""The adapter of a finished run: saved before it is merged, and merged where the student is sharded."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from test_distributed import launch
from test_trainer import STUDENT
from tiny import tiny_model, tiny_trainer
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[2, 40, 50]])


@pytest.fixture
def trainer(tmp_path):
    made = tiny_trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_what_cannot_be_merged_is_not_lost(trainer, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("no merging here")

    expected = trainer.model(IDS).logits
    monkeypatch.setattr(Linear, "merge", fail)
    with pytest.raises(RuntimeError, match="the adapter is saved in .*adapter, but was not merged: no merging here"):
        trainer.save_merged(str(tmp_path / "merged"))
    again = PeftModel.from_pretrained(tiny_model(STUDENT), tmp_path / "run" / "adapter")
    torch.testing.assert_close(again(IDS).logits, expected)


def test_a_sharded_student_is_merged(trainer, tmp_path, monkeypatch):
    """FSDP2 in a single process: what is sharded cannot be copied as a whole."""
    expected = trainer.model(IDS).logits.detach()
    monkeypatch.setattr(trainer, "save_model", lambda *_, **__: None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in trainer.model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(trainer.model, mesh=mesh)
        trainer.save_merged(str(tmp_path / "merged"))
    finally:
        torch.distributed.destroy_process_group()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


RUN = """
import sys
sys.path.append(sys.argv[2])
import torch
from cpu_sharding import shard_on_a_cpu
from peft import LoraConfig
from simct import SimCTConfig, SimCTTrainer
from simct.demo import ASSETS
from simct.data.records import read_prompts

torch.set_num_threads(1)
shard_on_a_cpu()
fsdp = {"transformer_layer_cls_to_wrap": ["Gemma2DecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
config = SimCTConfig(
    output_dir=sys.argv[1], max_steps=1, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd", max_new_tokens=8,
    lr_scheduler_type="constant", warmup_steps=0, save_strategy="no", use_cpu=True, disable_tqdm=True, fsdp=True, fsdp_config=fsdp,
)
prompts = read_prompts(ASSETS / "train.jsonl")[:8]
adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
trainer = SimCTTrainer(str(ASSETS / "student"), str(ASSETS / "teacher"), config, prompts, peft_config=adapter)
trainer.train()
trainer.save_merged(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_merge_what_they_share(programs, tmp_path):
    """FSDP2 over gloo: the adapter is saved whole, and the merged student is the student with it."""
    (script := tmp_path / "run.py").write_text(RUN)
    launch(programs, [script, tmp_path / "run", Path(__file__).parent], tmp_path / "output", 2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32).state_dict()
    first = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    expected = PeftModel.from_pretrained(first, tmp_path / "run" / "adapter").merge_and_unload().state_dict()
    assert any(not torch.equal(expected[name], before[name]) for name in before)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6, msg=name)
