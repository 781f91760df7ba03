"""Two processes (gloo, on the CPU), whole or sharded: one meets a number that is none, both stop, both go on from a checkpoint."""

import json
from pathlib import Path

import pytest
from test_distributed import launch
from test_trainer import PROMPTS, StopAt
from tiny import tiny_trainer
from transformers import AutoModelForCausalLM

from simct.training.checkpoints import newest_complete

RUN = """
import json, sys
from pathlib import Path
sys.path += sys.argv[3:]
import torch
from cpu_sharding import shard_on_a_cpu
from test_trainer import StopAt
from tiny import tiny_trainer

torch.set_num_threads(1)
root, kind = Path(sys.argv[1]), sys.argv[2]
options = dict(max_steps=4, num_iterations=2, save_strategy="steps", save_steps=1, per_device_train_batch_size=1)
if kind != "whole":
    shard_on_a_cpu()
    wrapped = dict(transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], state_dict_type=kind)
    options |= dict(fsdp=True, fsdp_config=wrapped)


def weights(trainer):
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in named}


whole = tiny_trainer(root / "whole", **{**options, "save_strategy": "no"})
whole.train()
process = whole.args.process_index

broken = tiny_trainer(root, **options)
original, calls = broken.teacher.hidden_states, []


def hidden_states(prompts, responses):
    hidden = original(prompts, responses)
    calls.append(1)
    return hidden * float("nan") if process == 1 and len(calls) == 2 else hidden  # the batch of the third step


broken.teacher.hidden_states = hidden_states
said = "nothing"
try:
    broken.train()
except FloatingPointError as error:
    said = str(error)

resumed = tiny_trainer(root, **options)
resumed.train(resume_from_checkpoint=True)
ours, theirs = weights(resumed), weights(whole)
resumed.save_model(str(root / "student"))

with torch.no_grad():  # in one process's share
    local = next(p for name, p in resumed.model.named_parameters() if "up_proj" in name)
    (local.to_local() if hasattr(local, "to_local") else local)[0] = float("nan") if process == 1 or kind == "whole" else 0.0
try:
    resumed.save_model(str(root / "student"))
    not_saved = "nothing"
except FloatingPointError as error:
    not_saved = str(error)
result = dict(
    step=broken.state.global_step, said=said, not_saved=not_saved,
    equal=all(torch.equal(ours[name], theirs[name]) for name in theirs),
)
(root / f"result-{process}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_both_processes_stop_and_go_on(programs, tmp_path, kind):
    script, here = tmp_path / "run.py", Path(__file__).parent
    script.write_text(RUN)
    launch(programs, [script, tmp_path, kind, here, here.parent], tmp_path / "output", 2)
    results = [json.loads((tmp_path / f"result-{process}.json").read_text()) for process in (0, 1)]
    assert "step 3: the loss of another process is no number" in results[0]["said"]
    assert "step 3: the loss is nan" in results[1]["said"] and "nonfinite-3-1.json" in results[1]["said"]
    for result in results:
        assert result["step"] == 2 and result["equal"]
        assert "up_proj.weight of the student" in result["not_saved"]
    run = tmp_path / "run"
    assert newest_complete(run) == str(run / "checkpoint-4")
    listed = json.loads((run / "checkpoint-3" / "simct_checkpoint.json").read_text())["files"]
    for process in 0, 1:
        assert f"rng_state_{process}.pth" in listed and f"simct_rollouts-{process}.json" in listed
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    alone = tiny_trainer(tmp_path, PROMPTS, [StopAt(1)], num_iterations=2, max_steps=4, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="processes is 1, it was 2"):
        alone.train(resume_from_checkpoint=True)


OUT_OF_MEMORY = """
import sys
from pathlib import Path
sys.path += sys.argv[2:]
import torch
from tiny import tiny_trainer

torch.set_num_threads(1)
root = Path(sys.argv[1])
options = dict(max_steps=3, save_strategy="no", per_device_train_batch_size=4, optim="sgd", lr_scheduler_type="constant")


def weights(tight):
    trainer = tiny_trainer(root / str(tight), **options)
    process, tried = trainer.args.process_index, []

    def limit(module, given, named):
        if module.training and tight and process == 1:
            tried.append(named["input_ids"].numel())
            if len(tried) % 3 == 1:  # the first of each step's passes; its two halves fit
                raise torch.OutOfMemoryError("tried to allocate too much")

    trainer.model.model.register_forward_pre_hook(limit, with_kwargs=True)
    trainer.train()
    handler = trainer.accelerator.ddp_handler
    assert handler.gradient_as_bucket_view and not handler.broadcast_buffers and len(tried) == 9 * (tight and process == 1)
    return [p.detach().clone() for p in trainer.model.parameters()]


for plain, halved in zip(weights(False), weights(True), strict=True):
    torch.testing.assert_close(halved, plain, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.slow
def test_one_process_without_memory_goes_in_halves(programs, tmp_path):
    """While the other waits in the gradients' reduction: nothing may be sent around for the second try alone."""
    script = tmp_path / "run.py"
    script.write_text(OUT_OF_MEMORY)
    launch(programs, [script, tmp_path, Path(__file__).parent, Path(__file__).parent.parent], tmp_path / "output", 2)
