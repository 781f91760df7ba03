"""The objectives on byte prefixes in a run: their tables, and the demo pair trained with each."""

import pytest
import torch
from kernels.cases import slow
from test_trainer import PROMPTS, STUDENT, TEACHER, config, logs

from bench.quality.settings import Spelling
from simct import SimCTTrainer
from simct.pairing.coverage import most_digits
from simct.pairing.pair import TokenizerPair
from simct.training import objectives
from simct_kernels import escd_loss
from simct_kernels.torch_backend import plan


def test_the_tables_of_a_pair(demo_tokenizers):
    student, teacher = demo_tokenizers
    pair = TokenizerPair(student, teacher)
    sizes = len(pair.student_pieces([])) + len(student) + 7, len(teacher) + 3
    tables = pair.prefix_tables(*sizes)
    assert (tables.student_size, tables.teacher_size) == sizes
    # Every shared token goes to its partner, the end of turn to the end of turn, a head's filling nowhere.
    assert tables.home[pair.shared.teacher_ids].equal(pair.shared.student_ids)
    assert tables.home[pair.end_pair[1]] == pair.end_pair[0]
    assert (tables.home[len(teacher) :] == sizes[0]).all() and not tables.routed[len(student) :].any()
    # This student has every byte.
    spelled = [i for i, piece in enumerate(pair.teacher_pieces(range(len(teacher)))) if piece]
    homes = pair.student_pieces(tables.home[spelled])
    for piece, home in zip(pair.teacher_pieces(spelled), homes, strict=True):
        assert piece.startswith(home)


def test_all_ends_of_the_teacher_are_the_end(demo_tokenizers):
    student, teacher = demo_tokenizers
    pair = TokenizerPair(student, teacher)
    pair.teacher_end_ids = (*pair.teacher_end_ids, 17)  # a chat model's second end of turn
    tables = pair.prefix_tables(len(student), len(teacher))
    assert tables.home[17] == pair.end_pair[0]


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("bpm", {"alignment": "anchored"}),
        ("escd", {"units": "merged"}),
        *slow(("bpm", {}), ("escd", {}), ("bpm", {"units": "merged"}), ("escd", {"alignment": "anchored"})),
    ],
    ids=str,
)
def test_the_loss_falls(tmp_path, objective, options):
    # One batch of responses for all steps: the same rows, so that the loss has nothing to do but fall.
    steps = dict(max_steps=8, num_iterations=8, max_logprob_gap=9, per_device_train_batch_size=8)
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, objective=objective, **steps, **options), PROMPTS)
    trainer.train()
    losses = [row["loss"] for row in logs(trainer)]
    assert len(losses) == 8 and all(row["tokens/longer"] > 0 for row in logs(trainer))
    assert losses[-1] < 0.7 * losses[0] and losses[4] < losses[0], losses


@pytest.mark.parametrize("objective", ["bpm", "uld", *slow("escd")])
def test_out_of_memory_halves_the_objectives_own_chunk(tmp_path, monkeypatch, objective):
    monkeypatch.setitem(plan._AUTO_ELEMENTS, "cpu", 1 << 17)
    original, asked = getattr(objectives, f"{objective}_loss"), []

    def loss(*args, chunk_rows, **kwargs):
        asked.append(chunk_rows)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("no room for logits")
        return original(*args, chunk_rows=chunk_rows, **kwargs)

    monkeypatch.setattr(objectives, f"{objective}_loss", loss)
    trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, objective=objective, max_steps=1), PROMPTS)
    with pytest.warns(UserWarning, match="out of memory in the loss with chunk_rows="):
        trainer.train()
    columns = max(trainer.model.config.vocab_size, trainer.teacher.model.config.vocab_size)
    matrices = {"bpm": 7, "escd": 7, "uld": 4}[objective]
    assert asked == ["auto", (1 << 17) // (matrices * columns) // 2] and asked[1] > 1


def test_the_trainer_says_where_responses_end(tmp_path, monkeypatch):
    """Cut into micro-batches or not, the loss is the same: no completion reaches into the next response."""
    seen = []

    def loss(*args, **kwargs):
        assert sum(args[6]) == len(args[4].student_tokens)
        seen.append(len(args[6]))
        return escd_loss(*args, **kwargs)

    monkeypatch.setattr("simct.training.objectives.escd_loss", loss)
    runs = []
    for budget in (None, 60):
        options = dict(objective="escd", max_steps=1, per_device_train_batch_size=8, max_tokens_per_batch=budget)
        trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path / str(budget), **options), PROMPTS)
        trainer.train()
        runs.append(logs(trainer)[0])
    assert seen[0] == 8 and len(seen) > 2
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"], rel=1e-5)
    assert runs[0]["grad_norm"] == pytest.approx(runs[1]["grad_norm"], rel=1e-4)


# ---- "auto" ----


def test_the_digits_of_a_token():
    text = ["17+5-8 is 14 and 305*21 is 6405, " * 9]
    one, three = Spelling(300, digits=1).make(text), Spelling(300).make(text)
    assert most_digits(TokenizerPair(one, three))[0] == 1 and most_digits(TokenizerPair(three, one))[1] == 1
    assert most_digits(TokenizerPair(three, three))[0] in (2, 3)


@pytest.mark.parametrize(
    ("digits", "options", "expected"),
    [
        ((1, 3), {}, "escd"),
        ((1, 1), {}, "simct"),
        ((3, 1), {}, "simct"),
        ((2, 3), {}, "simct"),
        ((1, 3), {"units": "single"}, "simct"),
        ((1, 3), {"beta": 0.5}, "simct"),
        ((1, 3), {"stop": "class"}, "simct"),
        ((1, 3), {"objective": "bpm"}, "bpm"),
    ],
    ids=str,
)
def test_what_auto_means(digits, options, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("simct.pairing.coverage.most_digits", lambda pair: digits)
    args = config(tmp_path, **{"objective": "auto", **options})
    assert args.objective_for(None) == expected
    assert args.objective_for(None, served=True) == ("bpm" if expected == "bpm" else "simct")


def test_a_run_says_what_it_chose(tmp_path, monkeypatch, capsys):
    def run(objective):
        trainer = SimCTTrainer(STUDENT, TEACHER, config(tmp_path, objective=objective, max_steps=1), PROMPTS)
        return trainer, " ".join(capsys.readouterr().out.split())

    assert "digits" not in run("simct")[1] + run("auto")[1]
    monkeypatch.setattr("simct.pairing.coverage.most_digits", lambda pair: (1, 3))
    trainer, said = run("simct")
    assert trainer.args.objective == "simct" and "--objective auto takes escd" in said
    trainer, said = run("auto")
    assert trainer.args.objective == trainer.scorers[trainer.default_teacher].objective == "escd"
    assert "Objective: escd, as the student writes digits one by one" in said
    trainer.train()
    assert logs(trainer)[0]["loss"] > 0
