"""What is written down when a step goes wrong."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simct.files import write_json
from simct.pairing.pair import TokenizerPair
from simct.training.micro_batches import MicroBatch


def report_batches(
    path: Path, what: dict[str, Any], batches: Iterable[tuple[MicroBatch, TokenizerPair, Tensor | None]]
) -> None:
    """Writes `what` and the responses of micro-batches as JSON, each with its record.

    Of a micro-batch that comes with its units' losses [G], only the responses with a loss that is no finite number, and those
    units with their texts and losses. If they are all finite (the sum overflowed), or not given, every response.
    """
    responses = [entry for batch, pair, losses in batches for entry in _responses(batch, pair, losses)]
    write_json(path, {**what, "responses": responses})


def _responses(batch: MicroBatch, pair: TokenizerPair, unit_losses: Tensor | None) -> list[dict[str, Any]]:
    units = batch.alignment
    bad = torch.zeros(len(units.student_start), dtype=torch.bool) if unit_losses is None else ~unit_losses.isfinite()
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
    return responses
