"""The end of the turn as a class, and the log's probability of all ids that end one."""

import pytest
import torch
from test_trainer import PROMPTS, STUDENT, logs
from tiny import tiny_model, tiny_trainer, tokenizer

from simct import SimCTConfig

ANSWERED = [{**record, "completion": " It is the answer."} for record in PROMPTS[:4]]


def mass(model, prompts, responses, ends) -> float:
    """The mean probability of the ids where a response ends, from whole logits."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, -2]
        found.append(logits.softmax(0)[list(ends)].sum().item())
    return sum(found) / len(found)


@pytest.mark.parametrize("stop", ["pair", "class"])
def test_the_log_has_both_sides_probability_of_all_ends(tmp_path, stop):
    student = tiny_model(STUDENT)
    student.generation_config.eos_token_id = [tokenizer(STUDENT).eos_token_id, 300, 301]
    options = dict(stop=stop, on_policy_fraction=0.0, learning_rate=0.0, max_steps=1, max_new_tokens=12, bf16=False)
    trainer = tiny_trainer(tmp_path, ANSWERED, student=student, **options)
    trainer.train()
    assert trainer.shared.class_count == (stop == "class")
    assert len(trainer.pair.student_end_ids) == 3
    samples = [part.samples for inputs in trainer._inputs for part in inputs["parts"]][0]
    ours, theirs = trainer.pair.stop_ids
    sides = (
        ("student", trainer.model, samples.student_prompts, samples.student_responses, ours),
        ("teacher", trainer.teacher.model, samples.teacher_prompts, samples.teacher_responses, theirs),
    )
    (row,) = logs(trainer)
    for side, *given in sides:
        assert row[f"stop_mass/{side}"] == pytest.approx(mass(*given), rel=1e-4)
    assert row["loss"] > 0


def test_a_class_is_for_the_objective_that_has_candidates(tmp_path):
    with pytest.raises(ValueError, match="stop is 'class' and objective is 'escd'"):
        SimCTConfig(output_dir=str(tmp_path), use_cpu=True, stop="class", objective="escd")
    with pytest.raises(ValueError, match="stop is 'both': expected one of 'pair', 'class'"):
        SimCTConfig(output_dir=str(tmp_path), use_cpu=True, stop="both")
