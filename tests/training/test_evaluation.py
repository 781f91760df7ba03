"""What an evaluation says besides the reverse KL: the forward KL on given answers, the end of the turn, a collapse in words."""

import re
import warnings

import pytest
import torch
from test_trainer import STUDENT, TEACHER, config
from transformers import AutoModelForCausalLM, TrainerState

from simct import SimCTConfig, SimCTTrainer
from simct.training.evaluation import collapse, score
from simct.training.plots import evaluation_table

ANSWERED = [
    {"prompt": "Return true if the", "completion": " object is a class."},
    {"prompt": "uri is the connection point", "completion": " of the server; 1024 bytes"},
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return SimCTTrainer(STUDENT, TEACHER, config(tmp_path_factory.mktemp("run")), ANSWERED, ANSWERED)


def logprobs(folder, prompt, answer):
    """Of an answer's tokens by a model on its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


def test_the_forward_kl_and_the_end_are_those_of_the_models_themselves(trainer):
    found, samples = trainer.evaluate(), trainer.answers(ANSWERED)
    ours = [logprobs(STUDENT, s.student_prompt, s.response.token_ids) for s in samples]
    theirs = [logprobs(TEACHER, s.teacher_prompt, s.teacher_response) for s in samples]
    length = sum(len(record["completion"].encode()) + 1 for record in ANSWERED)  # the end counts as a byte
    difference = sum(map(torch.sum, theirs)) - sum(map(torch.sum, ours))
    assert found["eval_answers"] == 2
    assert found["eval_forward_kl_per_byte"] == pytest.approx(float(difference) / length, rel=1e-4)
    _, ends = score(trainer, samples)
    expected = [(float(a[-1].exp()), float(b[-1].exp())) for a, b in zip(ours, theirs, strict=True)]
    assert sorted(ends) == [pytest.approx(pair, rel=1e-4) for pair in sorted(expected)]


def test_without_answers_there_is_no_forward_kl(trainer):
    found = trainer.evaluate([{"prompt": record["prompt"]} for record in ANSWERED])
    assert "eval_reverse_kl_per_byte" in found and "eval_forward_kl_per_byte" not in found


BEFORE = {
    "reverse_kl_per_byte": 0.50, "reverse_kl_per_byte_stderr": 0.01, "forward_kl_per_byte": 0.30, "response_ended": 0.8,
    "samples": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "now,said",
    [
        ({"forward_kl_per_byte": 0.72}, "forward KL .* rose from 0.300 to 0.720"),
        ({"response_ended": 0.1}, "end went from 80% to 10%"),
        ({"response_ended": 0.1, "forward_kl_per_byte": 0.72}, "80% to 10% and the forward KL"),
        ({"forward_kl_per_byte": 0.31, "response_ended": 0.78}, None),  # as it goes
        ({"forward_kl_per_byte": 0.2, "response_ended": 0.9}, None),
        ({"reverse_kl_per_byte": 0.49, "forward_kl_per_byte": 0.72}, None),  # nothing won either
        ({"response_ended": 0.6, "samples": 8}, None),  # two of eight
    ],
    ids=str,
)
def test_a_collapse_is_told_by_what_the_reverse_kl_does_not_see(now, said):
    found = collapse(BEFORE, {**BEFORE, "reverse_kl_per_byte": 0.3, **now})
    if said is None:
        assert found is None
    else:
        assert re.search(said, found)


def test_a_collapse_since_the_first_evaluation_warns(trainer, monkeypatch):
    figures = iter([dict(BEFORE), {**BEFORE, "reverse_kl_per_byte": 0.3, "forward_kl_per_byte": 0.72}])
    monkeypatch.setattr("simct.training.evaluation.measure", lambda *_: (next(figures), None))
    monkeypatch.setattr(trainer, "first_evaluations", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.evaluate()
    trainer.state = TrainerState()  # as `train` does
    with pytest.warns(UserWarning, match="narrows down rather than learns"):
        trainer.evaluate()


def test_an_end_that_the_teacher_does_not_know_is_told(trainer, monkeypatch):
    figures = {**BEFORE, "teacher_end_probability": 3.4e-5}
    monkeypatch.setattr("simct.training.evaluation.measure", lambda *_: (figures, None))
    monkeypatch.setattr(trainer, "first_evaluations", {})
    monkeypatch.setattr(trainer.args, "prompt_format", "text")
    monkeypatch.setattr(trainer.teacher.tokenizer, "chat_template", "{{ messages }}")
    with pytest.warns(UserWarning, match="has a chat template and is read without it, gives the end .* 3.4e-05"):
        trainer.evaluate()


def test_the_best_checkpoint_needs_a_figure_that_a_collapse_does_not_improve(tmp_path):
    best = dict(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(ValueError, match="metric_for_best_model is not given: expected 'accuracy'"):
        SimCTConfig(str(tmp_path), **best)
    assert SimCTConfig(str(tmp_path), **best, metric_for_best_model="forward_kl_per_byte").greater_is_better is False
    assert SimCTConfig(str(tmp_path), **best, metric_for_best_model="accuracy").greater_is_better is True
    for metric in "accuracy", "forward_kl_per_byte":
        arguments = config(tmp_path, **best, metric_for_best_model=metric)
        with pytest.raises(
            ValueError, match=f"metric_for_best_model is '{metric}', but no record of eval_dataset has an answer"
        ):
            SimCTTrainer(STUDENT, TEACHER, arguments, ANSWERED, [{"prompt": "Return"}])


def test_the_table_begins_with_what_a_collapse_does_not_improve():
    row = {f"eval_{name}": value for name, value in BEFORE.items()} | {
        "eval_forward_kl_per_byte_stderr": 0.01, "eval_accuracy": 0.5, "eval_response_length": 9.0, "eval_samples_unscored": 0,
    }  # fmt: skip
    names = list(evaluation_table(row, row).columns[0].cells)
    assert [name.split(",")[0] for name in names[:3]] == [
        "right answers", "forward KL on given answers", "sequence reverse KL",
    ]  # fmt: skip
