"""TRL's trainer with the loss of this package, as the example has it, on two processes (gloo, on the CPU): student and teacher
sharded by FSDP2 against whole ones."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")
HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (HERE.parent / "examples").exists(), reason="tests without the examples beside them"
)

RUN = """
import json, os, sys
from pathlib import Path
sys.path += sys.argv[2:]
import torch
from cpu_sharding import shard_on_a_cpu
from datasets import Dataset
from test_examples import load, run, trl_options
from torch.distributed.fsdp import FSDPModule
from trl import DistillationConfig
from simct import LocalTeacher
from simct.data.records import read_prompts
from simct.demo import ASSETS

torch.set_num_threads(1)
shard_on_a_cpu()
root, found = Path(sys.argv[1]), {}
wrapped = dict(transformer_layer_cls_to_wrap=["Gemma2DecoderLayer"], state_dict_type="FULL_STATE_DICT")
for kind, options in ("whole", {}), ("sharded", dict(fsdp=True, fsdp_config=wrapped)):
    (student, tokenizer), teacher = load("student"), LocalTeacher(*load("teacher"))
    tokenizer.padding_side = "left"
    data = Dataset.from_list(read_prompts(ASSETS / "train.jsonl")[:16])
    args = DistillationConfig(**trl_options(2, 1), temperature=1e-4, optim="sgd", **options)  # greedy, but for ties
    trainer = run("trl_distillation_trainer", run_name="imported")["SimCTDistillationTrainer"](
        student, teacher, args, data, tokenizer
    )
    trainer.train()
    found[kind] = dict(
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row], step=trainer.state.global_step,
        student=isinstance(trainer.model, FSDPModule), teacher=teacher.sharded,
    )
(root / f"result-{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_trls_trainer_shards_both(programs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "training"))
    from test_distributed import launch

    (script := tmp_path / "run.py").write_text(RUN)
    launch(programs, [script, tmp_path, HERE / "training", HERE], tmp_path / "output", 2)
    for process in 0, 1:
        found = json.loads((tmp_path / f"result-{process}.json").read_text())
        assert not (found["whole"]["student"] or found["whole"]["teacher"])
        assert found["sharded"]["student"] and found["sharded"]["teacher"] and found["sharded"]["step"] == 2
        assert found["sharded"]["losses"] == pytest.approx(found["whole"]["losses"], rel=1e-4)
