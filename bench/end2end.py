"""The suite `end2end`: whole training steps, seconds and tokens per second by phase.

The demo's pair through `SimCTTrainer`, rollouts included; on a GPU also a step of models with the shapes of the paper's
first pair and random weights, without rollouts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence

import torch
from torch import nn

from simct.training.metrics import PhaseTimer
from simct_kernels import linear_simct_loss

from . import record
from .cases import Case, make_shared, make_units
from .measure import PeakMemory, device_name
from .record import Row
from .suites import GEMMA, QWEN, pair

FIRST_PAIR = (
    dict(
        model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, vocab_size=256_000, final_logit_softcapping=30.0,
    ),
    dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False,
    ),
)  # fmt: skip


def demo(device_type: str, steps: int, responses: int, new_tokens: int) -> list[Row]:
    """Steps of the demo's pair; the first one, which warms up, is left out if there are more."""
    logs = demo_logs(device_type, steps, responses, new_tokens)[1 if steps > 1 else 0 :]
    # As many as the rollout made: the other rates are of the same tokens.
    tokens = [responses * log["response/length"] for log in logs]
    phases = seconds_by_phase(logs)
    phases["step"] = [sum(values) for values in zip(*phases.values(), strict=True)]
    peak = int(1e9 * max(log["peak_memory_gb"] for log in logs))  # of the process
    return _rows(demo_name(responses, new_tokens), phases, tokens, device_type, {"dtype": "float32"}, peak)


def demo_name(responses: int, new_tokens: int) -> str:
    return f"demo, {responses} responses of at most {new_tokens} tokens"


def seconds_by_phase(logs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each log, 0 where a phase did not occur."""
    names = list(dict.fromkeys(key for log in logs for key in log if key.startswith("seconds/")))
    return {name.removeprefix("seconds/"): [log.get(name, 0.0) for log in logs] for name in names}


def demo_logs(device_type: str, steps: int, responses: int, new_tokens: int, callbacks=()) -> list[dict[str, float]]:
    """What a training of the demo's pair logs, one entry a step."""
    from transformers import PrinterCallback
    from transformers.utils import logging

    from simct import SimCTConfig, SimCTTrainer
    from simct.data.records import read_prompts
    from simct.demo import ASSETS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config = SimCTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=responses,
            max_new_tokens=new_tokens,
            temperature=1.0,
            top_p=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=device_type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        prompts = read_prompts(ASSETS / "train.jsonl")
        trainer = SimCTTrainer(
            str(ASSETS / "student"), str(ASSETS / "teacher"), config, prompts, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def random_weights(
    device_type: str, student_config: dict, teacher_config: dict, case: Case, sequences: int, steps: int
) -> list[Row]:
    """Steps of models with random weights on random tokens in `sequences` sequences: everything but the rollout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from simct_kernels import LMHead

    device, dtype = torch.device(device_type), getattr(torch, case.dtype)

    def make(config: dict) -> nn.Module:
        with device:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)

    student, teacher = make(student_config), make(teacher_config).eval().requires_grad_(False)
    # Renamed in transformers 5.
    getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
    student.train()
    shared = make_shared(case)
    units = make_units(case, shared)
    student_rows, teacher_rows = len(units.student_tokens), len(units.teacher_tokens)
    units, shared = units.to(device), shared.to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    heads = LMHead.from_model(student), LMHead.from_model(teacher)
    phase = PhaseTimer(device)

    def hidden(model: nn.Module, tokens: torch.Tensor, count: int) -> torch.Tensor:
        width = -(-count // sequences)
        padded = torch.zeros(sequences * width, dtype=torch.int64, device=device)
        padded[:count] = tokens
        output = model.get_decoder()(input_ids=padded.view(sequences, width), use_cache=False, return_dict=True)
        return output.last_hidden_state.flatten(0, 1)[:count]

    phases: dict[str, list[float]] = {}
    memory = PeakMemory(device)
    for step in range(steps + 1):  # the first one warms up
        phase.flush()
        begin = time.perf_counter()
        with phase("teacher"), torch.no_grad():
            teacher_hidden = hidden(teacher, units.teacher_tokens, teacher_rows)
        with phase("student"):
            student_hidden = hidden(student, units.student_tokens, student_rows)
        with phase("loss"):
            loss = linear_simct_loss(student_hidden, heads[0], teacher_hidden, heads[1], units, shared)
        with phase("backward"):
            (loss / student_rows).backward()
        with phase("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
        if step:
            seconds = {**phase.flush(), "step": time.perf_counter() - begin}
            for name, value in seconds.items():
                phases.setdefault(name, []).append(value)
    common = dict(
        dtype=case.dtype,
        student_rows=student_rows,
        teacher_rows=teacher_rows,
        units=len(units),
        shared=len(shared),
    )
    return _rows(
        f"{case.name}, random weights, {sequences} sequences",
        phases,
        [student_rows] * steps,
        device_type,
        common,
        memory.above_start(),
    )


def _rows(
    case: str,
    phases: dict[str, list[float]],
    tokens: Sequence[float],
    device_type: str,
    common: dict,
    peak: int,
) -> list[Row]:
    rows = []
    for name, seconds in phases.items():
        row = Row("end2end", case, name, scope="phase", device=device_name(torch.device(device_type)), **common)
        row = record.timed(row, seconds)
        row.rows_per_s = sum(tokens) / sum(seconds) if sum(seconds) else None
        row.peak_bytes = peak if name == "step" else None
        rows.append(row)
    return rows


def jobs(device_type: str, quick: bool) -> list[tuple]:
    """Functions and their arguments, in order."""
    if quick:
        return [(demo, device_type, 1, 2, 8)]
    if device_type == "cpu":
        return [(demo, device_type, 4, 16, 32)]
    case = pair(GEMMA, QWEN, 97_675, 8192)
    return [(demo, device_type, 6, 32, 64), (random_weights, device_type, *FIRST_PAIR, case, 8, 3)]
