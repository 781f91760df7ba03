"""A teacher that two processes (gloo, on the CPU) share: the losses of a copy in each, its weights read once, no share twice."""

import json
from pathlib import Path

import pytest
import torch
from test_distributed import launch
from test_trainer import TEACHER
from tiny import tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from simct.training.memory import estimate

SIZES = dict(
    hidden_size=16, intermediate_size=33, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, bos_token_id=None,
    max_position_embeddings=64,
)  # fmt: skip

RUN = """
import json, sys
from pathlib import Path
sys.path += sys.argv[2:]
import torch
from cpu_sharding import shard_on_a_cpu
from test_sharded_teacher import estimate_of
from test_trainer import PROMPTS, STUDENT, config
from tiny import OPTIONS, tiny_model, tokenizer
from torch.distributed.fsdp import FSDPModule
from simct import SimCTTrainer
from simct.teachers import loading

torch.set_num_threads(1)
shard_on_a_cpu()
root = Path(sys.argv[1])
wrapped = dict(transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], state_dict_type="FULL_STATE_DICT")
fsdp = dict(fsdp=True, gradient_accumulation_steps=2, fsdp_config=wrapped)
both = ("untied", "tied")
answer = " of the server; 1024 bytes"
answered = [{**record, "completion": answer, "teacher": both[i > 2]} for i, record in enumerate(PROMPTS[:5])]
read, original = [], loading.load_model


def load_model(model, label, **options):
    read.append(label)
    return original(model, label, **options)


loading.load_model = load_model


def held(model):
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local}
    return sum(storages.values()) + sum(b.numel() * b.element_size() for b in model.buffers())


def run(kind, teacher="untied", records=PROMPTS, **options):
    read.clear()
    folders = {name: str(root / name) for name in teacher} if isinstance(teacher, list) else str(root / teacher)
    arguments = config(root / kind, **{**OPTIONS, "max_steps": 2, "max_tokens_per_batch": 40, **options})
    trainer = SimCTTrainer(
        tiny_model(STUDENT), folders, arguments, records, answered, processing_class=tokenizer(STUDENT),
    )
    before = trainer.evaluate()
    sharded = isinstance(trainer.model, FSDPModule)
    gradients, step = [], trainer._part_step

    def part_step(*args, **options):
        loss = step(*args, **options)
        gradients.append(all(hasattr(p.grad, "to_local") for p in trainer.model.parameters()))
        return loss

    trainer._part_step = part_step
    trainer.train()
    ours, told = held(trainer.accelerator.unwrap_model(trainer.model)), estimate_of(trainer)
    drawn = [sample.teacher for sample in trainer._drawn]
    return dict(
        drawn=drawn,
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        before={name: value for name, value in before.items() if "kl" in name}, read=list(read), sharded=sharded,
        after=trainer.evaluate()["eval_forward_kl_per_byte"], held=held(trainer.teacher.model),
        told=told.teacher_weights, student=[ours, told.student_weights], shared=trainer.teacher.sharded, gradients=gradients,
    )


process = int(__import__("os").environ["RANK"])
two = dict(teacher=list(both))
# A process with fewer prompts of one teacher must still go through it as often as the other process.
mixed = [{**record, "teacher": both[i % 4 > 1]} for i, record in enumerate(PROMPTS)]
cases = {
    "whole student": run("whole", teacher="tied", shard_teacher=True),
    "whole student, offloaded": run("offloaded", teacher="tied", shard_teacher=True, offload_teacher=True),
    "whole student, copied": run("copied", teacher="tied"),
    "two": run("two", records=mixed, shard_teacher=True, **two),
    "two, copied": run("two-copied", records=mixed, **two),
}
try:
    run("missing", teacher="missing", shard_teacher=True)
    said = "nothing"
except ValueError as error:
    said = str(error)
# Last: accelerate remembers it in the environment.
cases["fsdp"] = run("fsdp", **fsdp)
cases["fsdp, copied"] = run("fsdp-copied", shard_teacher=False, **fsdp)
(root / f"result-{process}.json").write_text(json.dumps([cases, said]))
"""


def estimate_of(trainer):
    """Of one process of two; offloaded shares are in this process's memory all the same, on a CPU."""
    return estimate(
        trainer.accelerator.unwrap_model(trainer.model), trainer.teacher.model, batch_tokens=40, prompt_tokens=30,
        response_tokens=6, rollouts=4, processes=2, shard_teacher=trainer.teacher.sharded,
        shard_student=trainer.is_fsdp_enabled, device_type="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of two models: one as Qwen's, one with a tied head and a soft cap as Gemma's. Rows that do not halve evenly."""
    root, own = tmp_path_factory.mktemp("teachers"), tokenizer(TEACHER)
    options = dict(SIZES, vocab_size=len(own) + 1, eos_token_id=own.eos_token_id)
    torch.manual_seed(0)
    untied = LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=False))
    tied = Gemma2ForCausalLM(Gemma2Config(**options, head_dim=8, tie_word_embeddings=True, final_logit_softcapping=5.0))
    for name, model in ("untied", untied), ("tied", tied):
        model.save_pretrained(root / name)
        own.save_pretrained(root / name)
    return root


@pytest.mark.slow
def test_two_processes_share_a_teacher(programs, tmp_path, teachers):
    for folder in teachers.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    (script := tmp_path / "run.py").write_text(RUN)
    here = Path(__file__).parent
    launch(programs, [script, tmp_path, here, here.parent], tmp_path / "output", 2)
    results = [json.loads((tmp_path / f"result-{process}.json").read_text()) for process in (0, 1)]
    for process, (cases, said) in enumerate(results):
        assert "teacher" in said and "missing" in said and "cannot be loaded" in said
        for name, case in cases.items():
            copied = cases[f"{name.split(',')[0]}, copied"]
            for figure in "losses", "before", "after":
                assert case[figure] == pytest.approx(copied[figure], rel=1e-6), (name, figure)
            assert len(case["losses"]) == 2 and case["held"] == case["told"], name
            assert case["shared"] == ("copied" not in name) and case["student"][0] == case["student"][1]
            # Evaluated before the first step, and sharded by then.
            assert case["sharded"] == name.startswith("fsdp")
            # Its gradients are shares after each micro-batch, never whole in each process.
            assert set(case["gradients"]) == {case["sharded"]} and len(case["gradients"]) >= 2 + 2 * case["sharded"]
            loaded = [label for label in case["read"] if label.startswith("teacher")]
            assert len(loaded) == (0 if process and case["shared"] else 1 + name.startswith("two")), name
            if case["shared"]:
                assert case["held"] < copied["held"]
    drawn = [sorted(cases["two"]["drawn"]) for cases, _ in results]
    assert drawn[0] != drawn[1], "both processes have as many of each teacher: nothing was filled up"
