"""Whatever goes wrong, a command ends in one line that names it, and nothing in a file or a name can forge another."""

import json
import os
import stat
import sys
import warnings

import pytest
import torch

from simct.commands import cli
from simct.console import console, error_line
from simct.demo import ASSETS
from simct.pairing import templates

STUDENT, TEACHER = str(ASSETS / "student"), str(ASSETS / "teacher")
ESCAPES = "user\n\x1b[2J\x1b[31mall is well\r\u202e"


@pytest.fixture
def dry_run(ended, tmp_path):
    """A dry run: it reads data, tokenizers and templates, and loads no weights."""

    def run(student=STUDENT, teacher=TEACHER, data=None, *words):
        if data is None:
            data = tmp_path / "data.jsonl"
            data.write_text('{"prompt": "How much is 2 + 2?"}\n')
        named = ["--student", student, "--teacher", teacher, "--data", data, "--output_dir", tmp_path / "run"]
        return ended("train", *named, "--use_cpu", "--max_new_tokens", 8, "--dry_run", *words)

    return run


def templated(folder, template: str):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


# ---- Broken files ----


def test_broken_weights(ended, model, tmp_path):
    folder = model(weights=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "data.jsonl").write_text('{"prompt": "x"}\n')
    named = ["--student", folder, "--teacher", TEACHER, "--data", "data.jsonl", "--output_dir", "run", "--use_cpu"]
    result = ended("train", *named)
    assert result.code == 2 and result.error.startswith(f"simct train: error: student '{folder}' cannot be loaded")
    # The rest, of an error in the constructor too, is there for the asking.
    traced = ended("train", *named, "--traceback")
    lines = traced.err.splitlines()
    assert lines[-1] == result.error and any(line.startswith("SafetensorError: ") for line in lines)
    assert any("loading.py" in line for line in lines) and any("trainer.py" in line for line in lines)
    assert ended("--traceback", "recipes", "nowhere").err.count("recipe.py") == 1


