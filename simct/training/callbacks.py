"""What `SimCTTrainer` does around each optimiser step, as callbacks of the Trainer."""

import contextlib

from transformers import TrainerCallback

from simct.training.recorder import FIRST_STEPS


class AroundSteps(TrainerCallback):
    """Starts the first logging window where training starts (the step is known by then, also of a resumed run), and times the
    optimiser."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self._open = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.ratios.flush()
        self.trainer.recorder.start_window(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_step()
        self._open.enter_context(self.trainer.phase("optimiser"))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._open.close()

    def on_step_end(self, args, state, control, **kwargs):
        """The Trainer's own flow logs the first step alone, of `logging_first_step`'s ten."""
        if args.logging_strategy == "steps" and args.logging_first_step and state.global_step <= FIRST_STEPS:
            control.should_log = True
