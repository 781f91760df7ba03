"""The estimates of a dry run against what a step holds, with models of the papers' widths (and few layers) on a pretended GPU."""

import pytest
import torch
from pretended_run import models, two_steps
from real_configs import GEMMA_2_2B, PHI_4_MINI, QWEN_2_5_7B

from simct.training.memory import estimate

TOKENS, ROWS = 1000, 8
PHASES = ("rollout", "teacher", "loss")  # autograd's own backward, of the layers, is not to be had


def ran(gpu, tmp_path, configs, layers=1, attention=("eager", "sdpa"), **options):
    """What was seen, and the estimate of the same."""
    student, teacher = models(gpu, configs, layers, attention=attention)
    budget = ROWS // 2 * (TOKENS + 32)  # two micro-batches: the second finds the gradients of the first
    options = {"logging_steps": 100, "logging_first_step": False, "max_tokens_per_batch": budget, **options}
    trainer, seen = two_steps(gpu, tmp_path, student, teacher, tokens=TOKENS, rows=ROWS, **options)
    prompt = max(len(sample.student_prompt) for sample in trainer._drawn)
    memory = estimate(
        student, teacher, batch_tokens=ROWS // 2 * (prompt + TOKENS), prompt_tokens=prompt, response_tokens=TOKENS, rollouts=ROWS,
        compute_dtype=torch.bfloat16, gradient_checkpointing=options.get("gradient_checkpointing", False),
        shared_tokens=len(trainer.shared), vllm_bytes=0, offload_teacher=options.get("offload_teacher", False),
    )  # fmt: skip
    return seen, memory


def check(seen, memory):
    for phase in PHASES:
        assert seen.held[phase] == pytest.approx(memory.phase(phase), rel=0.1), phase
    # In a micro-batch the host waits for the device once: its losses come over.
    assert not seen.waits["teacher"] and not seen.waits["loss"]
    assert seen.waits["student"]["copy"] == 4 and not seen.waits["student"]["item"]


@pytest.mark.slow
def test_a_step_holds_what_the_dry_run_says(gpu, tmp_path):
    check(*ran(gpu, tmp_path, (GEMMA_2_2B, QWEN_2_5_7B), gradient_checkpointing=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configs", "options"),
    [
        ((GEMMA_2_2B, QWEN_2_5_7B), {"layers": 3}),
        ((GEMMA_2_2B, QWEN_2_5_7B), {"layers": 3, "offload_teacher": True, "gradient_checkpointing": True}),
        ((PHI_4_MINI, QWEN_2_5_7B), {"layers": 2, "attention": ("sdpa", "sdpa"), "gradient_checkpointing": True}),
        ((GEMMA_2_2B, PHI_4_MINI), {"layers": 2, "gradient_checkpointing": True}),
    ],
    ids=["gemma", "gemma-offloaded", "phi", "gemma-phi"],
)
def test_other_runs_do_as_well(gpu, tmp_path, configs, options):
    check(*ran(gpu, tmp_path, configs, **options))
