"""What SimCT's longer units do to the student, by option: the method's open questions, measured on a pair.

    python -m bench.quality.gradients --student DIR --teacher DIR --data prompts.jsonl --output gradients.csv

On responses that the student samples, one row of the CSV for each `score` and `candidates`:
    first_token_gradient: the loss's derivative by the logit of the student's own first token of a longer unit, averaged over longer
        units. Above 0, the step makes a token less likely that the student chose and that spells the text rightly.
    first_token_shared: the share of longer units whose first student token is itself a candidate.
    cosine, norm_ratio: of the gradient of all longer units against that of all single units of a batch of --batch responses, over
        the student's parameters; means over batches.
    longer_loss, single_loss: nats a unit.
And, the same in every row:
    extending_mass: the probability that the teacher gives, at the first row of a single unit, to tokens that go on where the
        student's token ends: events that the student's token stands for and the teacher's equal one does not.
    candidate_mass: the probability that it gives there to the candidates: what is left of it after Eq. 8 is made of this alone.
    extending_mass_digits, candidate_mass_digits: the same where the student's token is a digit or several.
Errors (`_stderr`) are over units, as if they were independent, or over batches.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import tempfile
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from simct import SimCTConfig, SimCTTrainer
from simct.data.records import load_records
from simct.files import replaced
from simct.models.hidden import response_hidden_states
from simct.pairing.tokens import token_bytes
from simct.training.micro_batches import MicroBatch
from simct_kernels import LMHead, simct_loss

from .means import mean_with_error

OPTIONS = list(itertools.product(("mean_logprob", "sum_logprob", "mean_logit"), ("paper", "disjoint")))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.gradients", description=__doc__.split("\n\n")[0])
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output", type=Path, required=True, help="CSV file; rows of this pair in it are replaced")
    parser.add_argument("--pair", help="the pair's name in the CSV; default: STUDENT<-TEACHER")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="responses that one gradient is of (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    name = options.pair or f"{Path(options.student).name}<-{Path(options.teacher).name}"
    console = Console(width=None if os.isatty(1) else 160)
    rows = [
        {"pair": name, "responses": options.responses, "batch": options.batch, **row}
        for row in measure(options, console)
    ]
    kept = []
    if options.output.is_file():
        with options.output.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["pair"] != name]
    with replaced(options.output, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            kept + [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        )
    table = Table(title=name)
    for column in rows[0]:
        if not column.endswith("_stderr"):
            table.add_column(column, justify="right")
    for row in rows:
        shown = []
        for column, value in row.items():
            if not column.endswith("_stderr"):
                error = f" ± {row[f'{column}_stderr']:.2g}" if f"{column}_stderr" in row else ""
                shown.append(f"{value:.4g}{error}" if isinstance(value, float) else str(value))
        table.add_row(*shown)
    console.print(table)


def measure(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each of OPTIONS."""
    records = list(itertools.islice(itertools.cycle(load_records(options.data)), options.responses))
    with tempfile.TemporaryDirectory() as scratch:
        config = SimCTConfig(
            output_dir=scratch, per_device_train_batch_size=options.batch, temperature=1.0, top_p=1.0, prompt_format="text",
            max_new_tokens=options.max_new_tokens, candidates="disjoint", save_strategy="no", use_cpu=True, seed=options.seed,
        )  # fmt: skip
        trainer = SimCTTrainer(options.student, options.teacher, config, records)
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    batches = [records[i : i + options.batch] for i in range(0, len(records), options.batch)]
    batches = [rolled_out(trainer, batch) for batch in track(batches, "responses", console=console)]
    parts = [part for batch in batches for part in batch]
    extensions = Extensions(token_bytes(trainer.teacher.tokenizer))
    found = [masses for part in parts for masses in teacher_masses(part, trainer, extensions)]
    common = {}
    for suffix, chosen in (("", found), ("_digits", [row for row in found if row[0].strip().isdigit()])):
        for place, name in ((1, "extending_mass"), (2, "candidate_mass")):
            mean, error = mean_with_error([row[place] for row in chosen])
            common |= {f"{name}{suffix}": mean, f"{name}{suffix}_stderr": error}
    rows = []
    # One option and one batch at a time: each holds two gradients of the student's size.
    for score, candidates in track(OPTIONS, "gradients", console=console):
        gradients = Gradients([p for p in student.parameters() if p.requires_grad])
        for batch in batches:
            for part in batch:
                logits = LMHead.from_model(student).logits(response_hidden_states(student, part.packed))
                leaf = logits.detach().requires_grad_()
                arguments = (leaf, teacher_logits(part, trainer), part.alignment, trainer.shared)
                losses = simct_loss(*arguments, score=score, candidates=candidates, reduction="none")
                gradients.add(losses, leaf, logits, part, trainer.shared)
            gradients.close_batch()
        rows.append({"score": score, "candidates": candidates, **gradients.summary(), **common})
    return rows


