"""Which methods are measured on which cases: the suites `kernels` and `memory`, for a GPU, a CPU, and a quick look.

The order is that of importance: where the time is short, the end is left out, and the results say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cases import GEMMA, PHI, QWEN, Case, Model

OURS = ("ours", "ours, reduction=none", "ours, beta=0.5", "ours, top_k=16")
ONE_VOCABULARY = (
    "ours",
    "TRL chunked divergence",
    "Liger fused linear JSD",
    "materialised",
    "materialised, compiled",
    "cut cross-entropy, student's head only",
    "torch's linear cross-entropy, student's head only",
)
GOLD = ("ours", "ours with alignment", "TRL GOLD ULDLoss, hybrid", "TRL GOLD ULDLoss", "materialised")
SERVED = ("ours", "log-sum-exp of the student alone")


@dataclass(frozen=True)
class Task:
    suite: str
    case: Case
    methods: tuple[str, ...]
    seconds: float  # for the repeats of one method
    limit: float = 120.0  # after which one method is given up


def pair(student: Model, teacher: Model, shared: int, rows: int, **changes) -> Case:
    return Case(f"{student.name} <- {teacher.name}", student, teacher, shared, rows, **changes)


def kernels(device: str, quick: bool) -> list[Task]:
    if quick:
        tasks = _quick()
    elif device == "cuda":
        tasks = _gpu_kernels()
    else:
        tasks = _cpu_kernels()
    return [Task("kernels", *task) for task in tasks]


def memory(device: str, quick: bool) -> list[Task]:
    if quick:
        tasks = _sweeps(
            Case("sweep", Model("", 3000, 48), Model("", 2500, 40), 1500, 64, dtype="float32"),
            rows=(32, 64),
            shared=(500, 1500),
            methods=("ours", "materialised"),
            seconds=0.1,
        )
    elif device == "cuda":
        # At the far end whole logits take more than an H100 has: the results say what did not fit.
        tasks = _sweeps(
            pair(GEMMA, QWEN, 97_675, 8192),
            rows=(1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
            shared=(8192, 24_576, 49_152, 97_675),
            methods=("ours", "ours, torch backend", "materialised"),
            seconds=0.5,
        )
        for text, single in (("math", 0.936), ("prose", 0.76), ("Python", 0.532)):
            case = pair(GEMMA, QWEN, 97_675, 8192, single=single)
            tasks.append((case.replace(name=f"{case.name}, {text}"), ("ours", "materialised"), 0.5))
    else:
        tasks = _sweeps(
            Case("sweep", Model("", 24_000, 256), Model("", 20_000, 256), 12_000, 512, dtype="float32"),
            rows=(128, 256, 512, 1024, 2048),
            shared=(1500, 3000, 6000, 12_000),
            methods=("ours", "materialised"),
            seconds=1.0,
        )
    return [Task("memory", *task) for task in tasks]


def _quick() -> list[tuple]:
    student, teacher = Model("", 3000, 48, softcap=30.0), Model("", 2500, 40)
    two = Case("two vocabularies", student, teacher, 1500, 64, dtype="float32")
    plain = Model("", 3000, 48)
    one = Case("one vocabulary", plain, Model("", 3000, 40), 3000, 64, dtype="float32")
    return [
        (two, ("ours", "ours, top_k=16", "materialised", "loop over units"), 0.1),
        (two.replace(name="logits", form="logits"), ("ours", "materialised"), 0.1),
        (two.replace(name="served", form="served"), SERVED, 0.1),
        (one, ("ours", "TRL chunked divergence", "Liger fused linear JSD", "materialised"), 0.1),
    ]


def _cpu_kernels() -> list[tuple]:
    one = Case("one vocabulary", Model("", 49_152, 576), Model("", 49_152, 640), 49_152, 1024, dtype="float32")
    two = Case("two vocabularies", Model("", 50_000, 640), Model("", 40_000, 576), 25_000, 1024, dtype="float32")
    first = pair(GEMMA, QWEN, 97_675, 512, dtype="float32")
    text = Case(
        "DeepSeek <- Qwen, Python",
        Model("", 129_280, 256),
        Model("", 152_064, 256),
        0,
        256,
        dtype="float32",
        form="text",
    )
    return [
        (one, ONE_VOCABULARY, 6.0),
        (first, ("ours", "materialised"), 6.0, 150.0),
        (two, (*OURS, "materialised", "materialised, compiled", "loop over units"), 4.0),
        (two.replace(name="logits", form="logits"), ("ours", "materialised"), 2.0),
        (two.replace(name="served", form="served"), SERVED, 2.0),
        (two.replace(name="single units", single=1.0), ("ours", "ours, top_k=16"), 2.0),
        (text, GOLD, 2.0),  # GOLD takes a minute and a half
    ]


def _gpu_kernels() -> list[tuple]:
    first, second, third = pairs = [
        pair(GEMMA, QWEN, 97_675, 8192),
        pair(PHI, QWEN, 98_863, 8192),
        pair(GEMMA, PHI, 123_099, 8192),
    ]
    model = Model("", 128_256, 4096)
    one = Case("one vocabulary", model, model, 128_256, 8192)
    text = Case("DeepSeek <- Qwen, Python", Model("", 129_280, 2048), Model("", 152_064, 3584), 0, 2048, form="text")
    rivals = ("materialised", "materialised, compiled", "loop over units")
    logits = [
        (case.replace(name=f"{case.name}, logits", form="logits"), ("ours", "ours, torch backend", "materialised"), 0.5)
        for case in pairs
    ]
    return [
        (first, (*OURS, "ours, torch backend", *rivals), 1.0),
        (one, ("ours", "ours, torch backend", *ONE_VOCABULARY[1:]), 1.0),
        *logits,
        (first.replace(name=f"{first.name}, served", form="served"), SERVED, 0.5),
        (first.replace(name=f"{first.name}, single units", single=1.0), ("ours", "ours, top_k=16"), 0.5),
        (second, ("ours", "materialised"), 0.5),
        (third, ("ours", "materialised"), 0.5),
        (first.replace(name=f"{first.name}, float32", dtype="float32", rows=2048), ("ours", "materialised"), 0.5),
        (text, GOLD, 0.5),
    ]


def _sweeps(base: Case, rows, shared, methods, seconds) -> list[tuple]:
    by_rows = [(base.replace(rows=n, axis="rows"), methods, seconds) for n in rows]
    by_shared = [(base.replace(shared=k, axis="shared"), methods, seconds) for k in shared]
    return by_rows + by_shared
