"""How much memory a run will take, part by part, from two models that may live on the meta device: nothing is allocated or loaded.

Weights, gradients and optimiser states are exact counts. Activations follow what autograd saves of a decoder layer (see
`activation_bytes`), the rest what this package's own code allocates. `MemoryEstimate.peak` is the largest of the phases of a step,
which do not hold everything at once.
"""

from dataclasses import dataclass, fields

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from simct.training.loss_memory import loss_bytes, shared_rows_bytes
from simct.training.sharded_memory import gathered_of_student, layer_size, shares, size_of, teacher_sizes

RESERVE = 0.08  # share of a device's memory kept free: the context of CUDA, workspaces, fragmentation

PARTS = {
    "student_weights": "student: weights",
    "gradients": "student: gradients",
    "optimizer": "student: optimiser states",
    "cast_weights": "student: weights cast for bf16/fp16 autocast, or gathered",
    "rollout_copy": "student: low-precision copy for rollouts",
    "kv_cache": "rollouts: keys and values",
    "vllm": "rollouts: vLLM's weights, keys and values",
    "activations": "student: activations kept for the backward",
    "working": "student: one layer at work",
    "teacher_weights": "teacher: weights",
    "teacher_working": "teacher: one layer at work",
    "teacher_hidden": "teacher: hidden rows of the step's responses",
    "student_hidden": "student: hidden rows of a micro-batch",
    "shared_rows": "loss: the teacher's rows of the shared vocabulary",
    "loss": "loss: logits, gradients by them and by the head, tables",
}
# What is held at once. The teacher scores all responses of a step before the student's first micro-batch; keys and values are
# given back where sampling ends (`release_cache`, vLLM's sleep), gradients after the optimiser step. The loss makes its gradient
# before the layers' backward begins, and holds nothing then.
_ALWAYS = ("student_weights", "optimizer", "rollout_copy", "shared_rows")
_STEP = ("teacher_weights", "gradients", "cast_weights", "activations", "teacher_hidden", "student_hidden")
PHASES = {
    "rollout": (*_ALWAYS, "teacher_weights", "kv_cache", "vllm"),
    "teacher": (*_ALWAYS, "teacher_weights", "teacher_working", "teacher_hidden"),
    "student": (*_ALWAYS, *_STEP, "working"),
    "loss": (*_ALWAYS, *_STEP, "loss"),
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part; `PARTS` says what each is."""

    student_weights: int
    gradients: int
    optimizer: int
    cast_weights: int
    rollout_copy: int
    kv_cache: int
    vllm: int
    activations: int
    working: int
    teacher_weights: int
    teacher_working: int
    teacher_hidden: int
    student_hidden: int
    shared_rows: int
    loss: int
    teacher_head: int = 0
    offload_teacher: bool = False  # all but its head is held in main memory except while it scores
    keeps_gradients: bool = False  # from one step to the next: DDP's buckets are the gradients

    def phase(self, name: str) -> int:
        """The bytes held in one of `PHASES`."""
        parts = (*PHASES[name], *(["gradients"] if self.keeps_gradients else []))
        held = {part: getattr(self, part) for part in parts}
        if self.offload_teacher and name != "teacher":
            held["teacher_weights"] = self.teacher_head  # it stays, for the loss
        return sum(held.values())

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.phase)

    @property
    def peak(self) -> int:
        return self.phase(self.peak_phase)


def estimate(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    batch_tokens: int,
    prompt_tokens: int,
    response_tokens: int,
    rollouts: int,
    optim: str = "adamw_torch_fused",
    compute_dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    rollout_dtype: torch.dtype | None = None,
    kv_cache_bytes: int | None = None,
    vllm_bytes: int | None = None,
    shared_tokens: int | None = None,
    chunk_rows: int | None = None,
    offload_teacher: bool = False,
    device_type: str = "cuda",
    objective: str = "simct",
    score: str = "mean_logprob",
    teacher_top_k: int = 64,
    processes: int = 1,
    shard_student: bool = False,
    shard_teacher: bool = False,
) -> MemoryEstimate:
    """The bytes of each part of a run, in each of its processes.

    Args:
        student, teacher: models, on any device ("meta" costs nothing); what of the student is trained is read from
            `requires_grad`, so that a PEFT model counts as what it is. A teacher behind a server is None.
        batch_tokens: prompt and response tokens of one forward and backward pass, padding included.
        prompt_tokens, response_tokens: of one sequence, the longest to be expected: attention scores, the cache and the share
            of a batch's rows that the loss reads depend on them.
        rollouts: responses sampled, and scored by the teacher, at once: those of a whole step.
        optim: the name as in `TrainingArguments.optim`.
        compute_dtype: autocast's, if it is not the weights' own.
        rollout_dtype: that of the student's copy for rollouts; no copy if not given.
        kv_cache_bytes: a bound on the rollouts' keys and values.
        vllm_bytes: what a vLLM on this device takes, that samples in the student's place; 0 for one elsewhere.
        shared_tokens: K, the smaller vocabulary if not given.
        chunk_rows: as `linear_simct_loss`; by device if not given.
        objective, score: as `SimCTConfig`'s.
        teacher_top_k: log-probabilities of each row, of a served teacher.
        processes: of the run, each with a device. shard_student, shard_teacher: they share the model's weights out among them
            (FSDP2; the teacher's head is whole in each), and what is trained of them.
    Raises:
        ValueError: a count below 1.
    """
    counts = {"batch_tokens": batch_tokens, "prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    for name, value in {**counts, "rollouts": rollouts}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    sequence_tokens = prompt_tokens + response_tokens
    rows = -(-batch_tokens * response_tokens // sequence_tokens)
    parameters = list(student.parameters())  # tied weights come once
    held = shares(parameters, processes if shard_student else 1)
    trained = [share for p, share in zip(parameters, held, strict=True) if p.requires_grad]
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    compute = compute_dtype or dtype
    autocast = compute != dtype
    cache_dtype = rollout_dtype or compute
    gathered = shard_student and processes > 1
    layer = layer_bytes(student, sequence_tokens, dtype, compute)
    # What a backward makes of a layer's tensors; with checkpointing, after making the tensors themselves again.
    working = batch_tokens * layer * (2 if gradient_checkpointing else 1)
    if gathered:  # a layer's gradients, whole, and as they are sent
        working += 2 * layer_size(student, compute.itemsize)
        cast = gathered_of_student(student, compute.itemsize)
    else:
        cast = cast_bytes(student, compute, gradient_checkpointing) if autocast else 0
    cache = kv_cache_bytes_of(student, sequence_tokens, cache_dtype.itemsize) * rollouts
    teacher_weights = teacher_working = teacher_head = 0
    row_bytes = teacher_top_k * (8 + 4) + 4  # ids, their log-probabilities, the token's
    if teacher is not None:
        teacher_dtype = next(p.dtype for p in teacher.parameters() if p.is_floating_point())
        teacher_weights = weight_bytes(teacher)
        teacher_working = batch_tokens * forward_bytes(teacher, sequence_tokens, teacher_dtype.itemsize)
        teacher_head = weight_bytes(teacher.get_output_embeddings())
        if shard_teacher and processes > 1:
            teacher_weights, whole = teacher_sizes(teacher, processes, offload_teacher)
            teacher_working += whole
        row_bytes = _config(teacher).hidden_size * teacher_dtype.itemsize
    return MemoryEstimate(
        student_weights=size_of(held) + size_of(student.buffers()),
        gradients=size_of(trained),
        optimizer=optimizer_bytes(trained, optim),
        cast_weights=cast,
        rollout_copy=sum(p.numel() for p in parameters) * rollout_dtype.itemsize if rollout_dtype else 0,
        kv_cache=0 if vllm_bytes is not None else cache if kv_cache_bytes is None else min(cache, kv_cache_bytes),
        vllm=vllm_bytes or 0,
        activations=activation_bytes(
            student, batch_tokens, sequence_tokens, compute_dtype=compute, checkpointing=gradient_checkpointing
        ),
        working=working,
        teacher_weights=teacher_weights,
        teacher_working=teacher_working,
        teacher_hidden=rollouts * response_tokens * row_bytes,
        student_hidden=rows * _config(student).hidden_size * compute.itemsize,
        shared_rows=shared_rows_bytes(
            teacher, shared_tokens, student.get_output_embeddings().weight.shape[0], objective
        ),
        loss=loss_bytes(student, teacher, rows, compute, shared_tokens, chunk_rows, device_type, objective, score),
        teacher_head=teacher_head,
        offload_teacher=offload_teacher,
        keeps_gradients=processes > 1 and not shard_student,
    )


def weight_bytes(model: nn.Module) -> int:
    """Parameters, tied ones once, and buffers, each in its own dtype."""
    return size_of([*model.parameters(), *model.buffers()])


def optimizer_bytes(trained: list[nn.Parameter], optim: str) -> int:
    """The optimiser's states of the trained parameters.

    AdamW in torch keeps two moments in each parameter's dtype and one float32 step count a tensor. 8-bit optimisers (bitsandbytes,
    torchao) keep a byte for each state and element and a float32 scale for each 256, and 32-bit states for tensors below 4,096
    elements. Raises ValueError for an optimiser that is not known here.
    """
    name = optim.removeprefix("paged_")
    if name in ("sgd",):
        return 0
    if name == "adafactor":  # rows and columns of a matrix, one number for each element of a vector
        return sum(4 * (sum(p.shape) if p.dim() == 2 else p.numel()) for p in trained)
    states = 1 if name.startswith(("lion", "rmsprop", "adagrad")) else 3 if name.startswith("ademamix") else 2
    if not name.startswith(("adamw", "stable_adamw", "lion", "rmsprop", "adagrad", "ademamix")):
        raise ValueError(
            f"optim is {optim!r}: its memory is not known here; adamw_torch_fused keeps 8 bytes a parameter"
        )
    if name.endswith("4bit"):
        return sum(states * (p.numel() // 2 + 4 * -(-p.numel() // 128)) for p in trained)
    if name.endswith("8bit"):
        small, large = ([p for p in trained if (p.numel() < 4096) == below] for below in (True, False))
        return sum(4 * states * p.numel() for p in small) + sum(
            states * (p.numel() + 4 * -(-p.numel() // 256)) for p in large
        )
    if name in ("lion_32bit", "ademamix"):  # bitsandbytes: float32 states, no step tensor
        return sum(4 * states * p.numel() for p in trained)
    return sum(states * p.numel() * p.element_size() + 4 for p in trained)


def activation_bytes(
    model: nn.Module,
    tokens: int,
    sequence_tokens: int,
    *,
    compute_dtype: torch.dtype | None = None,
    checkpointing: bool = False,
) -> int:
    """What autograd keeps of a decoder's forward over so many tokens: the last norm, and each layer or, with checkpointing, its
    input."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config = _config(model)
    stream = config.hidden_size * _stream_size(dtype, compute_dtype or dtype)
    layer = stream if checkpointing else layer_bytes(model, sequence_tokens, dtype, compute_dtype or dtype)
    return tokens * (config.num_hidden_layers * layer + 3 * stream)


def layer_bytes(model: nn.Module, sequence_tokens: int, dtype: torch.dtype, compute: torch.dtype) -> int:
    """Bytes that autograd keeps of one decoder layer for one token.

    The count of Korthikanti et al. (2022, arXiv 2205.05198, section 4.1) made anew for layers with RMSNorm, rotary embeddings and
    a gated feed-forward as transformers writes them, without dropout: each norm keeps its input and the normalised input in
    the residual's precision; the projections keep their inputs (under autocast a cast copy each); the attention keeps
    queries, keys, values and its output; the feed-forward keeps gate, activated gate, up and their product. Eager
    attention keeps its probabilities too, and the tanh of a soft-cap: heads x the sequence, for each token.
    """
    config = _config(model)
    hidden, heads, kv_heads, head_dim = _attention_sizes(config)
    norms = 4 if config.model_type.startswith(("gemma2", "gemma3")) else 2
    stream = hidden * _stream_size(dtype, compute)
    inputs = hidden * (5 if dtype != compute else 2)
    eager = _is_eager(config)
    attention = (2 * heads + 2 * (heads if eager else kv_heads)) * head_dim
    scores = 0
    if eager:  # the softmax in float32, its cast, and the soft-cap's tanh
        cast = compute.itemsize if compute != torch.float32 else 0
        capped = compute.itemsize if getattr(config, "attn_logit_softcapping", None) else 0
        scores = heads * sequence_tokens * (4 + cast + capped)
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "moe_intermediate_size", None) if experts else None
    feed_forward = 4 * (experts * (width or config.intermediate_size) if experts else config.intermediate_size)
    return 2 * norms * stream + (inputs + attention + feed_forward) * compute.itemsize + scores


