"""Checkpoints of a run that may be killed at any moment: which of them are whole, and the rollouts that they continue with."""

import copy
import json
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from simct.files import write_json
from simct.rollouts.protocol import Response

ROLLOUTS = "simct_rollouts-{}.json"


def is_complete(folder: str | Path) -> bool:
    """Whether the checkpoint was written to its end: the Trainer writes its state last."""
    try:
        json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def newest_complete(folder: str | Path) -> str | None:
    """The newest whole checkpoint of an output folder, None if there is none; half-written ones are passed over with a warning."""
    numbered = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            numbered.append((int(number), path))
    for _, path in sorted(numbered, reverse=True):
        if is_complete(path):
            return str(path)
        warnings.warn(f"{path} is not complete (the run was stopped while it was written): passed over", stacklevel=2)
    return None


def save_responses(folder: str | Path, process: int, responses: list[Response], used: int) -> None:
    """The rollouts that the run is in the middle of using, and for how many steps they were used."""
    rows = [[response.token_ids, response.finish_reason, response.logprobs] for response in responses]
    write_json(Path(folder) / ROLLOUTS.format(process), {"used": used, "responses": rows})


def load_responses(folder: str | Path, process: int) -> tuple[list[Response], int] | None:
    """What `save_responses` wrote; None if the checkpoint was not in the middle of a batch of rollouts."""
    path = Path(folder) / ROLLOUTS.format(process)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Response(*row) for row in content["responses"]], content["used"]


class Checkpoints:
    """The part of `SimCTTrainer` that saves and resumes: the rollouts in use are in every checkpoint."""

    def save_merged(self, output_dir: str) -> None:
        """The student with its adapter merged into the weights, as a folder that `AutoModelForCausalLM.from_pretrained` loads.

        Raises ValueError if it has no adapter."""
        student = self.accelerator.unwrap_model(self.model)
        if not hasattr(student, "merge_and_unload"):
            raise ValueError(
                f"the student is a {type(student).__name__}: expected one with a PEFT adapter (peft_config)"
            )
        if self.args.should_save:
            copy.deepcopy(student).merge_and_unload().save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the Trainer's; `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True: there is no whole checkpoint in {self.args.output_dir!r}"
                )
        if resume_from_checkpoint:
            self._resumed = load_responses(resume_from_checkpoint, self.args.process_index)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._used < self.args.num_iterations and self._records is not None:
            save_responses(output_dir, self.args.process_index, self._responses, self._used)
        # The Trainer's state, whose presence says that the checkpoint is whole, is written after this by one process.
        self.accelerator.wait_for_everyone()
