"""The pictures of a run hold what was logged, and no panel without it."""

import matplotlib.figure
import pytest

from simct.training.plots import plot_curves

LOSS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
ALL = [
    {"step": 0, "eval_reverse_kl_per_byte": 0.5, "eval_reverse_kl_per_byte_stderr": 0.1},
    {"step": 1, "loss": 2.0, "loss/single": 1.0, "loss/longer": 3.0, "reverse_kl_per_byte": 0.5, "tokens/single": 0.5,
     "tokens/longer": 0.25, "tokens/unsupervised": 0.25, "response/ended": 1.0, "response/whitespace": 0.1,
     "response/entropy": 1.0},
]  # fmt: skip


@pytest.mark.parametrize(
    ("log", "panels"),
    [
        (LOSS, {"loss per response token": {"loss": [2.0, 1.0]}}),
        ([*LOSS, {"step": 2, "response/ended": 0.5}], {"loss per response token": None, "responses": {"response/ended": [0.5]}}),
        (ALL, dict.fromkeys(["loss per response token", "loss per unit", "sequence reverse KL, nats per byte",
                             "share of response tokens", "responses", "student entropy, nats per token"])),
    ],
)  # fmt: skip
def test_no_panel_of_the_curves_is_empty(tmp_path, monkeypatch, log, panels):
    drawn = {}

    def save(figure, path, **_):
        for axis in figure.axes:
            drawn[axis.get_title()] = {
                line.get_label(): list(line.get_ydata()) for line in axis.lines if not line.get_label().startswith("_")
            }

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    plot_curves(log, tmp_path / "curves.png")
    assert list(drawn) == list(panels) and all(drawn.values())
    for title, lines in panels.items():
        assert lines is None or drawn[title] == lines
