"""A run that has gone wrong stops: gradients, weights and logits that are no numbers, a step without a unit. Nothing good is
overwritten by it."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file
from test_trainer import PROMPTS, logs
from tiny import tiny_trainer
from transformers import TrainerCallback

from simct.rollouts.protocol import Response
from simct.training.checkpoints import newest_complete


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Poison(TrainerCallback):
    """A weight of the student is no number from the end of a step on."""

    def __init__(self, step, value=float("nan")):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "norm" in name or "lora_B" in name).view(-1)[3] = (
                    self.value
                )


def poisoned(tmp_path, step, records=PROMPTS, value=float("nan"), **options):
    return tiny_trainer(tmp_path, records, [Poison(step, value)], **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, value):
    trainer = poisoned(tmp_path, 2, value=value, max_steps=4, save_strategy="steps", save_steps=1)
    with pytest.raises(
        FloatingPointError, match=r"step 2: model\.\S*norm\S* of the student.*checkpoint-2 is not written"
    ):
        trainer.train()
    run = tmp_path / "run"
    assert newest_complete(run) == str(run / "checkpoint-1")
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(tensor.isfinite().all() for tensor in load_file(run / "checkpoint-1" / "model.safetensors").values())


def test_a_good_student_is_not_overwritten_by_one_that_is_no_number(tmp_path):
    trainer = poisoned(tmp_path, 0)
    trainer.save_model(str(tmp_path / "student"))
    before = files(tmp_path / "student")
    Poison(0).on_step_end(None, trainer.state, None, model=trainer.model)
    with pytest.raises(FloatingPointError, match="student is not written, what was saved before is as it was"):
        trainer.save_model(str(tmp_path / "student"))
    assert files(tmp_path / "student") == before


def test_a_merged_student_that_is_no_number_is_not_written(tmp_path):
    from peft import LoraConfig

    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"], r=2))
    trainer.save_merged(str(tmp_path / "student"))
    before = files(tmp_path / "student")
    with torch.no_grad():  # finite factors, whose product is not
        for name, parameter in trainer.model.named_parameters():
            if "lora" in name:
                parameter.fill_(1e30)
    with pytest.raises(FloatingPointError, match="q_proj.*student is not written"):
        trainer.save_merged(str(tmp_path / "student"))
    assert files(tmp_path / "student") == before


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_student_that_is_no_number_is_not_sampled_from(tmp_path, on_nonfinite):
    trainer = poisoned(tmp_path, 1, max_steps=4, on_nonfinite=on_nonfinite)
    with pytest.raises(FloatingPointError, match="token 0 of a sampled response has the log-probability nan"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_skipping_steps_is_no_way_on_for_a_student_that_is_no_number(tmp_path):
    data = [{**record, "completion": " It is the answer."} for record in PROMPTS]
    trainer = poisoned(tmp_path, 1, data, max_steps=4, on_nonfinite="skip", on_policy_fraction=0.0)
    with pytest.raises(
        FloatingPointError, match=r"step 2: the loss is nan.*; model\.\S*norm\S* of the student: no finite numbers"
    ):
        trainer.train()


def with_bad_gradient(tmp_path, call, value, **options):
    """The gradient of one weight is no number at its `call`-th backward pass, the loss is one."""
    trainer = tiny_trainer(tmp_path, **{"max_steps": 3, **options})
    calls, steps = [], {}

    def spoil(gradient):
        calls.append(1)
        return torch.full_like(gradient, value) if len(calls) == call else gradient

    trainer.model.model.norm.weight.register_hook(spoil)

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    trainer.add_callback(Keep)
    return trainer, steps


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (float("nan"), {}),
        (float("inf"), {"max_grad_norm": 0.0}),  # no clipping
        (float("-inf"), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    ],
    ids=str,
)
def test_a_gradient_that_is_no_number_stops_the_run_before_the_optimiser(tmp_path, value, options):
    first = 1 + options.get("gradient_accumulation_steps", 1)  # backward passes up to the first of step 2
    trainer, steps = with_bad_gradient(tmp_path, first, value, **options)
    with pytest.raises(FloatingPointError, match="step 2: the gradient norm is .*nonfinite-2-0.json"):
        trainer.train()
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in trainer.model.state_dict().items())
    report = json.loads((tmp_path / "run" / "nonfinite-2-0.json").read_text())
    assert len(report["responses"]) == 2 and all(entry["record"] in PROMPTS for entry in report["responses"])


def test_a_gradient_that_is_no_number_can_be_skipped(tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "on_nonfinite": "skip"}
    trainer, steps = with_bad_gradient(tmp_path, 3, float("nan"), **options)
    with pytest.warns(UserWarning, match="step 2: the gradient norm is nan.*the step is left out"):
        trainer.train()
    assert [row.get("skipped_steps") for row in logs(trainer)] == [None, 1.0, None]
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in steps[2].items())
    assert any(not torch.equal(tensor, steps[2][name]) for name, tensor in steps[3].items())


class Spells:
    """A rollout engine whose responses are made of one token, another one for every prompt."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def update_weights(self, model):
        pass

    def generate(self, prompts, sampling, *, seed):
        return [Response([token] * 3, "length") for token in (self.tokens * len(prompts))[: len(prompts)]]