def forward_bytes(model: nn.Module, sequence_tokens: int, itemsize: int) -> int:
    """Bytes of one layer's forward without a graph, for one token: the residual stream, its norm and their temporaries, and either
    the activated gate, up and their product, or queries, keys, values and what comes of them."""
    config = _config(model)
    hidden, heads, kv_heads, head_dim = _attention_sizes(config)
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "moe_intermediate_size", None) if experts else None
    feed_forward = 3 * (experts * (width or config.intermediate_size) if experts else config.intermediate_size)
    attention = (2 * heads + 2 * kv_heads) * head_dim
    scores = heads * sequence_tokens * (4 + itemsize) if _is_eager(config) else 0
    return max(feed_forward * itemsize, attention * itemsize + scores) + 4 * hidden * itemsize


def cast_bytes(student: nn.Module, compute: torch.dtype, checkpointing: bool) -> int:
    """Weights that autocast has made copies of where the loss begins: all matrices that are multiplied, which the graph keeps; with
    checkpointing, which makes them again, the head's."""
    head, embedding = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    cast = [head] if checkpointing else [p for p in student.parameters() if p.dim() > 1 and p is not embedding]
    return sum(p.numel() for p in {id(p): p for p in [*cast, head]}.values()) * compute.itemsize


def kv_cache_bytes_of(model: nn.Module, tokens: int, itemsize: int) -> int:
    """Keys and values of one sequence; a layer with a sliding window keeps no more than the window."""
    config = _config(model)
    _, _, kv_heads, head_dim = _attention_sizes(config)
    window = getattr(config, "sliding_window", None) or tokens
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    kept = sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds)
    return 2 * kept * kv_heads * head_dim * itemsize