def teacher_logits(part: MicroBatch, trainer: SimCTTrainer) -> Tensor:
    return trainer.teacher.head.logits(part.teacher_rows[0])


def rolled_out(trainer: SimCTTrainer, records: list[dict]) -> list[MicroBatch]:
    """Sampled, aligned and scored, as in a step of training."""
    trainer.state.global_step += 1  # other random numbers
    trainer._roll_out([records])
    return trainer._inputs[0]["parts"]


class Gradients:
    """Sums over batches, for one choice of options."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.of = {kind: [torch.zeros_like(p) for p in parameters] for kind in ("single", "longer")}
        self.losses: dict[str, list[float]] = {"single": [], "longer": []}
        self.first_token: list[float] = []
        self.shared: list[bool] = []
        self.cosine: list[float] = []
        self.norm_ratio: list[float] = []

    def add(self, losses: Tensor, leaf: Tensor, logits: Tensor, part: MicroBatch, shared) -> None:
        units = part.alignment
        longer = (units.student_length > 1) | (units.teacher_length > 1)
        for kind, chosen in (("single", ~longer), ("longer", longer)):
            self.losses[kind] += losses.detach()[chosen].tolist()
            (by_logits,) = torch.autograd.grad(losses[chosen].sum(), leaf, retain_graph=True)
            found = torch.autograd.grad(
                logits, self.parameters, by_logits, retain_graph=kind == "single", allow_unused=True
            )
            for total, gradient in zip(self.of[kind], found, strict=True):
                if gradient is not None:
                    total += gradient
            if kind == "longer":
                rows = units.student_start[longer]
                tokens = units.student_tokens[rows]
                self.first_token += by_logits[rows, tokens].tolist()
                self.shared += torch.isin(tokens, shared.student_ids).tolist()

    def close_batch(self) -> None:
        """Compares the two gradients of the batch that is over; a batch without longer units has nothing to compare."""
        dot, single, longer = (
            sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(self.of[x], self.of[y], strict=True))
            for x, y in (("single", "longer"), ("single", "single"), ("longer", "longer"))
        )
        if single and longer:
            self.cosine.append(dot / math.sqrt(single * longer))
            self.norm_ratio.append(math.sqrt(longer / single))
        for gradients in self.of.values():
            for gradient in gradients:
                gradient.zero_()

    def summary(self) -> dict[str, float]:
        found: dict[str, float] = {}
        measured = {
            "first_token_gradient": self.first_token,
            "first_token_shared": self.shared,
            "single_loss": self.losses["single"],
            "longer_loss": self.losses["longer"],
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
        }
        for name, values in measured.items():
            found[name], found[f"{name}_stderr"] = mean_with_error(values)
        return {"single_units": len(self.losses["single"]), "longer_units": len(self.losses["longer"]), **found}


class Extensions:
    """The teacher's tokens that begin with given bytes and go on: a range of its vocabulary, sorted by bytes."""

    def __init__(self, pieces: list[bytes | None]) -> None:
        spelled = sorted((piece, i) for i, piece in enumerate(pieces) if piece)
        self.texts = [piece for piece, _ in spelled]
        self.ids = torch.tensor([i for _, i in spelled])

    def of(self, piece: bytes) -> Tensor:
        return self.ids[bisect_right(self.texts, piece) : bisect_left(self.texts, piece + b"\xff" * 256)]


def teacher_masses(part: MicroBatch, trainer: SimCTTrainer, extensions: Extensions) -> list[tuple[bytes, float, float]]:
    """Of each single unit: the student's token, and the teacher's probability of the tokens that begin with it and are longer, and
    that of all candidates."""
    units = part.alignment.single()
    pieces = trainer.pair.student_pieces(units.student_tokens[units.student_start].tolist())
    logits = teacher_logits(part, trainer)
    found = []
    for piece, row in zip(pieces, units.teacher_start.tolist(), strict=True):
        if piece:
            probability = logits[row].softmax(0)
            masses = probability[extensions.of(piece)].sum(), probability[trainer.shared.teacher_ids].sum()
            found.append((piece, *map(float, masses)))
    return found


if __name__ == "__main__":
    main()
