"""The adapter of a finished run: saved before it is merged, and merged where the student is sharded."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
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
