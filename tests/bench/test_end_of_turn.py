"""What the end of the turn's unit teaches, on the demo's models in place of the real ones."""

import json

import pytest

from bench.end_of_turn import NAMES, SOLUTIONS, measure
from simct.demo import ASSETS


def test_rows_of_the_demo_pair(tmp_path):
    for name, side in zip(NAMES, ("student", "teacher"), strict=True):
        (tmp_path / name).symlink_to(ASSETS / side)
    prompts = "".join(json.dumps({"prompt": f"def {name}(n):\n"}) + "\n" for name in SOLUTIONS)
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    rows = list(measure(tmp_path))
    assert {row["function"] for row in rows} == set(SOLUTIONS) and {row["stop"] for row in rows} == {"pair", "class"}
    # The demo's tokenizers have one end each, of which a class is their pair; the teacher has no chat template.
    assert len(rows) == 2 * len(SOLUTIONS)
    for pair, whole in zip(rows[::2], rows[1::2], strict=True):
        assert whole["teacher_mass"] == pair["teacher_mass"] and whole["student_mass"] == pair["student_mass"]
        for name in "loss", "derivative", "derivative_before":
            assert float(whole[name]) == pytest.approx(float(pair[name]), rel=1e-2, abs=1e-6), name
