"""What is written down when a step goes wrong: a loss that is no number, memory that runs out."""

import gc
from pathlib import Path

import torch
from torch import Tensor

from simct.files import write_json
from simct.pairing.pair import TokenizerPair
from simct.training.micro_batches import MicroBatch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def report_nonfinite(
    folder: str | Path,
    step: int,
    process: int,
    batch: MicroBatch,
    pair: TokenizerPair,
    unit_losses: Tensor,
    loss: float,
) -> Path:
    """Writes `nonfinite-STEP-PROCESS.json` into the folder: each response with a unit whose loss is no finite number, its record,
    and those units with their texts and losses. Returns the path.

    If the units are all finite (the sum overflowed), every response is written.
    """
    units = batch.alignment
    bad = ~torch.isfinite(unit_losses)
    first_rows = torch.tensor([0, *map(len, batch.samples.student_responses)]).cumsum(0)
    owner = torch.searchsorted(first_rows, units.student_start, right=True) - 1
    named = sorted(set(owner[bad].tolist())) or range(len(batch.samples))
    responses = []
    for i in named:
        sample = batch.samples[i]
        pieces = pair.student_pieces(sample.response.token_ids)
        listed = []
        for unit in torch.nonzero(bad & (owner == i)).flatten().tolist():
            start, length = int(units.student_start[unit] - first_rows[i]), int(units.student_length[unit])
            text = b"".join(piece or b"" for piece in pieces[start : start + length])
            listed.append(
                {
                    "first_token": start,
                    "tokens": length,
                    "text": text.decode("utf-8", "backslashreplace"),
                    "loss": str(float(unit_losses[unit])),  # JSON has no NaN
                }
            )
        responses.append(
            {
                "record": sample.record,
                "teacher": sample.teacher,
                "student_prompt_ids": sample.student_prompt,
                "teacher_prompt_ids": sample.teacher_prompt,
                "response": b"".join(piece or b"" for piece in pieces).decode("utf-8", "backslashreplace"),
                "response_ids": sample.response.token_ids,
                "units": listed,
            }
        )
    path = Path(folder) / f"nonfinite-{step}-{process}.json"
    write_json(path, {"step": step, "loss": str(loss), "responses": responses})
    return path
