"""One run of the study: a setting, an arm, a learning rate and a seed, trained and judged."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, get_cosine_schedule_with_warmup
from transformers.utils import logging

from simct import SimCTConfig, SimCTTrainer
from simct.models.hidden import response_hidden_states
from simct.training.micro_batches import split

from .arms import ARMS
from .judges import as_samples, judge, sample_teacher
from .texts import Texts


@dataclass(frozen=True)
class Plan:
    """How long every run is."""

    steps: int = 60
    prompts: int = 16  # of a step
    tokens: int = 32  # of a response, at most
    log_every: int = 10


class StringAligned(SimCTTrainer):
    """SimpleOPD as the public code aligns it: of the 1:1 units only those that its walk over token strings reaches."""

    def _align(self, part, pair, draws):
        units = super()._align(part, pair, draws)
        kept, offsets = set(), [0, 0]
        for a, b in zip(part.samples.student_responses, part.samples.teacher_responses, strict=True):
            for i, j in pair.match_strings(a, b):
                kept.add((offsets[0] + i, offsets[1] + j))
            offsets = [offsets[0] + len(a), offsets[1] + len(b)]
        starts = zip(units.student_start.tolist(), units.teacher_start.tolist(), strict=True)
        return units.select(torch.tensor([start in kept for start in starts], dtype=torch.bool))


def run(
    setting: str, arm: str, rate: float, seed: int, split_name: str, models: Path, texts: Texts, plan: Plan
) -> list[dict[str, Any]]:
    """Rows for results.csv: one of the judges (at step `plan.steps`; arm "none" is the student before any training), and one for
    each logged step. Deterministic but for its seconds."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    records = {"validation": texts.validation, "test": texts.test}[split_name]
    chosen = ARMS.get(arm)
    with tempfile.TemporaryDirectory() as scratch:
        config = SimCTConfig(
            output_dir=scratch, max_steps=plan.steps, per_device_train_batch_size=plan.prompts, learning_rate=rate, seed=seed,
            max_new_tokens=plan.tokens, prompt_format="text", logging_steps=plan.log_every, logging_first_step=False,
            per_device_eval_batch_size=256, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to=[],
            **(chosen.options if chosen else {}),
        )  # fmt: skip
        kind = StringAligned if chosen and chosen.kind == "strings" else SimCTTrainer
        trainer = kind(str(models / setting), str(models / "teacher"), config, texts.train)
        trainer.remove_callback(PrinterCallback)
        judged_on = sample_teacher(trainer, records, replace(trainer.sampling, temperature=1.0, top_p=1.0), seed=17)
        if chosen and chosen.kind == "sft":
            log = finetune(trainer, texts, plan, rate, seed)
        elif chosen:
            trainer.train()
            log = [row for row in trainer.state.log_history if "loss" in row]
        else:
            log = []
        found = judge(trainer, records, judged_on)
    key = {"setting": setting, "arm": arm, "learning_rate": rate, "seed": seed, "split": split_name}
    kept = (
        "loss",
        "reverse_kl_per_byte",
        "response/length",
        "response/ended",
        "response/whitespace",
        "response/entropy",
    )
    curve = [
        {**key, "step": row["step"], **{name.replace("/", "_"): row[name] for name in kept if name in row}}
        for row in log
    ]
    share = {
        name.replace("/", "_"): log[0][name] for name in ("tokens/single", "tokens/longer") if log and name in log[0]
    }
    seconds = time.perf_counter() - started
    return [{**key, "step": plan.steps if chosen else 0, "judged": True, **found, **share, "seconds": seconds}, *curve]


def finetune(trainer: SimCTTrainer, texts: Texts, plan: Plan, rate: float, seed: int) -> list[dict[str, float]]:
    """Cross entropy on the teacher's own samples, as many and sampled in the same way as the student's in the other arms, with
    their optimiser's settings."""
    student = trainer.accelerator.unwrap_model(trainer.model).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * plan.steps), plan.steps)
    order = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = [texts.train[order[i % len(order)]] for i in range(plan.steps * plan.prompts)]
    samples = as_samples(trainer, sample_teacher(trainer, wanted, trainer.sampling, seed=seed))
    log = []
    for step in range(plan.steps):
        (batch,) = split(
            samples.pick(list(range(step, len(samples), plan.steps))), trainer.layout, None, trainer.default_teacher
        )
        hidden = response_hidden_states(student, batch.packed)
        logits = student.get_output_embeddings()(hidden)
        targets = torch.tensor([i for ids in batch.samples.student_responses for i in ids])
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % plan.log_every == 0:
            log.append({"step": step + 1, "loss": loss.item()})
    return log