def device_memory(device: torch.device | str) -> int:
    """Bytes free on a GPU, or available in main memory. ValueError for a device that does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        except (OSError, StopIteration):
            pass
    raise ValueError(f"device {str(device)!r} does not say how much memory it has: give it in bytes")


def fits(memory: MemoryEstimate, device: torch.device | str | int) -> bool:
    """Whether the peak and a reserve of 8 % fit a device, or a number of bytes."""
    available = device if isinstance(device, int) else device_memory(device)
    return memory.peak <= available * (1 - RESERVE)


def memory_table(memory: MemoryEstimate, available: int | None = None) -> Table:
    """Every part in GB, and which of them each phase holds; the largest phase is the peak."""
    table = Table(title="Estimated memory, GB (10^9 bytes)", show_footer=True)
    table.add_column("part", footer="held at once")
    table.add_column("size", justify="right", footer=_gb(memory.peak))
    for phase in PHASES:
        size = memory.phase(phase)
        over = available is not None and size > available * (1 - RESERVE)
        style = "bold red" if over else "bold" if phase == memory.peak_phase else ""
        table.add_column(phase, justify="right", footer=Text(_gb(size), style=style))
    for part in [field.name for field in fields(memory) if field.name in PARTS]:
        size = getattr(memory, part)
        if size == 0:
            continue
        name = PARTS[part]
        away = memory.offload_teacher and part == "teacher_weights"
        rest = memory.teacher_head if away else size
        cells = [_gb(size if p == "teacher" else rest) if part in held else "" for p, held in PHASES.items()]
        table.add_row(f"{name} (offloaded)" if away else name, _gb(size), *cells)
    if available is not None:
        table.caption = f"{available / 1e9:.1f} GB available, of which {RESERVE:.0%} are kept in reserve"
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 5e6 else f"{size / 1e9:.4f}"


def _config(model: nn.Module):
    return model.config.get_text_config()


def _is_eager(config) -> bool:
    return getattr(config, "_attn_implementation", None) == "eager"


def _stream_size(dtype: torch.dtype, compute: torch.dtype) -> int:
    """Bytes of an element where the residual stream is kept: norms work in float32 whatever the weights are."""
    return 4 if dtype == torch.float32 or compute != dtype else (dtype.itemsize + 4) // 2


def _attention_sizes(config) -> tuple[int, int, int, int]:
    """hidden size, query heads, key-value heads, head size."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.hidden_size, heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