def without_units(tmp_path, *tokens, **options):
    """The student writes tokens that spell nothing (as it does where its logits are no numbers), and those given."""
    trainer = tiny_trainer(tmp_path, **{"max_steps": 1, **options})
    trainer.collector.engine = Spells(trainer.processing_class.bos_token_id, *tokens)
    return trainer


def test_a_step_without_a_unit_stops_the_run(tmp_path):
    trainer = without_units(tmp_path)
    with pytest.raises(
        RuntimeError, match="step 1: 2 responses of 6 tokens have not a single unit.*nonfinite-1-0.json"
    ):
        trainer.train()
    assert len(json.loads((tmp_path / "run" / "nonfinite-1-0.json").read_text())["responses"]) == 2


def test_a_step_without_a_unit_can_be_skipped(tmp_path):
    trainer = without_units(tmp_path, on_nonfinite="skip")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.warns(UserWarning, match="have not a single unit.*the step is left out"):
        trainer.train()
    assert logs(trainer)[0]["skipped_steps"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_step_is_looked_at_as_a_whole(tmp_path, demo_tokenizers):
    (word,) = demo_tokenizers[0](" the", add_special_tokens=False)["input_ids"][:1]
    trainer = without_units(tmp_path, word, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.train()
    units = [len(part.alignment.student_start) for inputs in trainer._inputs for part in inputs["parts"]]
    assert units[0] == 0 and units[1] > 0 and "skipped_steps" not in logs(trainer)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trainer after one step."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("made"), max_steps=1)
    trainer.train()
    return trainer


def test_the_processes_decide_together(made, monkeypatch):
    """What another process adds to the flags counts here; `test_distributed` has two real ones."""
    nan = torch.tensor([1.0, 0.0])
    monkeypatch.setattr(made.accelerator, "reduce", lambda tensor, how: tensor + nan)
    with pytest.raises(FloatingPointError, match="the loss of another process is no number"):
        made.check_step()


def test_an_overflow_at_the_loss_scale_is_the_scalers_matter(made, monkeypatch):
    monkeypatch.setattr(made, "_grad_norm", torch.tensor(float("inf")))
    scale = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 65536.0)
    monkeypatch.setattr(made.accelerator, "scaler", scale)
    made.check_step()
    monkeypatch.setattr(scale, "get_scale", lambda: 1.0)
    with pytest.raises(FloatingPointError, match="the gradient norm is inf"):
        made.check_step()


def test_a_step_is_looked_at_with_one_wait_for_the_device(made, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        """Numbers that Python asks of a tensor: `item()`, `bool()`, `float()`."""

        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    lists, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (lists.append(1), original(tensor))[1])
    with Reads() as reads:
        made.check_step()
    assert reads.found + len(lists) == 1


def stream(records):
    return IterableDataset.from_generator(lambda: iter(records))


LONG = {"prompt": "word " * 500}


def test_a_streamed_prompt_that_does_not_fit_is_refused_when_it_is_sampled_from(tmp_path):
    trainer = tiny_trainer(tmp_path, stream([*PROMPTS[:2], LONG, *PROMPTS]))
    with pytest.raises(ValueError, match="streamed record .*word.* has 1001 student tokens.*context of 64"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_streamed_prompt_that_does_not_fit_is_left_out_and_counted(tmp_path):
    records = [*PROMPTS[:2], LONG, PROMPTS[2], LONG, LONG, *PROMPTS]
    trainer = tiny_trainer(tmp_path, stream(records), on_bad_row="skip", max_steps=4)
    with pytest.warns(UserWarning, match="streamed record .* too many for the student's context of 64; skipped"):
        trainer.train()
    assert trainer.skipped_records == {"train_dataset": 3}
    rows = logs(trainer)
    assert [row["skipped_records"] for row in rows] == [0, 0.5, 1, 0]
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1, None]  # nothing was left of the third
