"""A real run that goes wrong, and what `evaluate` says of it."""

import warnings

import pytest
from test_trainer import STUDENT, TEACHER, config
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import SimCTTrainer
from simct.data.records import load_records
from simct.demo import ASSETS
from simct.rollouts.protocol import Sampling
from simct.rollouts.transformers_engines import StaticBatching


@pytest.mark.slow
def test_a_student_that_narrows_down_is_told(tmp_path):
    """The demo's pair with the paper's objective at a high rate: the student's own texts get
    likelier to the teacher, while the teacher's texts get less likely to the student."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER).float()
    records = [dict(record) for record in load_records(ASSETS / "eval.jsonl")] * 2
    end = tokenizer.eos_token_id
    prompts = tokenizer([record["prompt"] for record in records])["input_ids"]
    drawn = StaticBatching(teacher).generate(prompts, Sampling((end,), end, 48), seed=0)
    for record, response in zip(records, drawn, strict=True):
        record["completion"] = tokenizer.decode(response.token_ids, skip_special_tokens=True)
    run = config(
        tmp_path,
        max_steps=80,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        max_new_tokens=24,
        logging_steps=40,
        temperature=0.6,
        top_p=0.95,
    )
    train = list(load_records(ASSETS / "train.jsonl"))
    trainer = SimCTTrainer(STUDENT, teacher, run, train, records, teacher_processing_class=tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*narrows down")
        before = trainer.evaluate()
    trainer.train()
    with pytest.warns(UserWarning, match="forward KL on the data's answers rose .* narrows down rather than learns"):
        after = trainer.evaluate()
    assert after["eval_reverse_kl_per_byte"] < before["eval_reverse_kl_per_byte"], "by its own measure it got better"
    assert after["eval_forward_kl_per_byte"] > 1.1 * before["eval_forward_kl_per_byte"]
