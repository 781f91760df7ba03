"""What a production run asks of the trainer, each on the demo's tiny models."""

import json
import math
import warnings

import pytest
import torch
from kernels.cases import slow
from test_trainer import (
    HELD_OUT,
    PROMPTS,
    STUDENT,
    TEACHER,
    assert_same_weights,
    config,
    logs,
    trained,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import SimCTTrainer

SGD = dict(optim="sgd", learning_rate=0.1, per_device_train_batch_size=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"), **SGD, packing="off")


@pytest.mark.parametrize(
    "options",
    [
        {"packing": "on", "max_tokens_per_batch": 60},
        {"packing": "off", "max_tokens_per_batch": 60},
        {
            "packing": "on",
            "max_tokens_per_batch": 30,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
        },
        *slow(
            {"packing": "on"}, {"offload_teacher": True}
        ),  # `commands/test_train_command.py` has the teacher's offloading
    ],
    ids=str,
)
def test_how_the_work_is_cut_changes_nothing(tmp_path, plain, options):
    run = trained(tmp_path, **{**SGD, **options})
    for ours, theirs in zip(logs(run), logs(plain), strict=True):
        for name in "loss", "loss/single", "tokens/longer", "response/length", "response/entropy", "teacher_mass":
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert_same_weights(run, plain, rtol=1e-4, atol=1e-6)


def test_a_token_budget_bounds_what_is_forwarded_at_once(tmp_path):
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, **SGD, max_tokens_per_batch=60), PROMPTS)
    seen = []
    trainer.model.model.register_forward_hook(
        lambda module, args, output: (
            seen.append(output.last_hidden_state.shape[:2].numel()) if module.training else None
        )
    )
    trainer.train()
    assert len(seen) > 2 * 2 and max(seen) <= 60


def test_several_responses_to_each_prompt(tmp_path):
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, num_generations=3, max_steps=1), PROMPTS)
    trainer.train()
    samples = [s for inputs in trainer._inputs for part in inputs["parts"] for s in part.samples]
    assert len(samples) == 4 * 3
    by_prompt = {}
    for s in samples:
        by_prompt.setdefault(tuple(s.student_prompt), set()).add(tuple(s.response.token_ids))
    assert len(by_prompt) == 4 and any(len(texts) > 1 for texts in by_prompt.values())


def test_rollouts_serve_several_steps(tmp_path):
    """`test_resume.py` has a run that goes on in the middle of them."""
    rows = logs(trained(tmp_path, num_iterations=2, max_steps=4))
    # One rollout for two steps: the same tokens, another loss.
    for first in 0, 2:
        block = rows[first : first + 2]
        assert len({row["tokens/single"] for row in block}) == 1 and len({row["loss"] for row in block}) == 2
        assert [row.get("seconds/rollout", 0) > 0 for row in block] == [True, False]
    assert rows[0]["tokens/single"] != rows[2]["tokens/single"]


def test_every_prompt_is_used_as_often_when_rollouts_are_reused(tmp_path):
    options = dict(num_iterations=2, max_steps=-1, num_train_epochs=1)
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, **options), PROMPTS[:10])
    seen = []
    original = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **k: (
        seen.extend(s.record["prompt"] for s in inputs["part"].samples),
        original(model, inputs, **k),
    )[1]
    trainer.train()
    assert sorted(seen) == sorted([r["prompt"] for r in PROMPTS[:10]] * 2)


def test_answers_from_the_data_are_mixed_in(tmp_path, demo_tokenizers):
    answer = "It is the answer from the data. <eos>"
    data = [{**r, "completion": answer} for r in PROMPTS[:16]] + PROMPTS[16:]
    options = dict(on_policy_fraction=0.25, per_device_train_batch_size=32, max_new_tokens=40, max_steps=1)
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, **options), data)
    trainer.train()
    samples = [s for inputs in trainer._inputs for part in inputs["parts"] for s in part.samples]
    off = [s for s in samples if not s.on_policy]
    assert 6 <= len(off) <= 16 and all("completion" in s.record for s in off)
    (row,) = logs(trainer)
    assert row["response/off_policy"] == pytest.approx(len(off) / 32)
    for s in off:
        assert s.response.finish_reason == "stop" and s.response.token_ids[-1] in trainer.pair.student_end_ids
        # Text, also where it looks like a special token.
        assert demo_tokenizers[0].decode(s.response.token_ids[:-1]) == answer
        assert s.response.token_ids[:-1].count(demo_tokenizers[0].eos_token_id) == 0
    assert trained(tmp_path / "on", max_steps=1).ratios is not None


