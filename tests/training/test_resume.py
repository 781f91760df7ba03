"""What a run goes on from: a checkpoint that is whole, and of the same run; anything else is said before the first step."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from kernels.cases import slow
from safetensors.torch import load_file, save_file
from test_trainer import PROMPTS, STUDENT, StopAt, assert_same_weights, config, logs
from test_wrong_runs import files, stream
from tiny import OPTIONS, tiny_trainer
from transformers import AutoModelForCausalLM

from simct.training import run_record
from simct.training.checkpoints import SAVING, newest_complete, problem, write_last

# Three steps of four: the third is in the middle of the second batch of rollouts.
RUN = dict(num_iterations=2, num_generations=2, max_steps=4, save_strategy="steps", save_steps=1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The output folder of a run that was stopped after three steps, and its unbroken twin's trainer."""
    folder = tmp_path_factory.mktemp("stopped")
    tiny_trainer(folder, callbacks=[StopAt(3)], **RUN).train()
    whole = tiny_trainer(folder / "whole", **{**RUN, "save_strategy": "no"})
    whole.train()
    return folder / "run", whole


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of that folder, and what goes on with it."""
    shutil.copytree(stopped[0], tmp_path / "run")
    return tmp_path / "run", lambda records=PROMPTS, **options: tiny_trainer(tmp_path, records, **{**RUN, **options})


def test_what_goes_on_equals_what_was_never_stopped(run, stopped):
    folder, trainer = run
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, stopped[1])
    assert logs(resumed)[-1]["loss"] == logs(stopped[1])[-1]["loss"]
    assert problem(folder / "checkpoint-4") is None and not (folder / SAVING).exists()


def test_a_run_that_was_stopped_behind_its_last_step_makes_no_other(run, stopped):
    trainer = run[1](max_steps=3)
    (run[0] / SAVING / "checkpoint-9").mkdir(parents=True)  # a save that was cut off
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and not (run[0] / SAVING).exists()
    saved = load_file(run[0] / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"records": PROMPTS[1:]}, "the data are not the same"),
        ({"num_generations": 3}, "num_generations is 3, it was 2"),
        ({"temperature": 0.5}, "rollouts that the checkpoint is in the middle of.*temperature is 0.5, it was 1.0"),
    ],
    ids=["data", "num_generations", "temperature"],
)
def test_another_run_is_told_before_the_first_step(run, options, message):
    trainer = run[1](**options)
    with pytest.raises(ValueError, match=f"{message}.*allow_changed_run=True"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step <= 3


def test_another_run_may_go_on_if_it_is_asked_to(run):
    options = dict(num_generations=3, temperature=0.5, seed=1, per_device_train_batch_size=1, allow_changed_run=True)
    trainer = run[1](PROMPTS[1:], **options)
    with pytest.warns(
        UserWarning, match="the data are not the same; seed is 1, it was 42; per_device_train_batch_size is 1"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and len(trainer._drawn) == 3


def test_everything_that_shapes_the_samples_is_in_the_record(tmp_path, demo_tokenizers):
    def changes(records=PROMPTS, processing_class=demo_tokenizers[0], **options):
        then = run_record.record_of(config(tmp_path, **OPTIONS), PROMPTS, demo_tokenizers[0])
        now = run_record.record_of(config(tmp_path, **{**OPTIONS, **options}), records, processing_class)
        return run_record.differences(now, json.loads(json.dumps(then)))

    assert changes() == changes(learning_rate=1.0, save_steps=7) == []
    for name in run_record.OPTIONS:
        assert changes(**{name: 3 if name != "on_policy_fraction" else 0.5})[0].startswith(f"{name} is ")
    assert changes(PROMPTS[::-1]) == changes(PROMPTS[:-1]) == ["the data are not the same"]
    assert changes([*PROMPTS[:-1], {**PROMPTS[-1], "teacher_context": "x"}]) == ["the data are not the same"]
    assert changes([{**record, "answer": "of no matter here"} for record in PROMPTS]) == []
    assert changes(processing_class=demo_tokenizers[1]) == ["the tokenizer is not the same"]
    assert run_record.data_digest(stream(PROMPTS)) == run_record.data_digest(stream(PROMPTS))
    assert run_record.data_digest(stream(PROMPTS)) != run_record.data_digest(stream(PROMPTS[1:]))


def test_rollouts_carry_what_they_were_drawn_for(run):
    folder, trainer = run
    saved = json.loads((folder / "checkpoint-3" / "simct_rollouts-0.json").read_text())
    sampling = asdict(trainer().sampling)
    assert {name: saved["run"][name] for name in sampling} == json.loads(json.dumps(sampling))
    other = {**saved, "run": {**saved["run"], "prompts": "0" * 32}}
    (folder / "checkpoint-3" / "simct_rollouts-0.json").write_text(json.dumps(other))
    write_last(folder / "checkpoint-3", trainer().record())
    with pytest.raises(ValueError, match="the prompts are not the same"):
        trainer().train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("told", [False, True])
def test_a_missing_optimiser_is_an_error(run, name, told):
    """Also where the checkpoint was written without it (`save_only_model`)."""
    folder, trainer = run
    (folder / "checkpoint-3" / name).unlink()
    if not told:
        write_last(folder / "checkpoint-3", trainer().record())
    with pytest.raises(ValueError, match=rf"checkpoint-3'?, which is not complete: {name} is missing"):
        trainer().train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    with pytest.warns(UserWarning, match=f"checkpoint-3 is not complete .{name} is missing"):
        assert newest_complete(folder) == str(folder / "checkpoint-2")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda folder: (folder / "simct_checkpoint.json").unlink(),
            "simct_checkpoint.json, its last file, is missing",
        ),
        (lambda folder: cut(folder / "simct_checkpoint.json"), "simct_checkpoint.json cannot be read"),
        (lambda folder: cut(folder / "model.safetensors"), r"model.safetensors has \d+ bytes, not"),
        (lambda folder: (folder / "simct_rollouts-0.json").unlink(), "simct_rollouts-0.json is missing"),
        (lambda folder: cut(folder / "trainer_state.json"), r"trainer_state.json has \d+ bytes, not"),
    ],
    ids=["no last file", "half a last file", "half the weights", "no rollouts", "half a state"],
)
def test_a_broken_checkpoint_is_passed_over_and_said(run, damage, reason):
    folder, trainer = run
    damage(folder / "checkpoint-3")
    with pytest.warns(UserWarning, match=f"checkpoint-3 is not complete .{reason}.*passed over"):
        assert newest_complete(folder) == str(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=f"which is not complete: {reason}"):
        trainer().train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_weights_that_a_checkpoint_lacks_are_an_error(run):
    folder, trainer = run
    path = folder / "checkpoint-3" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    write_last(path.parent, trainer().record())
    with pytest.raises(ValueError, match=r"the checkpoint has no weights for model\.layers\.0\.mlp\.up_proj\.weight"):
        trainer().train(resume_from_checkpoint=True)


class Died(BaseException):
    """As a signal that ends the process."""


def dying(*args, **kwargs):
    raise Died


def dying_within_weights(model, folder, **kwargs):
    os.makedirs(folder, exist_ok=True)
    dying_within_a_file(None, os.path.join(folder, "model.safetensors"))


def dying_within_a_file(content, path):
    with open(path, "wb") as file:
        file.write(b"half")
    raise Died


@pytest.mark.parametrize("at", ["save_pretrained", *slow("torch.save"), "write_last"])
def test_a_checkpoint_is_written_again_beside_the_one_that_is_there(run, monkeypatch, at):
    folder, trainer = run
    before = files(folder / "checkpoint-3")
    again = trainer()
    target = {
        "save_pretrained": (type(again.model), "save_pretrained", dying_within_weights),
        "torch.save": (torch, "save", dying_within_a_file),
        "write_last": ("simct.training.checkpoints.write_last", dying),
    }[at]
    monkeypatch.setattr(*target)
    with pytest.raises(Died):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert files(folder / "checkpoint-3") == before
    monkeypatch.undo()
    trainer().train(resume_from_checkpoint=str(folder / "checkpoint-2"))  # what was left is in nobody's way
    assert newest_complete(folder) == str(folder / "checkpoint-4") and not (folder / SAVING).exists()


def test_a_checkpoint_that_was_not_yet_renamed_is_found(run):
    folder, _ = run
    (folder / SAVING).mkdir()
    (folder / "checkpoint-3").rename(folder / SAVING / "checkpoint-3")
    assert newest_complete(folder) == str(folder / "checkpoint-3")
    shutil.copytree(folder / "checkpoint-3", folder / SAVING / "checkpoint-5")
    cut(folder / SAVING / "checkpoint-5" / "model.safetensors")
    assert newest_complete(folder) == str(folder / "checkpoint-3")


def test_the_final_student_is_written_beside_the_one_that_is_there(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    place = tmp_path / "student"
    trainer.save_model(str(place))
    (place / "notes.txt").write_text("another's")
    before = files(place)
    with torch.no_grad():
        trainer.model.model.norm.weight += 1
    monkeypatch.setattr(type(trainer.processing_class), "save_pretrained", dying)  # the weights are written before
    with pytest.raises(Died):
        trainer.save_model(str(place))
    assert {name: before[name] for name in before} == {
        n: c for n, c in files(place).items() if not n.startswith(SAVING)
    }
    monkeypatch.undo()
    # Shards of a larger student that was there.
    for name in "model-00001-of-00002.safetensors", "model.safetensors.index.json":
        (place / name).write_bytes(b"old")
    trainer.save_model(str(place))
    assert set(files(place)) == set(before)
    loaded = AutoModelForCausalLM.from_pretrained(place)
    assert torch.equal(loaded.model.norm.weight, trainer.model.model.norm.weight)


def test_a_student_that_is_half_in_its_place_does_not_load(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model(str(tmp_path / "student"))
    replace, calls = os.replace, []

    def once(*args):
        calls.append(args)
        return replace(*args) if len(calls) == 1 else dying()

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(Died):
        trainer.save_model(str(tmp_path / "student"))
    monkeypatch.undo()
    with pytest.raises((OSError, ValueError), match="config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "student")


def test_the_best_checkpoint_is_named_where_it_is(tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    best = dict(load_best_model_at_end=True, metric_for_best_model="reverse_kl_per_byte", save_total_limit=1)
    trainer = tiny_trainer(tmp_path, eval_dataset=PROMPTS[:2], **options, **best)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert os.path.dirname(best) == str(tmp_path / "run") and problem(best) is None
    for path in (tmp_path / "run").glob("checkpoint-*"):
        state = json.loads((path / "trainer_state.json").read_text())
        assert os.path.dirname(state["best_model_checkpoint"]) == str(tmp_path / "run")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) <= 2


def test_the_command_refuses_before_any_work(run, tmp_path, monkeypatch, capsys):
    """`simct train --resume_from_checkpoint`, in one line."""
    from simct.commands.cli import main

    folder, _ = run
    cut(folder / "checkpoint-3" / "model.safetensors")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, PROMPTS)))
    words = [
        "--student",
        STUDENT,
        "--teacher",
        STUDENT,
        "--data",
        str(data),
        "--output_dir",
        str(folder),
        "--use_cpu",
        "true",
    ]
    for asked, said in (
        (folder / "checkpoint-3", "is not complete: model.safetensors"),
        ("latest", "is of another run"),
    ):
        with pytest.raises(SystemExit), pytest.warns():
            main(["train", *words, "--max_new_tokens", "6", "--resume_from_checkpoint", str(asked)])
        assert said in " ".join(capsys.readouterr().err.split())
