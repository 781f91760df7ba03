"""A command run in this process, and how it ended."""

import shutil
from typing import NamedTuple

import pytest

from simct.commands.cli import main
from simct.demo import ASSETS


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of its error; nothing but warnings may stand beside it, and nothing that a terminal obeys anywhere."""
        lines = [line for line in self.err.splitlines() if "Warning: " not in line]
        assert len(lines) == 1, self.err
        assert not {"\x1b", "\r", "\x07"} & set(self.out + self.err)
        return lines[0]


@pytest.fixture
def ended(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words) -> Ended:
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def model(tmp_path):
    """A copy of the demo's student to break; without its weights it is a tokenizer and a configuration."""

    def copy(name: str = "model", weights: bool = False):
        ignored = () if weights else ("*.safetensors",)
        return shutil.copytree(ASSETS / "student", tmp_path / name, ignore=shutil.ignore_patterns(*ignored))

    return copy