def test_a_column_picks_the_teacher(tmp_path, demo_tokenizers):
    other = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    data = [{**r, "teacher": "large" if i % 2 else "small"} for i, r in enumerate(PROMPTS)]
    teachers = {"large": TEACHER, "small": other}
    tokenizers = {"small": demo_tokenizers[0]}
    arguments = config(tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer = SimCTTrainer(STUDENT, teachers, arguments, data, data[:6], teacher_processing_class=tokenizers)
    trainer.train()
    parts = [part for inputs in trainer._inputs for part in inputs["parts"]]
    assert sorted(part.teacher for part in parts) == ["large", "small"]
    for part in parts:
        assert {s.record["teacher"] for s in part.samples} == {part.teacher}
        if part.teacher == "small":  # its own vocabulary: every unit is single
            assert (part.alignment.student_length == 1).all()
            assert part.teacher_rows[0].shape[1] == other.config.hidden_size
    assert math.isfinite(trainer.evaluate()["eval_reverse_kl_per_byte"])
    with pytest.raises(
        ValueError, match="train_dataset, record 0: field 'teacher' is None: expected one of 'large', 'small'"
    ):
        SimCTTrainer(STUDENT, teachers, arguments, PROMPTS, teacher_processing_class=tokenizers)


def test_the_teacher_sees_more_than_the_student(tmp_path, demo_tokenizers):
    data = [{"prompt": "Return the", "teacher_context": "A hint."}]
    arguments = config(tmp_path, max_steps=1, per_device_train_batch_size=1, teacher_system_prompt="Be exact.")
    trainer = SimCTTrainer(STUDENT, TEACHER, arguments, data)
    trainer.train()
    (sample,) = trainer._inputs[0]["parts"][0].samples
    student, teacher = demo_tokenizers
    assert student.decode(sample.student_prompt, skip_special_tokens=True) == "Return the"
    shown = teacher.decode(sample.teacher_prompt, skip_special_tokens=True)
    assert shown == "Be exact.\nReturn the\n\nA hint.\n"


def test_stop_strings_end_a_response(tmp_path):
    arguments = config(
        tmp_path, max_steps=1, per_device_train_batch_size=16, max_new_tokens=32, stop_strings=[" the", "."]
    )
    trainer = SimCTTrainer(STUDENT, TEACHER, arguments, PROMPTS)
    trainer.train()
    samples = [s for part in trainer._inputs[0]["parts"] for s in part.samples]
    reasons = [s.response.finish_reason for s in samples]
    assert reasons.count("stop_string") > 4
    for s in samples:
        pieces = trainer.pair.student_pieces(s.response.token_ids)
        text, before = (b"".join(p or b"" for p in part) for part in (pieces, pieces[:-1]))
        assert not any(stop in before for stop in (b" the", b"."))
        if s.response.finish_reason == "stop_string":
            assert any(stop in text for stop in (b" the", b"."))


def poisoned(tmp_path, **options):
    """The teacher gives NaN for the prompt that starts like the first record's, at the second step it meets."""
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, max_steps=3, **options), PROMPTS)
    original, calls = trainer.teacher.hidden_states, []

    def hidden_states(prompts, responses):
        hidden = original(prompts, responses)
        calls.append(1)
        if len(calls) == 2:
            hidden[len(responses[0]) + 1] = float("nan")  # a row of the second response
        return hidden

    trainer.teacher.hidden_states = hidden_states
    return trainer


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    trainer = poisoned(tmp_path)
    with pytest.raises(
        FloatingPointError, match="step 2: the loss is nan; prompts, responses and units are in .*nonfinite-2-0.json"
    ):
        trainer.train()
    report = json.loads((tmp_path / "run" / "nonfinite-2-0.json").read_text())
    (response,) = report["responses"]
    assert response["record"] in PROMPTS and response["units"] and response["units"][0]["loss"] == "nan"
    assert response["units"][0]["text"] in response["response"]


