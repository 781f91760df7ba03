import math

import pytest
import torch
from packages import needs_continuous_batching
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, TrainerCallback

from simct import SimCTConfig, SimCTTrainer
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.training import recorder
from simct.training.micro_batches import MicroBatch
from simct.training.recorder import Recorder
from simct_kernels import token_statistics

STUDENT, TEACHER = str(ASSETS / "student"), str(ASSETS / "teacher")
CONTINUOUS = pytest.param("continuous", marks=needs_continuous_batching)
PROMPTS = read_prompts(ASSETS / "train.jsonl")[:32]
HELD_OUT = read_prompts(ASSETS / "eval.jsonl")[:24]


def config(tmp_path, **options):
    defaults = dict(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=16,
        learning_rate=1e-3,
        max_new_tokens=16,
        temperature=1.0,
        top_p=1.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    return SimCTConfig(**{**defaults, **options})


def trained(tmp_path, **options):
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, **options), PROMPTS)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Trained with the options above. Not to be trained on."""
    return trained(tmp_path_factory.mktemp("plain"))


def logs(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def assert_same_weights(one, other, rtol=0.0, atol=0.0):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_gradient_accumulation_changes_nothing(tmp_path):
    # One prompt at a time, and all eight: the same rollouts, the same loss, the same weights after two steps.
    runs = [
        trained(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
        )
        for size in (8, 1)
    ]
    for run in runs[1:]:
        for ours, theirs in zip(logs(runs[0]), logs(run), strict=True):
            for name in (
                "loss",
                "loss/single",
                "tokens/longer",
                "response/length",
                "response/entropy",
                "reverse_kl_per_byte",
            ):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        assert_same_weights(runs[0], run, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_sum_over_units_divided_by_response_tokens(tmp_path):
    trainer = trained(tmp_path, max_steps=1, per_device_train_batch_size=8)
    (row,) = logs(trainer)
    tokens = row["response/length"] * 8
    batch = 8 * row["response/length"]
    assert tokens == batch
    single = row["tokens/single"] * tokens
    # Longer units are fewer than their tokens; the loss of both kinds adds up to the total.
    longer_sum = row["loss"] * tokens - row["loss/single"] * single
    units = longer_sum / row["loss/longer"]
    assert units == pytest.approx(round(units), abs=1e-2)
    assert 0 < units <= row["tokens/longer"] * tokens


def test_the_same_seed_gives_the_same_run(tmp_path, plain):
    other = trained(tmp_path)
    assert_same_weights(plain, other)
    assert [row["loss"] for row in logs(plain)] == [row["loss"] for row in logs(other)]
    assert logs(plain)[0]["loss"] != logs(trained(tmp_path, seed=1, max_steps=1))[0]["loss"]


def test_metrics_are_complete_and_consistent(plain):
    for row in logs(plain):
        shares = row["tokens/single"] + row["tokens/longer"] + row["tokens/unsupervised"]
        assert shares == pytest.approx(1)
        reasons = sum(value for name, value in row.items() if name.startswith("unsupervised/"))
        assert reasons == pytest.approx(row["tokens/unsupervised"])
        assert row["response/ended"] + row["response/cut_off"] == pytest.approx(1)
        assert 0 < row["teacher_mass"] <= 1.001 + row["tokens/longer"]
        assert 0 < row["response/entropy"] < math.log(2048)
        assert 0 <= row["response/whitespace"] < 1
        assert row["peak_memory_gb"] > 0.1
        for phase in "rollout", "align", "teacher", "student", "loss", "metrics", "other":
            assert row[f"seconds/{phase}"] >= 0, phase
        for phase in "rollout", "teacher", "student":
            assert row[f"tokens_per_second/{phase}"] > 0, phase
        assert math.isfinite(row["reverse_kl_per_byte"])


def test_a_large_micro_batch_is_measured_by_some_whole_responses(tmp_path, monkeypatch):
    """Statistics over two whole vocabularies of all its rows would cost more than its loss."""
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path), PROMPTS)
    samples = trainer.draw(PROMPTS[:6])

    def measured(samples):
        part = MicroBatch.build(samples, trainer.layout, trainer.default_teacher)
        trainer._score([part])
        with torch.no_grad():
            student = trainer.student_rows(trainer.model, part.packed)
        rows = []
        monkeypatch.setattr(recorder, "token_statistics", lambda *a: rows.append(len(a[0])) or token_statistics(*a))
        units = part.alignment.to("cpu")
        trainer.recorder.distributions(part, units, trainer.pair, trainer.shared, student, part.teacher_rows)
        return trainer.ratios.flush(), rows

    limit = sum(samples.response_lengths) // 3
    monkeypatch.setattr(recorder, "MEASURED_ROWS", limit)
    some, rows = measured(samples)
    chosen = recorder.evenly_chosen(samples.response_lengths, limit)
    assert 1 <= len(chosen) < len(samples)
    assert rows[0] == sum(samples.response_lengths[i] for i in chosen) < sum(samples.response_lengths)
    monkeypatch.setattr(recorder, "MEASURED_ROWS", 10**6)
    alone, _ = measured(samples.pick(chosen))
    assert {"response/entropy", "teacher_mass", "reverse_kl_per_byte"} < alone.keys()
    assert some == pytest.approx(alone, rel=1e-4)


def test_only_what_is_logged_is_measured(tmp_path, monkeypatch):
    asked, measured = [], []
    will_log, distributions = Recorder.will_log, Recorder.distributions

    def ask(self, state):
        asked.append((state.global_step, will_log(self, state)))
        return asked[-1][1]

    def measure(self, *args):
        measured.append(asked[-1][0])
        distributions(self, *args)

    monkeypatch.setattr(Recorder, "will_log", ask)
    monkeypatch.setattr(Recorder, "distributions", measure)
    trainer = trained(tmp_path, max_steps=4, logging_steps=2, logging_first_step=False)
    assert [row["step"] for row in logs(trainer)] == [2, 4]
    assert all("response/entropy" in row for row in logs(trainer))
    assert asked == [(0, False), (1, True), (2, False), (3, True)]
    assert measured == [1, 3]


def test_resumed_equals_uninterrupted(tmp_path):
    options = dict(gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    whole = trained(tmp_path / "whole", **options)
    first = SimCTTrainer(STUDENT, TEACHER, config(tmp_path / "half", **options), PROMPTS, callbacks=[StopAt(1)])
    first.train()
    second = SimCTTrainer(STUDENT, TEACHER, config(tmp_path / "half", **options), PROMPTS)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2
    assert_same_weights(whole, second)
    assert [row["loss"] for row in logs(whole)] == [row["loss"] for row in logs(second)]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_evaluations_repeat_themselves_and_count_their_samples(tmp_path):
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path), PROMPTS, HELD_OUT)
    first = trainer.evaluate()
    assert first == {**trainer.evaluate(), "eval_runtime": first["eval_runtime"]}
    assert first["eval_samples"] + first["eval_samples_unscored"] == len(HELD_OUT)


@pytest.mark.slow
def test_distillation_lowers_the_reverse_kl(tmp_path):
    """As the demo does in `commands/test_cli.py`, in fewer steps."""
    held_out = read_prompts(ASSETS / "eval.jsonl") * 2
    arguments = config(
        tmp_path, max_steps=40, per_device_train_batch_size=32, per_device_eval_batch_size=50, logging_steps=20,
        max_new_tokens=48, learning_rate=5e-4,
    )  # fmt: skip
    trainer = SimCTTrainer(STUDENT, TEACHER, arguments, read_prompts(ASSETS / "train.jsonl"), held_out)
    before = trainer.evaluate()
    assert before == {**trainer.evaluate(), "eval_runtime": before["eval_runtime"]}
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_samples"] + after["eval_samples_unscored"] == len(held_out)
    name = "eval_reverse_kl_per_byte"
    error = math.hypot(before[f"{name}_stderr"], after[f"{name}_stderr"])
    assert after[name] < before[name] - 2 * error


def test_the_best_checkpoint_is_the_one_of_least_reverse_kl(tmp_path):
    arguments = config(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, logging_steps=4,
        load_best_model_at_end=True, metric_for_best_model="reverse_kl_per_byte", save_total_limit=1, logging_first_step=False,
    )  # fmt: skip
    trainer = SimCTTrainer(STUDENT, TEACHER, arguments, PROMPTS, HELD_OUT)
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_reverse_kl_per_byte" in row]
    best = min(evaluations, key=lambda row: row["eval_reverse_kl_per_byte"])
    assert [row["step"] for row in evaluations] == [2, 4]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    # The phases of four steps, without the evaluations' rollouts.
    (row,) = logs(trainer)
    seconds = sum(value for name, value in row.items() if name.startswith("seconds/") and name != "seconds/other")
    evaluating = sum(row["eval_runtime"] for row in evaluations)
    assert 0 < seconds * 4 < trainer.state.log_history[-1]["train_runtime"] - evaluating


def test_the_teacher_is_frozen_and_its_head_never_applied(tmp_path, demo_teacher):
    before = {name: value.clone() for name, value in demo_teacher.state_dict().items()}
    from transformers import AutoTokenizer

    trainer = SimCTTrainer(
        STUDENT,
        demo_teacher,
        config(tmp_path),
        PROMPTS,
        teacher_processing_class=AutoTokenizer.from_pretrained(TEACHER),
    )
    calls = []
    handle = demo_teacher.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    handle.remove()
    assert not calls and not demo_teacher.training
    for name, value in demo_teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"units": "single"},
        {"alignment": "anchored"},
        {"candidates": "disjoint", "score": "sum_logprob"},
        {"score": "mean_logit", "teacher_mass_floor": 0.5, "beta": 0.5},
        {"top_k": 16, "loss_temperature": 2.0, "beta": 0.0},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_options_reach_the_loss(tmp_path, plain, options):
    row = logs(trained(tmp_path, max_steps=1, **options))[0]
    assert math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0
    if options.get("units") == "single":
        assert row["tokens/longer"] == 0 and row["unsupervised/longer_unit"] > 0
    elif options.get("alignment") == "anchored":
        assert row["tokens/single"] < logs(plain)[0]["tokens/single"]


def test_mixed_precision_rounds_the_loss(tmp_path, tape):
    (exact,) = logs(trained(tmp_path, max_steps=1, rollout_engine="static"))
    tape.rewind()  # bf16 would sample other responses, and others on every kind of chip
    (row,) = logs(trained(tmp_path, max_steps=1, rollout_engine="static", bf16=True))
    assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
    assert row["loss"] != exact["loss"]
    assert row["loss"] == pytest.approx(exact["loss"], rel=0.05)


@pytest.mark.parametrize("engine", ["static", CONTINUOUS])
def test_mixed_precision_reaches_the_student(tmp_path, engine):
    arguments = config(tmp_path, max_steps=1, bf16=True, rollout_engine=engine)
    trainer = SimCTTrainer(STUDENT, TEACHER, arguments, PROMPTS)
    seen = set()
    layer = trainer.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: seen.add((module.training, output.dtype)))
    trainer.train()
    # Sampling is in evaluation mode; a paged cache keeps the weights' precision.
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16 if engine == "static" else torch.float32)}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_units_under_the_mass_floor_count_as_unsupervised(tmp_path, plain):
    (row,) = logs(trained(tmp_path, max_steps=1, teacher_mass_floor=0.9))
    plain = logs(plain)[0]
    assert 0 < row["unsupervised/teacher_mass_floor"] < 1
    assert row["tokens/unsupervised"] == pytest.approx(
        row["unsupervised/teacher_mass_floor"] + plain["tokens/unsupervised"]
    )
    assert row["tokens/single"] < plain["tokens/single"]


def test_what_does_not_fit_the_teachers_context_is_counted(tmp_path, demo_teacher, demo_tokenizers):
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    teacher.config.max_position_embeddings = 12
    prompts = [{"prompt": "Return the"}] * 8
    arguments = config(tmp_path, max_steps=1, per_device_train_batch_size=8, max_new_tokens=24)
    trainer = SimCTTrainer(STUDENT, teacher, arguments, prompts, teacher_processing_class=demo_tokenizers[1])
    trainer.train()
    (row,) = logs(trainer)
    assert row["tokens/unsupervised"] > 0 and math.isfinite(row["loss"])
    assert row["tokens/single"] + row["tokens/longer"] + row["tokens/unsupervised"] == pytest.approx(1)


def test_lora_trains_the_adapter_and_leaves_the_head(tmp_path):
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    head = model.lm_head.weight.clone()
    trainer = SimCTTrainer(
        model, TEACHER, config(tmp_path), PROMPTS, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    )
    other = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    again = SimCTTrainer(
        other, TEACHER, config(tmp_path), PROMPTS, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    )
    assert_same_weights(trainer, again)  # the adapter's first weights are drawn with the run's seed
    adapters = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapters and all("lora" in name for name in adapters)
    trainer.train()
    assert any(not torch.equal(p, adapters[n]) for n, p in trainer.model.named_parameters() if n in adapters)
    assert torch.equal(trainer.model.get_output_embeddings().weight, head)


def test_a_saved_student_loads(tmp_path, plain):
    plain.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    ids = torch.tensor([[2, 40, 50]])
    torch.testing.assert_close(loaded(ids).logits, plain.model.eval()(ids).logits)


def test_bad_input_is_named_before_any_work(tmp_path, demo_tokenizers):
    student_tokenizer, teacher_tokenizer = demo_tokenizers
    arguments = config(tmp_path)
    with pytest.raises(ValueError, match="train_dataset is empty"):
        SimCTTrainer(STUDENT, TEACHER, arguments, [])
    with pytest.raises(ValueError, match="train_dataset, record 0: expected a field 'prompt' or 'messages'"):
        SimCTTrainer(STUDENT, TEACHER, arguments, [{"text": "x"}])
    with pytest.raises(ValueError, match="train_dataset, record 2: field 'prompt' is 3: expected text or"):
        SimCTTrainer(STUDENT, TEACHER, arguments, [*PROMPTS[:2], {"prompt": 3}])
    with pytest.raises(ValueError, match="train_dataset, record 1: prompt .* is refused by the tokenizer"):
        SimCTTrainer(STUDENT, TEACHER, arguments, [PROMPTS[0], {"prompt": "half a character \ud800"}])
    with pytest.raises(ValueError, match="record 0: the prompt has 1001 student tokens.* the student's context of 512"):
        SimCTTrainer(STUDENT, TEACHER, arguments, [{"prompt": "word " * 500}])
    with pytest.raises(ValueError, match="eval_dataset is a generator without a length"):
        SimCTTrainer(STUDENT, TEACHER, arguments, PROMPTS, (record for record in PROMPTS))
    with pytest.raises(ValueError, match="backend 'cuda' is not in this installation, which has 'auto'"):
        SimCTTrainer(STUDENT, TEACHER, config(tmp_path, backend="cuda"), PROMPTS)
    with pytest.raises(ValueError, match="student '/nowhere' cannot be loaded"):
        SimCTTrainer("/nowhere", TEACHER, arguments, PROMPTS)

    tiny = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="teacher's lm_head has 64 rows but its tokenizer"):
        SimCTTrainer(STUDENT, LlamaForCausalLM(tiny), arguments, PROMPTS, teacher_processing_class=teacher_tokenizer)
    with pytest.raises(ValueError, match="teacher LlamaModel has no lm_head"):
        SimCTTrainer(STUDENT, LlamaModel(tiny), arguments, PROMPTS, teacher_processing_class=teacher_tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, "beta is 1.5"),
        ({"score": "product"}, "score is 'product'"),
        ({"candidates": "all"}, "candidates is 'all'"),
        ({"alignment": "strings"}, "alignment is 'strings'"),
        ({"units": "longer"}, "units is 'longer'"),
        ({"rollout_engine": "sglang"}, "rollout_engine is 'sglang'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"loss_temperature": 0.0}, "loss_temperature is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"teacher_mass_floor": 2.0}, "teacher_mass_floor is 2.0"),
        ({"chunk_rows": -1}, "chunk_rows is -1"),
        ({"special_tokens": "none"}, "special_tokens is 'none'"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
