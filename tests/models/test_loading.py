"""Models by name: nothing of a folder is run unless that was asked for, and nobody is asked on the terminal."""

import io
import json
import shutil
import sys

import pytest

from simct.commands.dry_run import meta_model
from simct.demo import ASSETS
from simct.models.loading import load_generation_config, load_model, load_tokenizer


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A folder whose model, configuration and tokenizer are Python files of its own; someone answers "y" to every question."""
    folder = shutil.copytree(ASSETS / "student", tmp_path / "own")
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    kinds = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": kinds}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **own}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    return str(folder), mark


def test_code_of_a_folder_is_not_run_and_nobody_is_asked(with_code, capsys):
    folder, mark = with_code
    for load in (
        lambda: load_model(folder, "student"),
        lambda: load_tokenizer(None, folder, "student"),
        lambda: meta_model(folder, "student", {}),
    ):
        with pytest.raises(ValueError, match="(?s)own.*trust_remote_code"):
            load()
    assert not mark.exists() and sys.stdin.tell() == 0
    assert "y/N" not in capsys.readouterr().out


def test_a_generation_config_is_read_or_absent_or_an_error(tmp_path):
    assert load_generation_config(str(ASSETS / "student"), "student").eos_token_id is not None
    assert load_generation_config(str(tmp_path), "student") is None
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="the student's generation_config.json cannot be read"):
        load_generation_config(str(tmp_path), "student")
