"""What a run computes in, and how its passes are cut, where nobody has said: chosen by the device and its memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from simct.console import console
from simct.training.memory import RESERVE, device_memory, estimate, kv_cache_bytes_of, weight_bytes

ENOUGH = 8192  # tokens of a pass: with more a GPU is hardly faster for a token
UNKNOWN_PROMPT = 512  # tokens of the longest prompt, where the data are streamed
# Of a step's phases those that a pass's size decides. (Of the rollouts' own the engine takes care.)
PASSES = ("teacher", "student", "loss")


def numbers_of(
    config,
    student: nn.Module,
    prompt_tokens: int,
    shared_tokens: int,
    *,
    on_cpu: bool = False,
    available: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """The arguments of `estimate` that a configuration means, with prompts of so many tokens. `available`: bytes of the device, of
    which a vLLM in this process takes its share. `processes`: of the run."""
    generations = _get(config, "num_generations", 1)
    sequence = prompt_tokens + config.max_new_tokens
    # Sequences are never cut: one that is longer than the budget goes through alone.
    whole = config.per_device_train_batch_size * generations * sequence
    budget = _get(config, "max_tokens_per_batch", None)
    compute = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    weights = next(p.dtype for p in student.parameters() if p.is_floating_point())
    copy = _get(config, "rollout_dtype", None)
    if copy is None and config.bf16 and weights == torch.float32 and not on_cpu:
        copy = "bfloat16"
    copy = getattr(torch, copy) if copy else None
    sharded = config.shards_student and processes > 1
    engine, served = config.rollout_engine, None
    if engine in ("vllm", "vllm-server"):
        # Without a share of its own it takes what the training leaves: its weights and one sequence must have room.
        share = _get(config, "vllm_gpu_memory_utilization", None)
        least = 2 * sum(p.numel() for p in student.parameters()) + kv_cache_bytes_of(student, sequence, 2)
        copy, served = None, 0 if engine == "vllm-server" else int(share * available) if share else least
    cache = _get(config, "kv_cache_gb", None)
    return dict(
        batch_tokens=whole if budget is None else max(sequence, min(whole, budget)),
        prompt_tokens=prompt_tokens,
        response_tokens=config.max_new_tokens,
        rollouts=config.per_device_train_batch_size * config.gradient_accumulation_steps * generations,
        optim=str(getattr(config.optim, "value", config.optim)),
        compute_dtype=compute,
        gradient_checkpointing=bool(
            config.gradient_checkpointing
            or _get(config, "activation_checkpointing", False)
            or _get(config, "fsdp_checkpoints", False)
        ),
        # Of a sharded student samples come from a whole copy.
        rollout_dtype=(copy or weights) if sharded and served is None else copy if copy != weights else None,
        kv_cache_bytes=None if cache is None else int(cache * 1e9),
        vllm_bytes=served,
        shared_tokens=shared_tokens,
        chunk_rows=config.chunk_rows,
        offload_teacher=bool(_get(config, "offload_teacher", False)),
        device_type="cpu" if on_cpu else "cuda",
        # Teachers of unlike kinds leave "auto" open: the costlier of the two.
        objective={"auto": "escd"}.get(objective := _get(config, "objective", "simct"), objective),
        score=_get(config, "score", "mean_logprob"),
        teacher_top_k=_get(config, "teacher_top_k", 64),
        processes=processes,
        shard_student=sharded,
        shard_teacher=config.shares_teacher(processes),
    )


def fitting_passes(
    config, student: nn.Module, teacher: nn.Module | None, numbers: Mapping[str, Any], available: int
) -> dict[str, Any]:
    """Values of `gradient_checkpointing` and `max_tokens_per_batch`, as far as they are not said, with which a step's passes fit
    `available` bytes: whole and without checkpointing where they fit so, else the largest that fit, with checkpointing only where
    passes of `ENOUGH` tokens do not. If none fits: what takes the least.

    Args:
        numbers: those of `numbers_of`.
    """
    checkpoints = [bool(numbers["gradient_checkpointing"])]
    free = "gradient_checkpointing" in config.unsaid and not checkpoints[0]  # True may have been set since
    if free and getattr(student, "supports_gradient_checkpointing", False):
        checkpoints = [False, True]
    sequence, whole = numbers["prompt_tokens"] + numbers["response_tokens"], numbers["batch_tokens"]
    sizes = [whole] if config.max_tokens_per_batch is not None else list(_halves(whole, sequence))
    found = {"gradient_checkpointing": checkpoints[-1], "batch_tokens": sizes[-1]}
    least = {False: min(whole, max(sequence, ENOUGH)), True: 1}
    tried = ((again, size) for again in checkpoints for size in sizes if len(checkpoints) == 1 or size >= least[again])
    for again, size in tried:
        changed = {**numbers, "gradient_checkpointing": again, "batch_tokens": size}
        memory = estimate(student, teacher, **changed)
        if max(memory.phase(name) for name in PASSES) <= available * (1 - RESERVE):
            found = {"gradient_checkpointing": again, "batch_tokens": size}
            break
    chosen = {"gradient_checkpointing": found["gradient_checkpointing"]} if len(checkpoints) > 1 else {}
    if config.max_tokens_per_batch is None and found["batch_tokens"] < whole:
        chosen["max_tokens_per_batch"] = found["batch_tokens"]
    return chosen


def _halves(whole: int, sequence: int) -> Iterator[int]:
    """`whole`, the powers of two below it, and `sequence`, which is never cut."""
    size = whole
    while size > sequence:
        yield size
        size = 1 << (size - 1).bit_length() - 1
    yield min(whole, sequence)


def choose(
    config,
    student: nn.Module,
    teacher: nn.Module | None,
    prompt_tokens: int,
    shared_tokens: int,
    available: int,
    processes: int = 1,
) -> str:
    """Sets in `config` what is not said of a run of so many processes, each on a GPU of `available` bytes. Returns the line that
    tells of it, empty if all is said."""
    chosen = {}
    if not (_stays(student) or _stays(teacher)):  # else its memory is not what is counted here
        options = {"available": available, "processes": processes}
        numbers = numbers_of(config, student, max(1, prompt_tokens), shared_tokens, **options)
        try:
            chosen = fitting_passes(config, student, teacher, numbers, available)
        except ValueError:  # an optimiser whose memory is not known
            chosen = {}
    for name, value in chosen.items():
        setattr(config, name, value)
    if "gradient_checkpointing" in chosen and hasattr(config, "activation_checkpointing"):  # its new name
        config.activation_checkpointing = chosen["gradient_checkpointing"]
    told = {"bf16": config.bf16, **chosen} if "bf16" in config.unsaid else chosen
    if not told:
        return ""
    values = ", ".join(f"{name} {str(value).lower()}" for name, value in told.items())
    return f"Chosen for a GPU of {available / 1e9:.0f} GB, as the run does not say: {values}"


def settle(config, student: nn.Module, scorers: Mapping[str, Any], prompt_tokens: int) -> None:
    """`choose` for the devices of the processes, with the largest of the teachers; prints the line. A CPU is asked nothing."""
    if config.device.type != "cuda":
        return
    local = [scorer.teacher.model for scorer in scorers.values() if hasattr(scorer.teacher, "model")]
    teacher = max(local, key=weight_bytes, default=None)
    shared = max(len(scorer.pair.shared) for scorer in scorers.values())
    # What this process holds already is counted again.
    available = device_memory(config.device) + torch.cuda.memory_reserved(config.device)
    if not config.offload_teacher:  # the others are there as well; of what processes share this is more than each holds
        available -= sum(weight_bytes(model) for model in local if model is not teacher)
    seen = [(available, prompt_tokens)]
    if config.world_size > 1:  # all choose the same
        seen = gather_object(seen)
    available, prompt_tokens = min(free for free, _ in seen), max(tokens for _, tokens in seen)
    line = choose(config, student, teacher, prompt_tokens or UNKNOWN_PROMPT, shared, available, config.world_size)
    if line and config.process_index == 0:
        console.print(line, highlight=False, soft_wrap=True)


def _stays(model: nn.Module | None) -> bool:
    """Quantised or spread over devices."""
    return model is not None and bool(getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None))


def _get(config, name: str, default):
    value = getattr(config, name, default)
    return default if value is None else value
