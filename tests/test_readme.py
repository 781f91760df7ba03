"""The README's Python runs as printed, with the demo's models in place of large ones."""

import re
from pathlib import Path

import pytest
import torch

from simct.demo import ASSETS
from simct.models.hidden import PackedSequences, response_hidden_states

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="tests without the README beside them")


def snippet(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


def test_the_trainer_snippet(tmp_path):
    code = snippet("SimCTTrainer(")
    for name, stand_in in (
        ('"google/gemma-2-2b-it"', repr(str(ASSETS / "student"))),
        ('"Qwen/Qwen2.5-7B-Instruct"', repr(str(ASSETS / "teacher"))),
        ('"runs/gemma"', repr(str(tmp_path))),
        ("max_new_tokens=1024", "max_new_tokens=8, use_cpu=True, max_steps=1"),
    ):
        assert name in code
        code = code.replace(name, stand_in)
    names = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 1


def test_the_loss_snippet(demo_tokenizers, demo_student, demo_teacher):
    student_tokenizer, teacher_tokenizer = demo_tokenizers
    responses = ["Return the codec's name.", "na\u00efve 12\n"]
    names = dict(
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        responses=responses,
        student=demo_student,
        teacher=demo_teacher,
    )
    lines = snippet("linear_simct_loss(")
    tokens, loss = lines.split("loss = ")
    exec(tokens, names)
    for side, model in ("student", demo_student), ("teacher", demo_teacher):
        packed = PackedSequences.build([[3]] * len(responses), names[f"{side}_ids"])
        with torch.set_grad_enabled(side == "student"):
            names[f"{side}_hidden"] = response_hidden_states(model, packed)
    exec("loss = " + loss, names)
    assert names["loss"].item() > 0
    assert demo_student.get_input_embeddings().weight.grad.abs().sum() > 0
