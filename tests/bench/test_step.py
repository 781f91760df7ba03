"""The rule that says where a step's time goes: it counts what a model multiplies and moves, and comes near what was measured."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import step

TINY = dict(
    model_type="qwen2", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64,
)  # fmt: skip


@pytest.fixture
def model():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY), dtype=torch.bfloat16)


def test_products_of_a_forward_pass(model):
    tokens, weights = 2 * 24, 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    products, scores = 2 * 3 * tokens * weights, 3 * 4 * tokens * 24 * 32
    assert step.read(model, 2, 24, "flash").flops == products + scores // 2
    assert step.read(model, 2, 24, "eager").flops == products + scores
    assert step.read(model, 2, 24, "masked").flops == products + 2 * scores
    assert step.read(model, 2, 24, "eager").moved > step.read(model, 2, 24, "flash").moved


def test_a_phase_waits_for_the_slower_of_host_and_device(monkeypatch):
    monkeypatch.setattr(step, "host_seconds", lambda: 1e-5)
    assert step.Work(launches=1000, device=1e-3).seconds == 1e-2 and step.Work(launches=10, device=1e-3).seconds == 1e-3
    assert (step.Work(1, 2, 3, 4) + step.Work(1, 1, 1, 1)) * 2 == step.Work(4, 6, 8, 10)


def test_operations_of_a_token_grow_with_depth():
    shallow, deep = (step.operations_of_a_token(layers) for layers in (1, 3))
    assert 40 < (deep - shallow) / 2 < 120 and shallow > 20


@pytest.mark.slow
def test_the_phases_of_a_step(tmp_path):
    rows, note = step.run(tmp_path, 300)
    assert not note
    for row in rows:
        if row["measured_s"]:
            assert float(row["predicted_s"]) == pytest.approx(float(row["measured_s"]), rel=0.2), row
    whole = {row["setting"]: float(row["predicted_s"]) for row in rows if row["phase"] == "step"}
    assert list(whole.values()) == sorted(whole.values(), reverse=True) and len(whole) == len(step.SETTINGS)
    assert (tmp_path / "phases.csv").read_text().count("\n") == len(rows) + 1