@pytest.mark.parametrize("text", ["{", "{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}}}'])
def test_a_broken_tokenizer(ended, model, text):
    folder = model()
    (folder / "tokenizer.json").write_text(text)
    result = ended("inspect", folder, TEACHER)
    assert result.code == 2
    assert result.error.startswith(f"simct inspect: error: the student's tokenizer cannot be loaded from '{folder}'")


def test_a_broken_generation_config_is_not_taken_for_none(ended, model):
    folder = model()
    (folder / "generation_config.json").write_text("{")
    assert "the teacher's generation_config.json cannot be read" in ended("inspect", STUDENT, folder).error
    (folder / "generation_config.json").unlink()
    assert ended("inspect", STUDENT, folder).code == 0


def test_an_end_of_turn_that_is_no_id(ended, model):
    folder = model()
    (folder / "generation_config.json").write_text('{"eos_token_id": ["<eos>"]}')
    assert "eos_token_id of the generation configuration is ['<eos>']" in ended("inspect", folder, TEACHER).error


def test_a_broken_adapter(ended, tmp_path, monkeypatch):
    monkeypatch.setattr("simct.commands.eval.find_spec", lambda name: True)
    (tmp_path / "adapter").mkdir()
    for text in "{", "[]":
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        result = ended("eval", "adapter", "--tasks", "gsm8k")
        assert "'adapter' has an adapter_config.json that cannot be read" in result.error


# ---- Templates ----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only poems.') }}", "Only poems."),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nothing.here }}", "nothing"),
        ("{% for m in messages %}{{ m.role", "unexpected end of template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails(dry_run, model, template, message):
    result = dry_run(templated(model(), template))
    assert result.code == 2 and message in result.error
    assert "prompt 'How much is 2 + 2?' is refused by the tokenizer" in result.error


def test_a_template_without_an_end(dry_run, model, ended, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    folder = templated(model(), "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3)
    result = dry_run(folder)
    assert result.code == 2 and "the chat template has not come to its end in 0.2 s" in result.error
    # Where a template is only asked what ends a turn, one that refuses is passed over, one without an end is not.
    assert "the chat template has not come to its end" in ended("inspect", STUDENT, folder).error


def test_the_time_limit_of_a_template_leaves_an_older_one_running(demo_tokenizers):
    import signal

    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        tokenizer = demo_tokenizers[0]
        options = dict(chat_template="{{ messages[0].content }}", tokenize=False)
        assert templates.apply_template(tokenizer, [{"role": "user", "content": "x"}], **options) == "x"
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- Terminal ----


def test_text_of_data_and_templates_forges_no_line(dry_run, model, tmp_path):
    data = tmp_path / "a\n\x1b[2Jb.jsonl"
    record = {"prompt": [{"role": ESCAPES, "content": "x"}]}
    data.write_text(json.dumps(record) + "\n")
    folder = templated(model(), "{{ raise_exception('Unknown role: ' ~ messages[0].role) }}")
    result = dry_run(folder, TEACHER, data)
    assert result.code == 2 and "Unknown role: user \\x1b[2J\\x1b[31mall is well" in result.error
    data.write_text(json.dumps({"prompt": "x", "answer": [ESCAPES]}) + "\n")
    assert "a \\x1b[2Jb.jsonl, line 1: field 'answer' is " in dry_run(STUDENT, TEACHER, data).error
    assert "\\x1b" in dry_run(STUDENT, f"{tmp_path}/\x1b[2J\nno").error


def test_a_warning_is_one_line():
    with cli.one_line_warnings():
        shown = warnings.formatwarning(f"1 of 2 rows left out: {ESCAPES}", UserWarning, "file.py", 3)
    assert shown == "UserWarning: 1 of 2 rows left out: user \\x1b[2J\\x1b[31mall is well \\u202e\n"


def test_an_error_is_one_line():
    assert error_line(ValueError(f"a {ESCAPES}")) == "a user \\x1b[2J\\x1b[31mall is well \\u202e"
    assert error_line(KeyError("x")) == "KeyError: 'x'" and error_line(MemoryError()) == "MemoryError"
    assert len(error_line("x" * 10**6)) < 5000 and "996,000 characters more" in error_line("x" * 10**6)


def test_markup_in_a_path_is_a_path(ended, tmp_path):
    (tmp_path / "[").mkdir()
    (tmp_path / "[" / "x] :100: [bold]").write_text("One answer.")
    result = ended("inspect", STUDENT, TEACHER, "--text", "[/x] :100: [bold]", "--html", "[/red].html")
    assert result.code == 0 and "page: [/red].html" in result.out and (tmp_path / "[" / "red].html").is_file()
    assert "x] :100: [bold], paragraph 1" in result.out
    result = ended("train", "--student", "[/x]", "--teacher", "[/y]", "--data", "[/red].html")
    assert result.error.startswith("simct train: error: [/red].html, line 1: not JSON")


def test_the_terminal_reads_no_markup(capsys):
    console.print("[/x] :100:", highlight=False)
    assert capsys.readouterr().out == "[/x] :100:\n"


def test_answers_go_to_devices_and_names_of_every_kind(ended, tmp_path):
    """No file is left beside a device; a name may be markup, or no UTF-8."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "null").symlink_to("/dev/null")
    options = ["--model", TEACHER, "--data", "data.jsonl", "--samples", 1, "--max_new_tokens", 2, "--dtype", "float32"]
    for output, shown in (
        ("null", "null"),
        ("[/x].jsonl", "[/x].jsonl"),
        (os.fsdecode(b"\xff.jsonl"), "\\udcff.jsonl"),
    ):
        result = ended("answers", *options, "--output", output)
        assert result.code == 0 and result.out.endswith(f"answers: {shown}\n")
        assert os.path.lexists(output)
    assert (tmp_path / "null").is_symlink() and len(list(tmp_path.rglob("*.partial"))) == 0


def test_names_that_are_no_utf8(ended, tmp_path):
    text = os.fsdecode(b"t\xff.txt")
    (tmp_path / text).write_text("One answer.")
    page = os.fsdecode(b"p\xff.html")
    result = ended("inspect", STUDENT, TEACHER, "--text", text, "--html", page)
    assert result.code == 0 and "page: p\\udcff.html" in result.out
    assert "t\\udcff.txt" in (tmp_path / page).read_text()
    data = tmp_path / os.fsdecode(b"d\xff.jsonl")
    data.write_text('{"prompt": 3}\n')
    named = ["--student", STUDENT, "--teacher", TEACHER, "--use_cpu"]
    assert "d\\udcff.jsonl, line 1: field 'prompt' is 3" in ended("train", *named, "--data", data).error
    data.write_text('{"prompt": "x"}\n')
    result = ended("train", *named, "--data", data, "--output_dir", os.fsdecode(b"o\xff"))
    assert result.code == 2 and "expected a name in UTF-8" in result.error
    (tmp_path / text).write_bytes(b"\xff")
    assert "is not UTF-8" in ended("inspect", STUDENT, TEACHER, "--text", text).error


# ---- What is written ----


def test_a_full_disk(ended, tmp_path, monkeypatch):
    (tmp_path / "full.html").symlink_to("/dev/full")
    result = ended("inspect", STUDENT, TEACHER, "--html", "full.html")
    assert result.code == 1 and "No space left on device" in result.error
    assert (tmp_path / "full.html").is_symlink() and stat.S_ISCHR(os.stat("/dev/full").st_mode)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            cli.main(["recipes"])
        monkeypatch.undo()
    assert end.value.code == 1


def test_a_page_through_a_link_to_a_device(ended, tmp_path):
    (tmp_path / "null.html").symlink_to("/dev/null")
    assert ended("inspect", STUDENT, TEACHER, "--html", "null.html").code == 0
    assert (tmp_path / "null.html").is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_paths_that_cannot_be_written(ended, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "circle").symlink_to("circle")
    for path in "file/page.html", ".", "circle", "x" * 300:
        result = ended("inspect", STUDENT, TEACHER, "--html", path)
        assert result.code == 2 and f"output {path!r} cannot be written" in result.error
    if os.geteuid():
        (tmp_path / "kept").write_text("kept")
        (tmp_path / "kept").chmod(0o444)
        assert "it may not be written to" in ended("inspect", STUDENT, TEACHER, "--html", "kept").error


# ---- The rest ----


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyError("x"), 1, "simct recipes: error: KeyError: 'x' (--traceback shows where)"),
        (OSError(28, "No space left on device"), 1, "simct recipes: error: [Errno 28] No space left on device"),
        (torch.OutOfMemoryError("no memory\nfor it"), 1, "simct recipes: error: no memory for it"),
        (ValueError("bad"), 2, "simct recipes: error: bad"),
        (KeyboardInterrupt(), 130, "simct recipes: interrupted"),
    ],
)
def test_errors_of_every_kind(ended, monkeypatch, error, code, line):
    def raising(options):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "recipes", raising)
    result = ended("recipes")
    assert (result.code, result.error) == (code, line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dance"], "simct: error: argument COMMAND: invalid choice: 'dance'"),
        ([], "simct: error: the following arguments are required: COMMAND"),
        (["inspect", "a"], "simct inspect: error: the following arguments are required: teacher"),
        (["recipes", "--all"], "simct recipes: error: unrecognized arguments: --all"),
        (["demo", "--steps", "x"], "simct demo: error: argument --steps: invalid int value: 'x'"),
        (["answers", "--model", "m"], "simct answers: error: the following arguments are required: --data, --output"),
    ],
)
def test_words_that_are_no_command(ended, words, line):
    result = ended(*words)
    assert result.code == 2 and result.error.startswith(line)
