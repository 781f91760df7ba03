"""What a run shows while it works: a progress bar, and a line of the metrics that matter at each log."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

# Logged name, what the terminal calls it, and its form: within 100 columns. Neither in longer units nor lost is what is one-to-one.
SHOWN = (
    ("loss", "loss", ".3f"),
    ("reverse_kl_per_byte", "KL/byte", ".3f"),
    ("tokens/longer", "longer", "3.0%"),
    ("tokens/unsupervised", "lost", ".1%"),
    ("response/ended", "ended", "4.0%"),
    ("response/whitespace", "blanks", "3.0%"),
    ("tokens_per_second/rollout", "tokens/s", ",.0f"),
)


class ProgressBar(TrainerCallback):
    """Takes the place of the Trainer's own progress bar and printed dictionaries; the full logs go where `report_to` says."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None

    @classmethod
    def install(cls, trainer: Trainer, console: Console) -> "ProgressBar":
        """Use it as a context manager around `trainer.train()`: the bar is taken down also if that fails."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        bar = cls(console)
        trainer.add_callback(bar)
        return bar

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task("distilling", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar and logs and "loss" in logs:
            words = [f"{label} {logs[name]:{form}}" for name, label, form in SHOWN if name in logs]
            line = f"step {state.global_step:>4} " + "  ".join(words)
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.__exit__()
