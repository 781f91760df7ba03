"""What the terminal shows of a step: loss, KL per byte, what ended and tokens per second, within 100 columns."""

import io
from types import SimpleNamespace

from rich.console import Console

from simct.training.progress import ProgressBar


def test_a_step_on_one_line():
    out = io.StringIO()
    bar = ProgressBar(Console(file=out, width=200, markup=False))
    state = SimpleNamespace(is_world_process_zero=True, max_steps=1000, global_step=1000)
    logs = {
        "loss": 12.3456, "reverse_kl_per_byte": 0.4567, "tokens/single": 0.7, "tokens/longer": 0.25, "tokens/unsupervised": 0.051,
        "response/length": 1024, "response/ended": 0.875, "response/whitespace": 0.16, "tokens_per_second/rollout": 12345.6,
        "learning_rate": 1e-6,
    }  # fmt: skip
    with bar:
        bar.on_train_begin(None, state, None)
        bar.on_log(None, state, None, logs={"eval_loss": 1.0})
        bar.on_log(None, state, None, logs=logs)
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert len(line) <= 100
    assert line.startswith("step 1000 loss 12.346  KL/byte 0.457  longer 25%  lost 5.1%  ")
    assert "ended  88%" in line and line.endswith("tokens/s 12,346")
