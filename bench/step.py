"""The suite `step`: where the time of a training step goes, counted without a GPU, for 64 responses of 1,500 tokens.

    python -m bench --suite step

Gemma-2-2B <- Qwen2.5-7B on one H100, bf16 over float32 weights, gradient checkpointing. The rule: an operation takes the longer of
its bytes at the rate of a copy and its products at the rate measured for a head's (`bench/cost.py`); a phase takes the longer of
its operations' sum and of what the host needs to start them, HOST each. Operations are those of the real models on tensors without
data, at full depth and width; how many a sampled token has is counted in the engine itself, on small weights of the same depth. A
backward pass is two forward passes, and a third with checkpointing. `shapes that were measured` holds the rule to a run on an H100.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.eager_paged import eager_paged_attention_forward

from simct.demo import ASSETS
from simct.rollouts.draws import UniformDraws
from simct.rollouts.protocol import Sampling
from simct.rollouts.transformers_engines import StaticBatching

from . import record
from .cases import GEMMA, QWEN, make_shared
from .cost import CEILINGS, count_linear, counted_apart, worked_example
from .cost import read as read_rows
from .counting import Counter, Operation
from .end2end import FIRST_PAIR
from .suites import pair

RESPONSES, PROMPT, NEW = 64, 128, 1500
LENGTH = PROMPT + NEW - 1  # of a sequence that a model reads: the last token predicts nothing
BUDGET = 8192  # tokens of a micro-batch
COPY, PRODUCT, CACHE = CEILINGS["H100"]
PINNED, PAGEABLE = 50e9, 6e9  # bytes/s between main memory and an H100, by PCIe 5
METRIC_ROWS = 512  # of which a log's statistics are taken
# Measured on an H100 (bench/results/gpu-nvidia-h100-80gb-hbm3): the demo's rollout (`tiles`, its least, hardly any of which
# is the device's), the loss as first run (`before`), and a step with random weights in the first pair's shapes (`tiles`).
DEMO_ROLLOUT, DEMO_NEW = 0.322, 64
FIRST_LOSS = 79.1e-3  # 8,192 rows
MEASURED = {"teacher": 0.1997, "student": 0.1036, "backward": 0.3186}  # 7,097 and 7,906 tokens, in 8 sequences each
COUNTED = "counted"  # the attention of a model on tensors without data


@dataclass(frozen=True)
class Work:
    """Of one phase: operations started, bytes moved, FLOPs, and seconds of the device."""

    launches: float = 0
    moved: float = 0
    flops: float = 0
    device: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(one + its for one, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))

    @property
    def seconds(self) -> float:
        return max(self.device, self.launches * host_seconds())


@dataclass(frozen=True)
class Setting:
    """A step's choices. `engine`: "static", "paged behind a mask" or "graphs" (keys and values read where they lie, no launch by
    the host: vLLM, or continuous batching with flash-attn and transformers 5.18)."""

    title: str
    engine: str
    flash_student: bool = False  # flash-attn, in place of eager attention with its soft cap
    masked_teacher: bool = False  # SDPA with a dense mask, in place of variable-length attention
    offload: str = "pinned"  # or "pageable": there and back; or "none"
    first_loss: bool = False
    every_row: bool = False  # statistics of all rows, in place of METRIC_ROWS


SETTINGS = (
    Setting("as first shipped", "paged behind a mask", False, True, "pageable", True, True),
    Setting("today, as it comes", "static"),
    Setting("today, with vLLM", "graphs"),
    Setting("today, with vLLM and flash-attn", "graphs", True),
)


def run(folder: Path, seconds: float) -> tuple[list[dict], str]:
    """The phases of each setting, and those of the step that was measured, and why they are missing. Writes phases.csv."""
    note = counted_apart("bench.step", folder, seconds)
    return read_rows(folder / "phases.csv"), note


def predicted() -> Iterator[dict]:
    for setting in SETTINGS:
        found = dict(phases(setting))
        for name, work in found.items():
            yield _row(setting.title, name, work)
        seconds = sum(work.seconds for work in found.values())
        whole = sum(found.values(), Work())
        yield _row(setting.title, "step", whole) | {"predicted_s": f"{seconds:.3f}"}


def measured() -> Iterator[dict]:
    """The rule against a step on an H100."""
    teacher, student = read(_model(1), 8, 7097 // 8, "flash"), read(_model(0), 8, 7906 // 8, "eager")
    for name, work in {"teacher": teacher, "student": student, "backward": student * 3}.items():
        yield _row("shapes that were measured", name, work) | {"measured_s": f"{MEASURED[name]:.3f}"}


def _row(setting: str, phase: str, work: Work) -> dict:
    return {
        "setting": setting, "phase": phase, "operations": f"{work.launches:.0f}", "GB": f"{work.moved / 1e9:.0f}",
        "TFLOP": f"{work.flops / 1e12:.1f}", "device_s": f"{work.device:.3f}",
        "host_s": f"{work.launches * host_seconds():.3f}", "predicted_s": f"{work.seconds:.3f}", "measured_s": "",
    }  # fmt: skip


def phases(setting: Setting) -> Iterator[tuple[str, Work]]:
    student, teacher = _model(0), _model(1)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (student, teacher)]
    batches, rows = RESPONSES * LENGTH / BUDGET, RESPONSES * NEW
    each = BUDGET // LENGTH  # sequences of a micro-batch
    yield "student's weights to sample with", _moved(6 * sizes[0])  # float32 read, 16 bits written
    yield "rollout", rollout(student, setting.engine)
    if setting.offload != "none":
        seconds = 2 * sizes[1] * (1 / PINNED if setting.offload == "pinned" else 2 / PAGEABLE)
        yield "teacher to the device", Work(moved=2 * sizes[1], device=seconds)
    of_teacher = read(teacher, each, LENGTH, "masked" if setting.masked_teacher else "flash")
    yield "teacher", of_teacher * (RESPONSES / each)
    of_student = read(student, each, LENGTH, "flash" if setting.flash_student else "eager") * (RESPONSES / each)
    yield "student", of_student + _moved(6 * sizes[0]) * batches  # autocast's 16-bit weights
    loss = Work(device=FIRST_LOSS) if setting.first_loss else _loss()
    yield "loss", loss * (rows / 8192)
    # The layers' gradients are rounded to float32 and added up.
    yield "backward", of_student * 3 + _moved(14 * sizes[0]) * batches
    of_every_row = Work(device=2 * FIRST_LOSS) * (rows / 8192)
    yield "metrics", of_every_row if setting.every_row else _statistics(METRIC_ROWS * batches)
    # Weights, gradients and AdamW's two moments; all but the gradients written.
    yield "optimiser", _moved(7 * 4 * sizes[0])


def rollout(model, engine: str) -> Work:
    """All tokens of all responses: NEW times the one in the middle."""
    tokens = PROMPT + NEW // 2
    whole = decode(model, RESPONSES, tokens, engine)
    launches = 1 if engine == "graphs" else operations_of_a_token(model.config.num_hidden_layers)
    return replace(whole, launches=launches) * NEW + read(model, RESPONSES, PROMPT, "flash")


def decode(model, rows: int, tokens: int, engine: str) -> Work:
    """One token for each row, with `tokens` before it, and its draw."""
    config = model.config
    heads, width, vocabulary = config.num_key_value_heads, config.head_dim, config.vocab_size
    kept = (rows, heads, tokens, width)
    if engine == "static":
        cached = DynamicCache()
        for layer in range(config.num_hidden_layers):
            cached.update(_empty(kept), _empty(kept), layer)
        work = _forward(model, "eager", rows, 1, before=tokens, past_key_values=cached, use_cache=True)
    else:
        work = _forward(model, "none", rows, 1)
        attention = {"graphs": _where_it_lies, "paged behind a mask": _behind_a_mask}[engine]
        work += attention(config, kept) * config.num_hidden_layers

    def draw() -> None:
        hidden = _empty((rows, config.hidden_size))
        logits = hidden @ _empty((config.hidden_size, vocabulary))
        scores = (torch.tanh(logits / 30.0) * 30.0).float()
        with mock.patch.object(Tensor, "__bool__", lambda _: False):  # the nucleus is among its first candidates
            scores = UniformDraws(_empty((rows, 1), torch.float64), 0.6, 0.95)(None, scores)
        scores.argmax(dim=1)

    return work + _count(draw)


def _where_it_lies(_, kept: tuple[int, ...]) -> Work:
    return _moved(2 * 2 * torch.Size(kept).numel())


def _behind_a_mask(config, kept: tuple[int, ...]) -> Work:
    """transformers' paged attention without flash-attn: all requests' pages gathered as one sequence, repeated for each head."""
    rows, heads, tokens, width = kept
    module = torch.nn.Module()
    module.num_key_value_groups = config.num_attention_heads // heads

    def attention() -> None:
        pages = [_empty((rows * tokens, heads, width)) for _ in range(2)]
        index = _empty((rows * tokens,), torch.int64)
        key, value = (page[index].transpose(0, 1)[None] for page in pages)
        query = _empty((1, config.num_attention_heads, rows, width))
        eager_paged_attention_forward(module, query, key, value, _empty((1, 1, rows, rows * tokens)), 1.0)

    return _count(attention)


def read(model, sequences: int, tokens: int, attention: str) -> Work:
    """A forward pass over sequences of so many tokens. `attention`: "eager", as written; "flash": one kernel that needs no mask;
    "masked": one behind a dense mask, at half the rate and without leaving half of the products out."""
    if attention == "flash":
        return _forward(model, attention, 1, sequences * tokens, length=tokens)
    return _forward(model, attention, sequences, tokens, length=tokens)


def _forward(model, attention: str, rows: int, tokens: int, *, length: int = 0, before: int = 0, **options) -> Work:
    """`length`: of a sequence; `before`: tokens whose keys and values are kept."""
    dense = attention in ("eager", "masked")
    mask = _empty((rows, 1, tokens, before + tokens)) if dense else None
    ids = _empty((rows, tokens), torch.int64)
    given = {
        "attention_mask": dict.fromkeys(("full_attention", "sliding_attention"), mask),
        "position_ids": ids,
        "use_cache": False,
    }
    counter = Counter(0, set())

    def kernel(_, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **__):
        out = torch.empty_like(query.transpose(1, 2))
        if attention != "none":
            flops = 4 * query.numel() * length * (2 if attention_mask is not None else 0.5)
            given = [each for each in (query, key, value, attention_mask) if each is not None]
            read, written = (sum(each.nbytes for each in tensors) for tensors in (given, [out]))
            counter.operations.append(Operation("attention", "", read, written, flops=int(flops)))
        return out, None

    AttentionInterface.register(COUNTED, kernel)
    model.config._attn_implementation = "eager" if attention == "eager" else COUNTED
    return _count(lambda: model.get_decoder()(ids, **given | options), counter)


def _count(call: Callable[[], object], counter: Counter | None = None) -> Work:
    counter = counter or Counter(0, set())
    with torch.no_grad(), counter:
        call()
    return _all_of(counter)


def _all_of(counter: Counter) -> Work:
    work = Work()
    for each in counter.operations:
        seconds = max(each.moved / COPY, each.flops / PRODUCT, each.cached / CACHE)
        work += Work(1, each.moved, each.flops, seconds)
    return work


def _moved(size: float) -> Work:
    return Work(moved=size, device=size / COPY)


def _loss() -> Work:
    """Of 8,192 rows, as `bench/cost.py` counts it."""
    case = pair(GEMMA, QWEN, 97_675, 8192)
    counter, _ = count_linear(case, worked_example(), make_shared(case))
    return _all_of(counter)


def _statistics(rows: float) -> Work:
    """Logits of both heads once, read by a few passes in float32."""
    heads = [(config["vocab_size"], config["hidden_size"]) for config in FIRST_PAIR]
    flops, moved = (2 * rows * sum(v * h for v, h in heads), 4 * 4 * rows * sum(v for v, _ in heads))
    return Work(moved=moved, flops=flops, device=flops / PRODUCT + moved / COPY)


@cache
def _model(side: int):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**FIRST_PAIR[side]), dtype=torch.bfloat16).eval()


def _empty(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Operations(TorchDispatchMode):
    """Their number, views left out: what a device would be told to start."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in func.overloadpacket.__name__
        return func(*args, **kwargs or {})


@cache
def operations_of_a_token(layers: int) -> float:
    """What the engine for static batches starts for one token of each response, from prompts that are read already."""
    small = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "vocab_size": 1024, "num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FIRST_PAIR[0] | small)).eval()
    few, many = (_operations(model, new) for new in (4, 12))
    return (many - few) / 8


@cache
def host_seconds() -> float:
    """For the start of an operation: the demo's rollout as it was measured, over its operations."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "student").eval()
    return DEMO_ROLLOUT / _operations(model, DEMO_NEW)


def _operations(model, new: int) -> int:
    with _Operations() as seen:  # what ends a response is a token that pads: the demo's student never writes it
        StaticBatching(model).generate([[2, 3]] * 2, Sampling((0,), 0, new, temperature=0.6, top_p=0.95), seed=0)
    return seen.count


if __name__ == "__main__":
    torch.set_num_threads(1)
    record.write(Path(sys.argv[1]) / "phases.csv", [*predicted(), *measured()])
