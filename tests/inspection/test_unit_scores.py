"""Both models' scores of units, on `simct inspect --models` and on the pages of a run."""

import pytest
import torch
from inspect_html import Page

from simct import SimCTConfig, SimCTTrainer, console
from simct.commands.cli import main
from simct.commands.inspect import SAMPLES
from simct.data.prompts import render_prompt
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.inspection.samples import SamplePages
from simct.pairing.pair import TokenizerPair
from simct_kernels import LMHead, bpm_loss, simct_loss

STUDENT, TEACHER = str(ASSETS / "student"), str(ASSETS / "teacher")
TEXT = "def mean(values):\n    return sum(values) / len(values)\n\n\nNaïve cafés, 12 345."


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, tmp_path):
    for stream in console.console, console.errors:
        monkeypatch.setattr(stream, "_width", 160)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def inspect(capsys, tmp_path):
    """Runs `simct inspect` on TEXT; its output and its page (None if it ended with an error, as `code` expects)."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def run(*words: str, code: int = 0):
        arguments = ["inspect", STUDENT, TEACHER, *map(str, words)]
        if code:
            with pytest.raises(SystemExit) as end:
                main(arguments)
            assert end.value.code == code
        else:
            main(arguments)
        output = capsys.readouterr()
        page = tmp_path / "page.html"
        return output.out + output.err, Page(page.read_text("utf-8")) if page.exists() else None

    return run


def logits(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[len(response), V], by the model's own forward pass."""
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()