def test_a_loss_that_is_no_number_can_be_skipped(tmp_path):
    trainer = poisoned(tmp_path, on_nonfinite="skip", save_strategy="steps", save_steps=1)
    with pytest.warns(UserWarning, match="step 2: the loss is nan.*the step is left out"):
        trainer.train()
    rows = logs(trainer)
    assert [row.get("skipped_steps") for row in rows] == [None, 1.0, None]
    one, two, three = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}").state_dict() for step in (1, 2, 3)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(two[name], three[name]) for name in one)
    assert all(torch.isfinite(value).all() for value in three.values())


def small_device(trainer, tokens):
    """A student that has no memory for more than so many tokens at once."""

    def limit(module, args, kwargs):
        if module.training and kwargs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("tried to allocate too much")

    trainer.model.model.register_forward_pre_hook(limit, with_kwargs=True)
    return trainer


def test_out_of_memory_is_retried_once_in_halves(tmp_path, plain):
    trainer = small_device(SimCTTrainer(STUDENT, TEACHER, config(tmp_path, **SGD), PROMPTS), 120)
    with pytest.warns(UserWarning, match="out of memory with .* tokens at once: once more in halves"):
        trainer.train()
    assert_same_weights(trainer, plain, rtol=1e-4, atol=1e-6)
    trainer = small_device(SimCTTrainer(STUDENT, TEACHER, config(tmp_path / "smaller", **SGD), PROMPTS), 50)
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="and with half of them: set max_tokens_per_batch to"),
    ):
        warnings.simplefilter("ignore")
        trainer.train()


def test_out_of_memory_of_shared_models_is_said(tmp_path, monkeypatch):
    """Not tried again: the other processes would wait for the second try."""
    trainer = small_device(SimCTTrainer(STUDENT, TEACHER, config(tmp_path, **SGD), PROMPTS), 120)
    monkeypatch.setattr(SimCTTrainer, "has_sharded_teacher", True)
    with pytest.raises(
        RuntimeError, match="out of memory with .* tokens in a forward pass: set max_tokens_per_batch to"
    ):
        trainer.train()


def test_out_of_memory_in_the_loss_is_retried_with_half_the_chunk(tmp_path, plain, monkeypatch):
    from simct.training import objectives

    original, asked = objectives.linear_simct_loss, []

    def loss(*args, chunk_rows, **kwargs):
        asked.append(chunk_rows)
        if chunk_rows != "auto" and chunk_rows > 8 or chunk_rows == "auto":
            raise torch.OutOfMemoryError("no room for logits")
        return original(*args, chunk_rows=chunk_rows, **kwargs)

    monkeypatch.setattr(objectives, "linear_simct_loss", loss)
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, **SGD, chunk_rows=16), PROMPTS)
    with pytest.warns(UserWarning, match="out of memory in the loss with chunk_rows=16: once more with 8"):
        trainer.train()
    assert asked == [16, 8] * 2
    assert_same_weights(trainer, plain, rtol=1e-4, atol=1e-6)
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path / "2", **SGD, chunk_rows=32), PROMPTS)
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="out of memory in the loss.* chunk_rows to 8 or less"),
    ):
        warnings.simplefilter("ignore")
        trainer.train()


def test_records_that_cannot_be_used_are_skipped_and_counted(tmp_path):
    data = [*PROMPTS[:4], {"text": "x"}, {"prompt": "word " * 500}]
    with pytest.warns(
        UserWarning, match="train_dataset: 2 of 6 records are skipped; train_dataset, record 4: expected a field"
    ):
        trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, on_bad_row="skip"), data)
    assert trainer.skipped_records == {"train_dataset": 2} and len(trainer.train_dataset) == 4
    with pytest.raises(
        ValueError, match="train_dataset has no record that can be used; train_dataset, record 0: expected"
    ):
        SimCTTrainer(STUDENT, TEACHER, config(tmp_path, on_bad_row="skip"), [{"text": "x"}])


