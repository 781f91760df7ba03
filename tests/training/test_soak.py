"""A run that is killed 200 times, wherever it writes or steps: it ends as if it never was, or says why it cannot go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kills", [pytest.param(200, marks=pytest.mark.slow)])
def test_every_resume_equals_an_unbroken_run_or_says_why_not(tmp_path, kills):
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["killed"] == kills and found["points"] > 150
    assert found["equal"] >= kills // 20 and found["rewritten"] >= kills // 40
    assert all(found["refused"])  # each with its reason
