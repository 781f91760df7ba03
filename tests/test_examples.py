"""Every example as a user runs it; its first loss is the oracle's, on rows and units made as the trainer makes them."""

import re
import runpy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.utils import is_byte_level_tokenizer

import simct_kernels
from simct import LocalTeacher, TokenizerPair
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.models.hidden import PackedSequences, response_hidden_states
from simct.pairing.padded import PaddedBatch
from simct_kernels import LMHead, linear_simct_loss

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["plain_loop", "trl_distillation_trainer", "trl_gold", "kdflow_algorithm", "lightning_module"]
SLOW = ["trl_distillation_trainer", "trl_gold", "kdflow_algorithm", "lightning_module"]
TRL = {"trl_distillation_trainer": DistillationTrainer, "trl_gold": GOLDTrainer}
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="tests without the examples beside them")


@dataclass
class Seen:
    """What went through an example: the padded batches that it made, and the calls of the loss."""

    batches: list[PaddedBatch] = field(default_factory=list)
    heads: list[tuple[LMHead, LMHead]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # summed over units
    tokens: list[int] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the trainers of TRL make their output folder
    seen, check = Seen(), PaddedBatch.__post_init__

    def made(batch):
        check(batch)
        seen.batches.append(batch)

    def called(ours, head, theirs, teacher_head, units, shared, **options):
        loss = linear_simct_loss(ours, head, theirs, teacher_head, units, shared, **options)
        seen.heads.append((head, teacher_head))
        seen.losses.append(loss.item())
        seen.tokens.append(len(units.student_tokens))
        return loss

    monkeypatch.setattr(PaddedBatch, "__post_init__", made)
    monkeypatch.setattr(simct_kernels, "linear_simct_loss", called)  # where the examples import it from
    return seen


def run(name: str, run_name: str = "__main__") -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name)


def load(side: str, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(ASSETS / side, dtype=dtype), AutoTokenizer.from_pretrained(
        ASSETS / side
    )


def oracle(batch: PaddedBatch) -> tuple[float, list[str]]:
    """The loss of a batch of the untrained student per token, in float64 from the ids alone; and the texts of its prompts."""
    (student, tokenizer), (teacher, teacher_tokenizer) = (load(side, torch.float64) for side in ("student", "teacher"))
    pair = TokenizerPair(tokenizer, teacher_tokenizer)
    prompts, responses = [], []
    for ids, marked, read in zip(batch.input_ids, batch.response_mask.bool(), batch.attention_mask.bool(), strict=True):
        prompts.append(ids[read & ~marked].tolist())
        responses.append(ids[marked].tolist())
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    teacher_responses = pair.encode_teacher(responses)
    with torch.no_grad():
        loss = linear_simct_loss(
            response_hidden_states(student, PackedSequences.build(prompts, responses)),
            LMHead.from_model(student),
            LocalTeacher(teacher, teacher_tokenizer).hidden_states(
                teacher_tokenizer(texts)["input_ids"], teacher_responses
            ),
            LMHead.from_model(teacher),
            pair.align_batch(responses, teacher_responses),
            pair.shared,
            backend="reference",
        )
    return loss.item() / sum(map(len, responses)), texts


# `test_trl_takes_a_simct_step_with_a_gemma_style_student` has the trainers of TRL.
@pytest.mark.parametrize(
    "name", [name if name not in SLOW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_an_example_trains(name, seen, capsys):
    names = run(name)
    printed = re.findall(r"^step (\d+): loss (\S+?),?(?: |$)", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, _ in printed] == list(range(1, 9))
    losses = [float(loss) for _, loss in printed]
    assert losses == pytest.approx([loss / n for loss, n in zip(seen.losses, seen.tokens, strict=True)], rel=1e-5)
    expected, texts = oracle(seen.batches[0])
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    if name != "kdflow_algorithm":  # which cuts its prompts itself
        assert set(texts) == {record["prompt"] for record in read_prompts(ASSETS / "train.jsonl")[:32]}
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    student, teacher = (load(side)[0].get_output_embeddings().weight for side in ("student", "teacher"))
    head, teacher_head = seen.heads[-1]
    assert (head.weight - student).abs().max() > 1e-3
    assert torch.equal(teacher_head.weight, teacher)
    if name in TRL:
        trainer = names["trainer"]
        assert isinstance(trainer, TRL[name]) and trainer.state.global_step == 8


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_all_examples_are_tested():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NAMES)


def trl_options(steps: int, accumulate: int) -> dict:
    return dict(
        output_dir="runs",
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        logging_steps=1,
        max_completion_length=8,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
    )


def prompts_and_completions(tokenizer) -> Dataset:
    texts = [record["prompt"] for record in read_prompts(ASSETS / "train.jsonl")[:8]]
    return Dataset.from_list([{"prompt": tokenizer.bos_token + text, "completion": ""} for text in texts])


def gold_options(**changes) -> dict:
    return {**trl_options(1, 2), "use_uld_loss": True, "use_extended_uld": False, "lmbda": 1.0, "beta": 1.0, **changes}


def test_trl_refuses_a_gemma_style_student_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (student, tokenizer), (teacher, _) = load("student"), load("teacher")
    with pytest.raises(ValueError, match="vocab_size 2048 but the teacher model has vocab_size 3072"):
        DistillationTrainer(student, teacher, DistillationConfig(**trl_options(1, 1)), processing_class=tokenizer)
    with pytest.raises(NotImplementedError, match="not ByteLevel"):
        GOLDTrainer(
            student,
            teacher,
            GOLDConfig(**gold_options(use_extended_uld=True)),
            train_dataset=prompts_and_completions(tokenizer),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("name", list(TRL))
def test_trl_takes_a_simct_step_with_a_gemma_style_student(name, seen):
    """One optimiser step of two micro-batches, through TRL's own collator, rollouts and loop."""
    (student, tokenizer), (teacher, teacher_tokenizer) = load("student"), load("teacher")
    assert student.config.model_type == "gemma2" and student.config.final_logit_softcapping
    assert not is_byte_level_tokenizer(tokenizer.backend_tokenizer) and "▁the" in tokenizer.get_vocab()
    assert is_byte_level_tokenizer(teacher_tokenizer.backend_tokenizer)
    tokenizer.padding_side = "left"
    names = run(name, run_name="imported")
    if name == "trl_gold":
        data, args = prompts_and_completions(tokenizer), GOLDConfig(**gold_options())
        trainer = names["SimCTGOLDTrainer"](student, teacher, args, train_dataset=data, processing_class=tokenizer)
    else:
        data, args = (
            Dataset.from_list(read_prompts(ASSETS / "train.jsonl")[:8]),
            DistillationConfig(**trl_options(1, 2)),
        )
        local = LocalTeacher(teacher, teacher_tokenizer)
        trainer = names["SimCTDistillationTrainer"](student, local, args, data, tokenizer)
    before = student.get_output_embeddings().weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1 and len(seen.losses) == 2
    assert (student.get_output_embeddings().weight - before).abs().max() > 1e-4
    # GOLD divides by the tokens of a micro-batch, DistillationTrainer by those of the step.
    means = [loss / n for loss, n in zip(seen.losses, seen.tokens, strict=True)]
    expected = sum(means) / 2 if name == "trl_gold" else sum(seen.losses) / sum(seen.tokens)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
