"""What whole calls read, write, multiply and hold at the sizes of a real pair, held to the floor."""

import importlib.util

import pytest

from bench import cost

# Case: the time that the count predicts for an H100, of the floor's; the gigabytes held at most besides the inputs.
BOUNDS = {
    "headline, linear": (1.35, 4.5),
    "one vocabulary, linear": (1.2, 4.0),
    "headline, logits": (2.6, 4.5),
    "one vocabulary, logits": (1.01, 2.2),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels' launches are counted")
@pytest.mark.slow
def test_calls_stay_near_the_floor_and_never_wait(tmp_path):
    counted, predictions, note = cost.run(tmp_path, 300)
    assert not note
    assert predictions
    whole = {row["case"]: row for row in counted if row["stage"] == "all"}
    assert whole.keys() == BOUNDS.keys()
    for case, (of_floor, held) in BOUNDS.items():
        assert 0.99 <= float(whole[case]["x floor"]) <= of_floor, whole[case]
        assert float(whole[case]["held_GB"]) <= held, whole[case]
        assert whole[case]["waits"] == "0"
    # The products are those of the floor, and no others.
    least = {row["case"]: row["TFLOP"] for row in predictions if row["stage"] == "linear: all products"}
    for case, name in (("headline, linear", "the worked example"), ("one vocabulary, linear", "one vocabulary")):
        assert float(whole[case]["TFLOP"]) == pytest.approx(float(least[name]), rel=0.005)
