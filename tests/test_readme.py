"""The newcomer: the README's and the guides' commands and programs run as printed, on the demo's models.

A block under an HTML comment `needs ...` wants a GPU or a hub: its options are read, and nothing is run. Those under `demo` and
`test` make a virtual environment, and are run by .ci/run.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from simct import SimCTConfig
from simct.commands.cli import main
from simct.commands.options import OptionParser
from simct.commands.train import RunArguments, read_adapter

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/training.md", "docs/loss-api.md")
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="tests without the README beside them")


class Block(NamedTuple):
    page: str
    marker: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8") if (ROOT / page).exists() else ""
    found = re.findall(r"^(?:<!-- ([^\n]*) -->\n)?```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Block(page, *parts) for parts in found]


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = [block for page in PAGES for block in blocks(page)]
PROGRAMS = [block for block in BLOCKS if block.language == "python"]
ELSEWHERE = [block for block in BLOCKS if block.marker.startswith("needs ")]
SHELL = [block for block in BLOCKS if block.language == "bash" and not block.marker]


def test_every_block_is_run_or_marked():
    assert len(PROGRAMS) >= 4 and len(ELSEWHERE) >= 4 and len(SHELL) >= 3
    others = [block.marker for block in BLOCKS if block not in (*PROGRAMS, *ELSEWHERE, *SHELL)]
    assert others == ["demo", "test"]
    assert not any(block.marker for block in PROGRAMS)
    assert all(words[0] == "simct" for block in SHELL for words in commands(block))


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: f"{block.page}:{len(block.text)}")
def test_a_program_runs_as_printed(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block.text, block.page, "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 4
        assert (tmp_path / "runs" / "python" / "model.safetensors").exists()
    elif "sequences" in names:
        assert names["loss"].item() > 0 and names["student"].get_output_embeddings().weight.grad.abs().sum() > 0
        ends = [response[-1] in names["pair"].student_end_ids for response in names["ours"].responses]
        assert [response[-1] in names["pair"].teacher_end_ids for response in names["theirs"].responses] == ends


@pytest.mark.slow
def test_the_shell_runs_as_printed(tmp_path, monkeypatch, capsys):
    """In one process, block after block: a run is resumed in the folder that an earlier one wrote."""
    monkeypatch.chdir(tmp_path)
    for block in SHELL:
        for words in commands(block):
            try:
                main(words[1:])
            except SystemExit as end:
                assert not end.code, words
    output = capsys.readouterr().out
    assert "resuming from runs/demo/checkpoint-4" in output.replace("\n", "")
    assert "Held-out prompts (8 before, 8 after)" in output
    assert (tmp_path / "runs" / "lora" / "model.safetensors").exists()


@pytest.mark.parametrize("block", ELSEWHERE, ids=lambda block: f"{block.page}:{len(block.text)}")
def test_options_of_what_runs_elsewhere_exist(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("student: s\nteacher: t\ndata: d\noutput_dir: o\n")
    parser = OptionParser((RunArguments, SimCTConfig), prog="simct train")
    read = 0
    for words in commands(block):
        if "train" in words:
            run, *_ = parser.parse([*words[words.index("train") + 1 :], "--use_cpu", "true"])
            assert run.peft_config is None or read_adapter(run.peft_config).r == 16
            read += 1
        else:
            assert "serve" in words
    assert read


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    inside, long = False, []
    for line in lines:
        inside ^= line.startswith("```")
        if not inside and not line.startswith("|") and len(re.sub(r"\]\([^)]*\)", "]", line)) > 100:
            long.append(line)
    assert not long