def test_a_template_that_drops_the_prompt_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.chat_template = "{% for m in messages if m.role == 'human' %}{{ m.content }}{% endfor %}Answer:"
    with pytest.raises(ValueError, match="the student's chat template drops the prompt"):
        SimCTTrainer(STUDENT, TEACHER, config(tmp_path), PROMPTS, processing_class=tokenizer)


def test_a_response_budget_beyond_the_context_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens=600 too many for the student's context of 512"):
        SimCTTrainer(STUDENT, TEACHER, config(tmp_path, max_new_tokens=600), PROMPTS)


def test_template_options_reach_the_template(tmp_path):
    student, teacher = AutoTokenizer.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(TEACHER)
    for tokenizer in student, teacher:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if not thinking %} without thought{% endif %}"
        )
    options = dict(chat_template_kwargs='{"thinking": true}', teacher_chat_template_kwargs={"thinking": False})
    arguments = config(tmp_path, max_steps=1, per_device_train_batch_size=1, **options)
    data = [{"prompt": "Return the"}]
    trainer = SimCTTrainer(
        STUDENT, TEACHER, arguments, data, processing_class=student, teacher_processing_class=teacher
    )
    trainer.train()
    (sample,) = trainer._inputs[0]["parts"][0].samples
    assert student.decode(sample.student_prompt, skip_special_tokens=True) == "Return the"
    assert teacher.decode(sample.teacher_prompt, skip_special_tokens=True) == "Return the without thought"


@pytest.mark.parametrize(
    ("given", "expected", "told"),
    [
        (None, " with {'key': 1}", False),  # the student's
        ("{}", "", True),  # none, not the student's: the template's own, which thinks
        ('{"enable_thinking": false}', "", False),
    ],
)
def test_options_of_the_teachers_template(tmp_path, given, expected, told):
    """The student's hold where none are given, an empty mapping is given; and a thought on one side is told before the run."""
    student, teacher = AutoTokenizer.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(TEACHER)
    student.chat_template = "{{ messages[0].content }}"
    teacher.chat_template = student.chat_template + (
        "{% if key %} with {{ {'key': key} }}{% endif %}"
        "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    )
    arguments = config(tmp_path, chat_template_kwargs='{"key": 1}', teacher_chat_template_kwargs=given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = SimCTTrainer(
            STUDENT, TEACHER, arguments, PROMPTS[:1], processing_class=student, teacher_processing_class=teacher
        )
    (scorer,) = trainer.scorers.values()
    assert teacher.decode(scorer.render({"prompt": "Hi"})) == "Hi" + expected + ("<think>" if told else "")
    assert any("opens a thought (<think>)" in str(warning.message) for warning in caught) == told


def test_lora_exports_a_merged_student_and_trains_a_head_of_its_own(tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, modules_to_save=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    trainer = SimCTTrainer(
        model, STUDENT, config(tmp_path, packing="on"), PROMPTS, peft_config=adapter, processing_class=tokenizer
    )
    before = trainer.model.get_output_embeddings().modules_to_save["default"].weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.get_output_embeddings().modules_to_save["default"].weight, before)
    trainer.save_merged(str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[2, 40, 50]])
    torch.testing.assert_close(merged(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)


@pytest.mark.parametrize("bf16", [False, True])
def test_samples_from_a_copy_in_another_precision_follow_the_student(tmp_path, bf16):
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, rollout_dtype="bfloat16", bf16=bf16), PROMPTS, HELD_OUT)
    copy = trainer.engine.model
    assert copy.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    trainer.train()
    trainer._update_engine()
    own = trainer.model.state_dict()
    for name, value in copy.state_dict().items():
        assert torch.equal(value, own[name].to(torch.bfloat16)), name
    first = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.bfloat16).state_dict()
    assert any(not torch.equal(value, first[name]) for name, value in copy.state_dict().items())
