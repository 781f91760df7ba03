"""One training step by phase: the demo's pair through the trainer, the first pair's shapes with random weights, its samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from .. import end2end
from .steps import Item, Run

ENGINES = ("StaticBatching", "ContinuousBatching")
TOY = dict(
    model_type="gemma2", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, vocab_size=90, final_logit_softcapping=30.0, pad_token_id=0,
)  # fmt: skip


def items(run: Run) -> list[Item]:
    jobs = end2end.jobs(run.device, run.rehearse)
    steps = [Item(job[0].__name__.replace("_", " "), lambda job=job: step(run, *job), 60.0) for job in jobs]
    return steps + [Item(f"rollout, {name}", lambda name=name: rollout(run, name), 60.0) for name in ENGINES]


def step(run: Run, function: Callable, *arguments) -> None:
    for row in function(*arguments):
        found = {key: value for key, value in dataclasses.asdict(row).items() if value not in (None, "")}
        milliseconds = {"median_ms": 1e3 * row.median_s} if row.median_s is not None else {}
        run.record(what="phase", **{**found, **milliseconds})


def rollout(run: Run, name: str) -> None:
    """Samples of a student with random weights, which seldom end before their limit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from simct.rollouts import transformers_engines
    from simct.rollouts.protocol import Sampling

    config = TOY if run.rehearse else end2end.FIRST_PAIR[0]
    prompts, width, new = (2, 4, 4) if run.rehearse else (32, 128, 128)
    with torch.device(run.device):
        dtype = torch.float32 if run.rehearse else torch.bfloat16
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).eval()
    engine = getattr(transformers_engines, name)(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, config["vocab_size"], (prompts, width), generator=draw).tolist()
    spans, tokens = [], 0
    for repeat in range(3):  # the first one warms up
        begin = time.perf_counter()
        responses = engine.generate(ids, Sampling((1,), 0, new), seed=repeat)
        spans.append(1e3 * (time.perf_counter() - begin))
        tokens = sum(len(response.token_ids) for response in responses)
    case = f"{prompts} prompts of {width} tokens, at most {new} new ones"
    run.record(what="phase", case=case, method=name, median_ms=min(spans[1:]), first_ms=spans[0], tokens=tokens,
               tokens_per_s=1e3 * tokens / min(spans[1:]))  # fmt: skip
