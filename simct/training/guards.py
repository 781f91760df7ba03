"""What stops a run that has gone wrong: a loss or a gradient that is no number, a step without a single unit, weights that are no
numbers."""

import warnings
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from simct.models.checks import nonfinite_weights
from simct.training.faults import report_batches
from simct.training.micro_batches import MicroBatch


class Guards:
    """The part of `SimCTTrainer` that looks at each step before the optimiser makes it, and at the weights before they are saved.

    All processes decide together, and a GPU is waited for once a step: what is asked of it is one tensor of four numbers.
    """

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        # The Trainer's, of the gradients as they were before clipping, over all processes.
        self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    def _nonfinite(self, loss: Tensor, part: MicroBatch, unit_losses: Tensor, in_step: bool) -> Tensor:
        """Writes the micro-batch down. In a step the backward pass still runs, as other processes wait for it; `check_step` then
        stops all of them, or drops the gradients."""
        pair, value = self.scorers[part.teacher].pair, float(loss.detach())
        path = self._report({"loss": str(value)}, [(part, pair, unit_losses)])
        message = f"step {self.state.global_step + 1}: the loss is {value}; prompts, responses and units are in {path}"
        if not in_step:
            raise FloatingPointError(message)
        self._problem = self._problem or message
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _report(self, what: dict[str, str], batches) -> Path:
        name = f"nonfinite-{self.state.global_step + 1}-{self.args.process_index}.json"
        path = Path(self.args.output_dir) / name
        report_batches(path, {"step": self.state.global_step + 1, **what}, batches)
        return path

    def check_step(self) -> None:
        """Between the backward pass and the optimiser. FloatingPointError, in every process, for a step that must not be made
        (RuntimeError for one without a unit); with on_nonfinite="skip" no process makes it. If the student's weights themselves
        are no numbers, skipping is no way on."""
        problem, self._problem = self._problem, None
        norm = self._gradient_norm()
        local = torch.stack([torch.full_like(norm, float(problem is not None)), (~norm.isfinite()).float()])
        flags = self.accelerator.reduce(local, "sum")
        told, bad_norm, units, responses = torch.cat([flags, self._totals[1:].float()]).tolist()
        self.recorder.ratios.count("optimiser steps", 1)
        if not told and not bad_norm and units:
            return
        self.recorder.ratios.add("skipped_steps", 1, per="optimiser steps")
        if bad_norm and not told and self._scaler_goes_on():
            return
        step, error = self.state.global_step + 1, FloatingPointError
        if told:
            problem = problem or f"step {step}: the loss of another process is no number"
        elif bad_norm:
            path = self._report({"gradient_norm": str(float(norm))}, self._whole_step())
            problem = f"step {step}: the gradient norm is {float(norm)}; prompts and responses are in {path}"
        elif responses:
            path, error = self._report({"units": "0"}, self._whole_step()), RuntimeError
            problem = (
                f"step {step}: {int(responses)} responses of {int(self._totals[0])} tokens have not a single unit to learn "
                f"from; prompts and responses are in {path}"
            )
        # else: on_bad_row="skip" has left no prompt of this step.
        if problem is not None:
            names = self._nonfinite_weights()
            if names:
                raise FloatingPointError(f"{problem}; {_listed(names)} of the student: no finite numbers")
            if self.args.on_nonfinite == "stop":
                raise error(f"{problem} (on_nonfinite='skip' would leave the step out)")
            warnings.warn(f"{problem}; the step is left out", stacklevel=2)
        for parameter in self.model.parameters():
            parameter.grad = None

    def _gradient_norm(self) -> Tensor:
        """float32 [], on the device of the run."""
        norm = 0.0 if self._grad_norm is None else self._grad_norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        return norm.detach().to(self.args.device, torch.float32)

    def _scaler_goes_on(self) -> bool:
        """With --fp16: gradients that overflow at the loss scale are left out by the scaler, which then halves it. At a scale of 1
        they are no numbers of themselves."""
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1

    def _whole_step(self):
        parts = [part for inputs in self._inputs for part in inputs["parts"]]
        return [(part, self.scorers[part.teacher].pair, None) for part in parts]

    # ---- Weights ----

    def _nonfinite_weights(self) -> list[str]:
        """With a sharded student every process must call it."""
        names = nonfinite_weights(self.accelerator.unwrap_model(self.model))
        if self.is_fsdp_enabled and self.accelerator.num_processes > 1:
            names = gather_object(names)
        return list(dict.fromkeys(names))

    def check_weights(self, what: str, bad: list[str] | None = None) -> None:
        """FloatingPointError if a weight of the student is no finite number: `what` is not written. `bad`: the names of such
        weights, where they are known."""
        names = self._nonfinite_weights() if bad is None else bad
        if names:
            raise FloatingPointError(
                f"step {self.state.global_step}: {_listed(names)} of the student: no finite numbers; {what} is not written, what "
                "was saved before is as it was"
            )


def _listed(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
