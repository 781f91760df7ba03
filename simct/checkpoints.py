"""Checkpoints of a run that may be killed at any moment: which of them are whole, and the rollouts that they continue with."""

import json
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from simct.faults import write_json
from simct.rollout import Response

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
