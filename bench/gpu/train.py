"""One training step by phase: the demo's pair through the trainer, the first pair's shapes with random weights, its samples."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .. import end2end
from .steps import Item, Run

ENGINES = ("StaticBatching", "ContinuousBatching")
TOY = dict(
    model_type="gemma2", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, vocab_size=90, final_logit_softcapping=30.0, pad_token_id=0,
)  # fmt: skip
TEXT = "steps.txt"
LOOKED_INTO = 3  # of the demo's steps, the last


def items(run: Run) -> list[Item]:
    jobs = [job for job in end2end.jobs(run.device, run.rehearse) if job[0] is not end2end.demo]
    steps = [Item(job[0].__name__.replace("_", " "), lambda job=job: step(run, *job), 60.0) for job in jobs]
    samples = [Item(f"rollout, {name}", lambda name=name: rollout(run, name), 60.0) for name in ENGINES]
    return [Item("demo", lambda: demo(run), 90.0), *steps, *samples]


def demo(run: Run) -> None:
    """Steps of the demo's pair, each for itself: the first ones compile kernels, and the last are looked into."""
    from .watch import Watch, host_lines

    responses, new_tokens, steps = (2, 8, 2) if run.rehearse else (32, 64, 9)
    case = end2end.demo_name(responses, new_tokens)
    watch = Watch(run.device)
    logs = end2end.demo_logs(run.device, steps + LOOKED_INTO, responses, new_tokens, [watch])
    phases = end2end.seconds_by_phase(logs)
    for number, seen in enumerate(watch.steps):
        milliseconds = {f"{name}_ms": 1e3 * values[number] for name, values in phases.items()}
        run.record(what="one step", case=case, **seen, **milliseconds)
    measured = slice(1, steps)
    for name, values in phases.items():
        record(run, case, name, values[measured])
    record(run, case, "sum of phases", [sum(values) for values in zip(*phases.values(), strict=True)][measured])
    record(run, case, "step by the clock", [seen["wall_ms"] / 1e3 for seen in watch.steps[measured]])
    lines = [f"{side}: {found}" for side, found in zip(("student", "teacher"), watch.layouts(), strict=True)]
    lines += [f"{calls:5} waits for the device at {place}" for place, calls in watch.waits.most_common(20)]
    lines += [f"{calls:5} calls {milliseconds:9.2f} ms {name[:90]}" for name, calls, milliseconds in watch.device[:15]]
    if watch.busy_ms is not None:
        lines.append(f"the device is busy for {watch.busy_ms:.1f} ms of {watch.steps[-1]['wall_ms']:.1f} ms")
    (run.folder / TEXT).write_text("\n".join([*lines, *host_lines(watch.host, 60)]) + "\n", encoding="utf-8")
    for line in [*lines, *host_lines(watch.host, 4 if run.rehearse else 18)]:
        run.record(what="seen", case=case, note=line)


def step(run: Run, function: Callable, *arguments) -> None:
    for row in function(*arguments):
        found = {key: value for key, value in dataclasses.asdict(row).items() if value not in (None, "")}
        milliseconds = {"median_ms": 1e3 * row.median_s} if row.median_s is not None else {}
        run.record(what="phase", **{**found, **milliseconds})


def record(run: Run, case: str, name: str, seconds: Sequence[float]) -> None:
    """The means add up, the medians do not: a phase that is long in some steps only is in the means."""
    spans = [1e3 * value for value in seconds]
    run.record(what="phase", case=case, method=name, mean_ms=statistics.mean(spans), median_ms=statistics.median(spans),
               min_ms=min(spans), max_ms=max(spans), repeats=len(spans))  # fmt: skip


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
