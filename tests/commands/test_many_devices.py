"""The guide's runs on one GPU, on eight, with a teacher of 72 billion weights and on two nodes: each passes its dry run."""

import functools
import io
import json
import re
import shutil

import pytest
import torch
from real_configs import GEMMA_2_2B, GEMMA_2_9B, QWEN_2_5_7B, QWEN_2_5_32B, QWEN_2_5_72B
from rich.console import Console
from test_readme import blocks, commands

from simct import SimCTConfig
from simct.commands import dry_run as module
from simct.commands.dry_run import describe, meta_model
from simct.commands.options import OptionParser
from simct.commands.train import RunArguments
from simct.demo import ASSETS

OPTIONS = {"student": {"dtype": torch.float32}, "teacher": {"dtype": torch.bfloat16}}
MODELS = {
    "google/gemma-2-2b-it": GEMMA_2_2B,
    "google/gemma-2-9b-it": GEMMA_2_9B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_2_5_7B,
    "Qwen/Qwen2.5-32B-Instruct": QWEN_2_5_32B,
    "Qwen/Qwen2.5-72B-Instruct": QWEN_2_5_72B,
}
PRINTED = [
    words
    for block in blocks("docs/training.md")
    for words in commands(block)
    if "train" in words and "prompts.jsonl" in words
]
RUNS = {
    words[words.index("--output_dir") + 1].removeprefix("runs/"): words
    for words in PRINTED
    if "--teacher_url" not in words
}


@pytest.fixture(scope="module", autouse=True)
def models_made_once():
    made = functools.cache(lambda name, role: meta_model(name, role, OPTIONS[role]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "meta_model", lambda name, role, _: made(name, role))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        config.save_pretrained(root / name)
        for file in "tokenizer.json", "tokenizer_config.json":
            shutil.copy(ASSETS / ("student" if "gemma" in name else "teacher") / file, root / name / file)
    return root


def dry_run(name, folders, tmp_path, *more, drop=(), memory=80):
    words = [word for word in RUNS[name] if word not in drop]
    processes = 1
    for option in "--nnodes", "--nproc_per_node":
        processes *= int(words[words.index(option) + 1]) if option in words else 1
    (data := tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i} + {i * i}?"}) for i in range(64))
    )
    argv = [*words[words.index("train") + 1 :], "--use_cpu", "true", "--dry_run", *more]
    run, config, _ = OptionParser((RunArguments, SimCTConfig), prog="simct train").parse(argv)
    run.student, run.teacher, run.data = str(folders / run.student), str(folders / run.teacher), str(data)
    console = Console(file=io.StringIO(), width=400)
    found = describe(run, config, console, assume_memory_gb=memory, assume_processes=processes)
    return found, console.file.getvalue()


def test_the_guide_has_them_all():
    assert list(RUNS) == ["one", "eight", "72b", "two"]
    assert [len(re.findall("torchrun", " ".join(words))) for words in RUNS.values()] == [0, 1, 1, 1]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_guide_fits(name, folders, tmp_path):
    found, said = dry_run(name, folders, tmp_path)
    assert found.fits and "It fits:" in said, said
    assert "64 prompts and 64 responses" in said
    memory = found.memory
    if name == "72b":
        assert 2.4e9 < memory.teacher_weights < 2.6e9 and 0 <= memory.student_weights - 4 * 2_614_341_888 < 10_000
    if name == "two":
        assert memory.student_weights < 4 * 9.3e9 / 16 and memory.gradients < 4 * 9.3e9 / 16


@pytest.mark.parametrize(
    ("name", "drop", "more", "verdicts"),
    [
        ("72b", (), (), ("which fits", "which does not fit")),
        pytest.param("72b", ("--shard_teacher",), (), ("which fits", "which does not fit"), marks=pytest.mark.slow),
        ("eight", (), ("--shard_teacher", "false"), ("which fits", "which does not fit")),
    ],
)
def test_the_dry_run_says_which_teacher_fits(name, drop, more, verdicts, folders, tmp_path):
    found, said = dry_run(name, folders, tmp_path, *more, drop=drop)
    line = next(line for line in said.splitlines() if line.startswith("The teacher of 8 processes"))
    assert re.findall("which (?:does not )?fits?", line) == list(verdicts)
    peaks = [float(size) for size in re.findall(r"holds ([\d.]+) GB", line)]
    shared = not (drop or more)
    assert found.memory.peak / 1e9 == pytest.approx(peaks[not shared], abs=0.06)
    assert ("shares it out" if shared else "has copies") in line
    assert found.fits is shared
    if not shared:
        assert "--shard_teacher true" in (found.changes or []) or "--shard_teacher" in said


@pytest.mark.slow
def test_fsdp_is_named_where_it_would_fit(folders, tmp_path):
    found, said = dry_run("eight", folders, tmp_path, drop=("--fsdp",))
    assert not found.fits and "--fsdp true" in found.changes and "It would fit with" in said
