"""What a command says of itself: `simct train --help` on one page, by subject, and without the wait for PyTorch."""

import subprocess
import sys

import pytest

import simct
from simct import SimCTConfig
from simct.commands.options import OptionParser
from simct.commands.recipe import COMMANDS, list_recipes
from simct.commands.train import RunArguments
from simct.commands.train_help import own_options
from simct.data.prompts import PROMPT_FORMATS
from simct.demo import ASSETS
from simct.pairing.endings import STOPS
from simct.rollouts.protocol import ENGINES
from simct.training.config import OBJECTIVES
from simct.training.groups import FIRST, GROUPS, HIDDEN
from simct_kernels.options import CANDIDATES, SCORES


def test_help_does_not_wait_for_pytorch():
    program = (
        "import sys\n"
        "from simct.commands.cli import main\n"
        "from simct.training.groups import GROUPS\n"
        "pages = [['train', '--help', name] for name in GROUPS]\n"
        "for words in ['--help'], ['--version'], ['train', '--help'], ['inspect', '--help'], ['recipes'], *pages:\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "print('slow:', [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("slow: []\n") and f"simct {simct.__version__}" in done.stdout
    assert "Divergence: 1 reverse KL" in done.stdout  # a page of a subject


def test_the_first_page(ended):
    result = ended("train", "--help")
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) <= 60 and max(map(len, lines)) <= 100
    assert lines[0].startswith("usage: simct train ")
    options = {action.dest for action in OptionParser((RunArguments, SimCTConfig), prog="simct train")._actions}
    for name, _, text in FIRST:
        assert name in options and any(line.startswith(f"  --{name}") and text in line for line in lines)
    for name in (*GROUPS, "transformers"):
        assert any(line.startswith(f"  {name} ") for line in lines)
    assert not result.err


def test_a_page_of_each_subject(ended):
    for name, group in GROUPS.items():
        lines = ended("train", f"--help={name}").out.splitlines()
        shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
        assert shown == [*group.own, *group.inherited]
    everything = ended("train", "--help", "all").out
    shown = [line.split()[0].removeprefix("--") for line in everything.splitlines() if line.startswith("  --")]
    assert len(shown) == len(set(shown)) > 150 and not set(HIDDEN) & set(shown)
    assert not any("-" in name for name in shown)
    assert "Divergence: 1 reverse KL" in everything
    assert "eprecated" not in everything and "activation_checkpointing_kwargs" in shown
    assert len([line for line in everything.splitlines() if line.startswith("      Change it: ")]) > 80


def test_texts_name_what_can_be_chosen():
    own = own_options()
    for name, choices in {
        "rollout_engine": ENGINES, "prompt_format": PROMPT_FORMATS, "objective": OBJECTIVES, "score": SCORES,
        "candidates": CANDIDATES, "stop": STOPS, "on_bad_row": ("stop", "skip"), "on_nonfinite": ("stop", "skip"),
    }.items():  # fmt: skip
        assert all(choice in own[name][1] for choice in choices), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--help", "objectives"], "--help is 'objectives': expected one of data, rollouts, objective, "),
        (["--bets", "0.5"], "(did you mean --beta?)"),
    ],
)
def test_what_does_not_exist_is_said_in_one_line(ended, words, message):
    result = ended("train", "--student", "s", "--teacher", "t", "--data", "d", *words)
    assert result.code == 2 and message in result.error


def test_the_recipes_take_one_row_a_pair(ended):
    lines = ended("recipes").out.splitlines()
    assert len(lines) <= 30
    for name in list_recipes():
        assert any(name in line and COMMANDS[name.split("/")[1]] in line for line in lines)


def test_a_text_that_is_not_there(ended):
    result = ended("inspect", ASSETS / "student", ASSETS / "teacher", "--text", "nofile")
    assert result.code == 2 and "--text is 'nofile': there is no such file" in result.error