def expected(pair, models, prompts, student_ids, **loss):
    """Losses, student's and teacher's scores of a response's units, from whole logits."""
    (teacher_ids,) = pair.encode_teacher([student_ids])
    units = pair.align(student_ids, teacher_ids)
    ids = (student_ids, teacher_ids)
    ours, theirs = (logits(*row) for row in zip(models, prompts, ids, strict=True))
    losses = simct_loss(ours, theirs, units, pair.shared, reduction="none", backend="reference", **loss)
    scores = []
    for values, tokens, starts, lengths in (
        (ours, student_ids, units.student_start, units.student_length),
        (theirs, teacher_ids, units.teacher_start, units.teacher_length),
    ):
        own = values.log_softmax(1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        scores.append([float(own[s : s + n].mean()) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
    return losses.tolist(), *scores


def scores_of(unit) -> tuple[float, float]:
    words = unit.title.split("log-probability a token: student ")[1].split(" nats")[0]
    student, teacher = words.split(", teacher ")
    return float(student), float(teacher)


def assert_scored(units, losses, student, teacher):
    assert [unit.loss for unit in units] == pytest.approx(losses, rel=2e-3, abs=2e-5)
    assert [scores_of(unit)[0] for unit in units] == pytest.approx(student, abs=2e-3)
    assert [scores_of(unit)[1] for unit in units] == pytest.approx(teacher, abs=2e-3)


@pytest.fixture
def demo(demo_tokenizers, demo_student, demo_teacher):
    return TokenizerPair(*demo_tokenizers), (demo_student.eval(), demo_teacher)


def test_scores_are_those_of_both_models_after_a_beginning(inspect, demo, demo_tokenizers):
    output, page = inspect("--text", "text.txt", "--whole", "--models", "--html", "page.html")
    pair, models = demo
    prompts = [render_prompt("", tokenizer, "text") for tokenizer in demo_tokenizers]
    assert [len(prompt) for prompt in prompts] == [1, 1]
    (ids,) = pair.encode_student([TEXT])
    losses, student, teacher = expected(pair, models, prompts, ids)
    assert len(page.texts) == 1 and b"".join(piece for _, piece, _ in page.line(0, 1)) == TEXT.encode()
    assert_scored(page.texts[0], losses, student, teacher)
    assert "Costliest units" in output and f"{max(losses):.3f}" in output and "One answer, text.txt." in page.words
    assert page.words.count("Prompt") == 0
    costliest = [unit.loss for unit in page.ranked][-12:]
    assert costliest[0] == pytest.approx(max(losses), rel=2e-3) and costliest == sorted(costliest, reverse=True)


def test_scores_behind_a_prompt(inspect, demo, demo_tokenizers):
    prompt = "Write <b>code</b>."
    _, page = inspect(
        "--text", "text.txt", "--models", "--prompt", prompt, "--prompt_format", "text", "--html", "page.html"
    )
    pair, models = demo
    prompts = [render_prompt(prompt, tokenizer, "text") for tokenizer in demo_tokenizers]
    parts = [part for part in TEXT.split("\n\n") if part.strip()]
    assert len(page.texts) == len(parts) == 2 and page.words.count(prompt) == 2
    for units, ids in zip(page.texts, pair.encode_student(parts), strict=True):
        assert_scored(units, *expected(pair, models, prompts, ids))


def test_without_models_there_are_no_scores(inspect):
    output, page = inspect("--verbose", "--html", "page.html")
    assert len(page.texts) == len(SAMPLES) and not any("loss" in unit.title for text in page.texts for unit in text)
    assert "Built-in samples." in page.words and "Costliest" not in output + page.words
    for words in (
        "Largest units",
        "Shared vocabulary by script",
        "What follows from the figures",
        "punctuation and symbols",
    ):
        assert words in output and words in page.words
    assert "page: page.html" in output


def test_the_terminal_says_what_it_does_not_draw(inspect, tmp_path):
    (tmp_path / "long.txt").write_text("What a long text. " * 200)
    output, page = inspect("--text", "long.txt", "--html", "page.html", "--max_tokens", "40")
    assert "student tokens; --html draws more." in " ".join(output.split())
    assert 30 < len(page.line(0, 0)) <= 40 and "Drawn are the first" in page.words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x"], "--prompt is 'x' without --models"),
        (["--models", "--prompt", ""], "--prompt is ''"),
        (["--models", "--prompt_format", "chat"], "--prompt_format is 'chat' without --prompt"),
        (["--max_tokens", "5"], "--max_tokens is 5 without --html"),
        (["--html", "page.html", "--max_tokens", "0"], "--max_tokens is 0: expected at least 1"),
        (["--whole"], "--whole is given without --text"),
        (["--text", "blank.txt"], "text file 'blank.txt' is empty"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--html", "text.txt/page.html"], "output 'text.txt/page.html' cannot be written"),
        (["--models", "--prompt", "x", "--prompt_format", "chat"], "no chat template"),
        (
            ["--models", "--text", "endless.txt"],
            "paragraph 1' has 4,002 student tokens, behind a prompt of 1: expected at most 512 in the",
        ),
    ],
)
def test_bad_input_ends_before_any_work(inspect, tmp_path, words, message):
    (tmp_path / "blank.txt").write_text("\n\n  \n")
    (tmp_path / "endless.txt").write_text("no end " * 2000)
    output, page = inspect(*words, code=2)
    assert message in " ".join(output.split()) and page is None and "Traceback" not in output


# ---- A run's pages ----


def trainer(tmp_path, teacher=TEACHER, held_out=None, records=None, **settings):
    defaults = dict(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=8,
        learning_rate=1e-3, max_new_tokens=16, temperature=1.0, top_p=1.0, save_strategy="no", use_cpu=True,
        disable_tqdm=True, report_to=[], inspect_samples=3,
    )  # fmt: skip
    records = records or read_prompts(ASSETS / "train.jsonl")[:8]
    held_out = held_out or read_prompts(ASSETS / "eval.jsonl")[:6]
    run = SimCTTrainer(STUDENT, teacher, SimCTConfig(**{**defaults, **settings}), records, held_out)
    run.add_callback(SamplePages(run))  # as `simct train` does
    return run


def pages(tmp_path) -> dict[str, Page]:
    return {path.name: Page(path.read_text("utf-8")) for path in (tmp_path / "run").glob("*.html")}


def test_each_evaluation_of_a_run_writes_a_page(tmp_path, demo):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    with_pages = run.evaluate()
    drawn = run.draw(run.eval_dataset)
    run.train()
    found = pages(tmp_path)
    assert set(found) == {"inspect-0.html", "inspect-1.html", "inspect-2.html"}
    page, (pair, models) = found["inspect-0.html"], demo
    assert len(page.texts) == 3
    for number, sample in enumerate(drawn[:3]):
        assert [token for token, _, _ in page.line(number, 0)] == sample.response.token_ids
        assert [token for token, _, _ in page.line(number, 1)] == sample.teacher_response
        prompts = (sample.student_prompt, sample.teacher_prompt)
        units = [unit for unit in page.texts[number] if unit.kind != "unsupervised"]
        assert_scored(units, *expected(pair, models, prompts, sample.response.token_ids))
        assert run.eval_dataset[number]["prompt"] in page.words
    assert "The first 3 responses of the evaluation at step 0" in page.words
    # The page is no part of the measurement.
    run = trainer(tmp_path / "without", inspect_samples=0)
    plain = run.evaluate()
    assert not pages(tmp_path / "without")
    for name in plain:
        assert name == "eval_runtime" or plain[name] == with_pages[name], name


def test_a_page_shows_the_objective_of_its_run(tmp_path, demo):
    run = trainer(tmp_path, units="single", beta=0.5, inspect_samples=6)
    run.evaluate()
    drawn = run.draw(run.eval_dataset)
    (page,) = pages(tmp_path).values()
    pair, models = demo
    left_out = 0
    for number, sample in enumerate(drawn):
        ids = sample.response.token_ids
        losses, *_ = expected(pair, models, (sample.student_prompt, sample.teacher_prompt), ids, beta=0.5)
        units = pair.align(ids, sample.teacher_response)
        single = ((units.student_length == 1) & (units.teacher_length == 1)).tolist()
        shown = [unit for unit in page.texts[number] if unit.kind != "unsupervised"]
        assert [unit.loss for unit in shown] == pytest.approx(
            [loss for loss, one in zip(losses, single, strict=True) if one], rel=2e-3, abs=2e-5
        )
        left_out += sum("options leave out" in unit.title for unit in page.texts[number])
    assert left_out > 0


def test_pages_by_data_set_and_by_teacher(tmp_path):
    records = read_prompts(ASSETS / "eval.jsonl")[:4]
    named = [{**record, "teacher": "ab"[i % 2]} for i, record in enumerate(records)]
    held_out = {"one/../set": named[:2], "two": named[2:]}
    run = trainer(tmp_path, {"a": TEACHER, "b": TEACHER}, held_out, named, inspect_samples=5)
    run.evaluate()
    found = pages(tmp_path)
    assert set(found) == {
        f"inspect-{name}-0-{teacher}.html" for name in ("one_.._set", "two") for teacher in ("a", "b")
    }
    assert all(len(page.texts) == 1 for page in found.values())


def test_pages_of_another_objective_and_of_masked_units(tmp_path, demo):
    run = trainer(tmp_path, objective="bpm", inspect_samples=1)
    run.evaluate()
    (sample, *_) = run.draw(run.eval_dataset)
    (page,) = pages(tmp_path).values()
    pair, models = demo
    ids, teacher_ids = sample.response.token_ids, sample.teacher_response
    hidden = []
    for model, prompt, response in zip(
        models, (sample.student_prompt, sample.teacher_prompt), (ids, teacher_ids), strict=True
    ):
        with torch.no_grad():
            states = model.get_decoder()(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        hidden += [states[len(prompt) - 1 : -1], LMHead.from_model(model)]
    tables = pair.prefix_tables(*(head.weight.shape[0] for head in hidden[1::2]))
    with torch.no_grad():
        losses = bpm_loss(*hidden, pair.align(ids, teacher_ids), tables, reduction="none")
    shown = [unit for unit in page.texts[0] if unit.kind != "unsupervised"]
    assert [unit.loss for unit in shown] == pytest.approx(losses.tolist(), rel=2e-3, abs=2e-5)

    run = trainer(tmp_path / "masked", teacher_mass_floor=1.0, inspect_samples=1)
    run.evaluate()
    (page,) = pages(tmp_path / "masked").values()
    assert any("teacher_mass_floor" in unit.title for unit in page.texts[0])
    assert [token for token, _, _ in page.line(0, 0)] == ids


def test_inspect_samples_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="inspect_samples is -1: expected at least 0"):
        SimCTConfig(output_dir=str(tmp_path), inspect_samples=-1, use_cpu=True)
