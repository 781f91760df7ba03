"""Compiles every kernel ahead of time for GPUs that need not be there, and reports what it takes of them.

    python -m bench.ahead_of_time [--arch 90 gfx942] [--quick] [--json]

What is compiled is what the launchers ask for: they run on small CPU tensors, whose sizes are specialised like real
ones, with each launch recorded in place of being started.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions
from simct_kernels.triton_backend import combine, indexed, linear, linear_simct_loss, simct_loss, small, softmax, tiles
from simct_kernels.triton_backend.scores import Side

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one multiprocessor (compute unit) has: bytes of shared memory that one program may take and that all may, threads.
_SHARED = {"80": (163 << 10, 164 << 10), "90": (227 << 10, 228 << 10), "100": (227 << 10, 228 << 10)}
_SHARED["gfx942"] = (64 << 10, 64 << 10)

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as Triton's launcher would make it of the same arguments."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]  # by 16
    warps: int
    stages: int | None  # None: Triton's own choice

    @classmethod
    def of(cls, kernel: JITFunction, arguments: tuple, keywords: dict) -> Launch:
        keywords = dict(keywords)
        warps, stages = keywords.pop("num_warps"), keywords.pop("num_stages", None)
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        signature, constants, divisible = [], [], []
        for parameter in kernel.params:
            value, kind = values[parameter.name], "constexpr"
            if isinstance(value, Tensor):
                kind, sixteenth = f"*{_TYPES[value.dtype]}", True  # an allocation; a view of one may do worse
            elif isinstance(value, float):
                kind, sixteenth = "fp32", False
            elif isinstance(value, int) and not parameter.is_constexpr and parameter.do_not_specialize:
                kind, sixteenth = "i32", False
            elif isinstance(value, int) and not parameter.is_constexpr and value != 1:
                kind, sixteenth = "i32", value % 16 == 0
            signature.append((parameter.name, kind))
            if kind == "constexpr":
                constants.append((parameter.name, value))
            elif sixteenth:
                divisible.append(parameter.name)
        return cls(kernel, tuple(signature), tuple(constants), tuple(divisible), warps, stages)

    def describe(self) -> str:
        """What tells it from the kernel's other specialisations: pointers given or not, types, constants."""
        types = dict(self.signature)
        given = [name for name, kind in self.signature if kind.startswith("*")]
        values = {name: value for name, value in self.constants if value is not None and name.isupper()}
        optional = [
            n for n in given if n in ("student_ids", "student_bias", "student_unit", "teacher_unit", "left_out")
        ]
        optional += [
            n
            for n in given
            if n in ("table", "tokens", "logsumexp", "student_targets", "bias", "wanted", "gradient", "whole")
            or n == "student_classes"
        ]
        read = next(
            types[name][1:] for name in ("values", "student", "weight", "hidden", "partial", "out") if name in types
        )
        return " ".join([read, *(f"{k}={v}" for k, v in values.items()), *optional])

    def compile(self, target: GPUTarget):
        places = {name: index for index, name in enumerate(self.kernel.arg_names)}
        attributes = {(places[name],): [["tt.divisibility", 16]] for name in self.divisible}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)
        options = {"num_warps": self.warps} | ({} if self.stages is None else {"num_stages": self.stages})
        return triton.compile(source, target=target, options=options)


@dataclass(frozen=True)
class Usage:
    kernel: str
    variant: str
    arch: str
    warps: int
    registers: int
    spills: int  # bytes of local memory (NVIDIA), vector registers and bytes of private memory (AMD)
    shared: int  # bytes
    programs: int  # that fit on one multiprocessor, by registers, threads and shared memory
    widest_load: int  # bytes that one thread reads at once
    wide_loads: int  # of 16 bytes, in one thread's code
    tile_loads: int  # as many as its part of the tiles of logits takes, where they lie in order; else 0
    int64_offsets: bool
    by_size: int  # how many of the same variant batches of other sizes have Triton compile


def launches(arch: str, quick: bool = False) -> list[Launch]:
    """What the launchers ask for on one architecture. `quick`: the fullest variant of each kernel and mode."""
    return _recorded(arch, _cases(quick))


def _recorded(arch: str, runs: Iterable[Callable[[], None]]) -> list[Launch]:
    found: dict[Launch, None] = {}

    def record(kernel, *arguments, grid, warmup, **keywords):
        found[Launch.of(kernel, arguments, keywords)] = None

    known = int(arch) if arch.isdigit() else arch
    with mock.patch.object(JITFunction, "run", record), mock.patch.object(tiles, "_architecture", lambda device: known):
        for run in runs:
            run()
    return list(found)


def compiled_by_size(arch: str) -> dict[str, int]:
    """By kernel, the most specialisations of one variant that batches of two sizes ask for: every batch of a training has another
    number of rows, and each compilation makes a step wait for half a second. (How many tiles a program takes shapes its loop: for
    1, multiples of 16 and the rest there is a kernel each.)"""
    options = {"candidates": "disjoint", "teacher_mass_floor": 0.1, "beta": 0.5}
    launched: dict[Launch, None] = {}
    for repeats in (4, 16):  # as many splits as well; small vocabularies, as nothing is compiled
        calls = (_logits_of, partial(_linear_of, options=options))
        with (
            mock.patch.dict(globals(), {"_WIDTH": 2560, "_SIZE": 977}),
            mock.patch.object(tiles, "splits", lambda *_, n=repeats: (n, 2)),
        ):
            launched |= dict.fromkeys(_recorded(arch, [partial(call, repeats) for call in calls]))
    variants = ((each.kernel.__name__, each.describe(), tuple(kind for _, kind in each.signature)) for each in launched)
    most: Counter[str] = Counter()
    for (kernel, *_), count in Counter(variants).items():
        most[kernel] = max(most[kernel], count)
    return most


def _logits_of(repeats: int) -> None:
    units, shared = _problem(repeats=repeats)
    student = torch.zeros(len(units.student_tokens), _WIDTH, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.zeros(len(units.teacher_tokens), _WIDTH, dtype=torch.bfloat16)
    simct_loss(student, teacher, units, shared, LossOptions(), summed=True)[0].backward()


def _linear_of(repeats: int, options: dict) -> None:
    for more in (options, {"top_k": 2}):
        _call_linear(True, more, repeats)


def _cases(quick: bool) -> Iterator:
    """Calls that between them make the launchers' choices."""
    everything = {"candidates": "disjoint", "teacher_mass_floor": 0.1}
    modes = [{"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0}]
    for mode in modes:
        yield lambda mode=mode: _run_logits(torch.bfloat16, **mode)
        yield lambda mode=mode: _run_linear(True, torch.bfloat16, **mode, **everything)
        for size in [small.LARGEST] if quick else [2**n for n in range(5, 13)]:
            yield lambda mode=mode, size=size: _run_small(size, True, **mode)
            if not quick:
                yield lambda mode=mode, size=size: _run_small(size, False, **mode)
        if quick:
            continue
        yield lambda mode=mode: _run_logits(torch.bfloat16, **mode, **everything)
        yield lambda mode=mode: _run_logits(torch.bfloat16, one_vocabulary=True, **mode)
        yield lambda mode=mode: _run_linear(False, torch.bfloat16, **mode)
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        yield lambda dtype=dtype: _run_sparse(dtype, True)
        if not quick:
            yield lambda dtype=dtype: _run_sparse(dtype, False)
    if quick:
        yield lambda: _run_logits(torch.bfloat16, one_vocabulary=True)
        yield lambda: _run_linear(False, torch.bfloat16)
        return
    for dtype in (torch.float16, torch.float32):
        yield lambda dtype=dtype: _run_logits(dtype)
        yield lambda dtype=dtype: _run_linear(False, dtype)
    for score in ("sum_logprob", "mean_logit"):
        yield lambda score=score: _run_logits(torch.bfloat16, score=score)
        yield lambda score=score: _run_linear(True, torch.bfloat16, score=score)


_WIDTH, _SIZE = 256_000, 97_675


def _problem(one_vocabulary: bool = False, repeats: int = 4) -> tuple[AlignedUnits, SharedVocabulary]:
    """Units of all kinds; ids in disorder unless the vocabularies are one."""
    if one_vocabulary:
        shared = SharedVocabulary(torch.arange(_WIDTH), torch.arange(_WIDTH))
    else:
        shared = SharedVocabulary(torch.arange(1, _SIZE + 1), torch.arange(_SIZE).flip(0))
    length = torch.tensor([1, 1, 2, 1, 2] * repeats)
    other = torch.tensor([1, 1, 1, 2, 2] * repeats)
    tokens = torch.ones(int(length.sum()), dtype=torch.int64), torch.full((int(other.sum()),), _SIZE - 1)
    tokens[0][0], tokens[1][0] = shared.student_ids[0], shared.teacher_ids[0]
    left_out = torch.stack([torch.arange(len(length)), torch.zeros_like(length)], 1)
    starts = length.cumsum(0) - length, other.cumsum(0) - other
    return AlignedUnits(starts[0], length, starts[1], other, *tokens, left_out=left_out), shared


def _run_logits(dtype: torch.dtype, one_vocabulary: bool = False, **options) -> None:
    units, shared = _problem(one_vocabulary)
    student = torch.zeros(len(units.student_tokens), _WIDTH, dtype=dtype, requires_grad=True)
    teacher = torch.zeros(len(units.teacher_tokens), _WIDTH, dtype=dtype)
    loss, _ = simct_loss(student, teacher, units, shared, LossOptions(**options), summed=True)
    loss.backward()


def _head(full: bool, dtype: torch.dtype = torch.float32) -> LMHead:
    weight = torch.zeros(_WIDTH, 16, dtype=dtype, requires_grad=True)
    return LMHead(weight, torch.zeros(_WIDTH, requires_grad=True), 30.0, 0.5) if full else LMHead(weight)


def _run_linear(full_head: bool, gradient_dtype: torch.dtype, **options) -> None:
    """The logits are float32 whatever the operands are; on a GPU with 16-bit operands so is the gradient."""
    write = linear.write_gradient

    def like(out: Tensor, *arguments) -> None:
        write(torch.zeros_like(out, dtype=gradient_dtype), *arguments)

    with mock.patch.object(linear, "write_gradient", like):
        _call_linear(full_head, options)
    sums, index, scale = torch.zeros(_WIDTH, 16), torch.zeros(_WIDTH, dtype=torch.int32), torch.ones(())
    for each in (sums, None):
        combine.combine(sums.to(gradient_dtype), each, sums, index, scale, 0, 0, _SIZE)


def _call_linear(full_head: bool, options: dict, repeats: int = 4) -> None:
    units, shared = _problem(repeats=repeats)
    if full_head:
        free = torch.tensor([[0, _SIZE + 1], [0, _SIZE + 2]])
        shared = dataclasses.replace(shared, student_classes=free, teacher_classes=free)
    hidden = torch.zeros(len(units.student_tokens), 16, requires_grad=True)
    teacher = torch.zeros(len(units.teacher_tokens), 16)
    arguments = hidden, _head(full_head), teacher, _head(full_head), units, shared, LossOptions(**options)
    linear_simct_loss(*arguments, summed=True, chunk_rows="auto")


def _run_sparse(dtype: torch.dtype, full_head: bool) -> None:
    """What `top_k` and a served teacher take, of inputs of `dtype`. Indexed products read hidden and head as they are."""
    units, shared = _problem()
    head = _head(full_head, dtype)
    hidden = torch.zeros(len(units.student_tokens), 16, dtype=dtype, requires_grad=True)
    teacher = torch.zeros(len(units.teacher_tokens), 16, dtype=dtype)
    arguments = hidden, head, teacher, head, units, shared, LossOptions(top_k=2)
    linear_simct_loss(*arguments, summed=True, chunk_rows="auto")
    entries = torch.zeros(2 * tiles.SEGMENT, dtype=torch.int64)
    indexed.add_weight_gradient(torch.zeros(_WIDTH, 16), entries.float(), hidden.detach(), entries, entries)
    if dtype == torch.bfloat16:  # as is the gradient on a GPU, of a head without bias
        side, row = Side(torch.zeros(3, _WIDTH), None, None, head.scale, head.softcap), torch.zeros(3)
        softmax.write_softmax(torch.zeros(3, _WIDTH, dtype=dtype), side, None, row, row)
    logits = torch.zeros(len(units.student_tokens), _WIDTH, dtype=dtype, requires_grad=True)
    teacher_logits = torch.zeros(len(units.teacher_tokens), _WIDTH, dtype=dtype)
    simct_loss(logits, teacher_logits, units, shared, LossOptions(top_k=2), summed=True)


def _run_small(size: int, needs_grad: bool, **options) -> None:
    small.divergence(torch.zeros(3, size), torch.zeros(3, size), LossOptions(**options), needs_grad)


def usage(launch: Launch, arch: str, by_size: dict[str, int]) -> Usage:
    compiled = launch.compile(TARGETS[arch])
    assembly = compiled.asm["amdgcn" if TARGETS[arch].backend == "hip" else "ptx"]
    read = _read_amd if TARGETS[arch].backend == "hip" else _read_nvidia
    registers, spills, by_registers = read(compiled, launch.warps)
    loads = [width for line in assembly.splitlines() if (width := _load_width(line))]
    shared = compiled.metadata.shared
    by_shared = _SHARED[arch][1] // (shared + 1024) if shared else by_registers
    programs = min(by_registers, by_shared, 2048 // (launch.warps * TARGETS[arch].warp_size))
    name = launch.kernel.__name__
    # A row times a stride is a product of 64 bits; nothing but scalars, the places of programs, is multiplied in 32.
    narrow = re.search(r"arith\.muli.*: tensor<\S*xi32>", compiled.asm["ttir"])
    return Usage(
        name,
        launch.describe(),
        arch,
        launch.warps,
        registers,
        spills,
        shared,
        programs,
        max(loads, default=0),
        loads.count(16),
        _tile_loads(launch, TARGETS[arch].warp_size),
        narrow is None,
        by_size.get(name, 0),
    )


_SIDES = {"candidate_kernel": ("student", "teacher"), "gradient_kernel": ("student", "teacher")}
_SIDES |= {"logsumexp_kernel": ("values",), "softmax_kernel": ("values",)}


def _tile_loads(launch: Launch, warp: int) -> int:
    """The loads of 16 bytes that one thread reads its part of the tiles with; 0 where a table says where they lie."""
    types, constants = dict(launch.signature), dict(launch.constants)
    tables = ("student_ids", "teacher_ids", "table", "rest")
    if any(types.get(table, "").startswith("*") for table in tables):
        return 0
    sizes = [4 if types[side] == "*fp32" else 2 for side in _SIDES.get(launch.kernel.__name__, ())]
    return sum(constants.get("ROWS", 1) * constants["BLOCK"] * size for size in sizes) // (launch.warps * warp * 16)


_AMD_LOADS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "ubyte": 1, "sbyte": 1}


def _load_width(line: str) -> int:
    """In bytes; 0 of what is no load."""
    if found := re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)", line):
        return int(found.group(1) or 1) * int(found.group(2)) // 8
    if found := re.search(r"cp\.async\.\S+ \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", line):
        return int(found.group(1), 0)
    if found := re.search(r"(?:global|buffer|flat)_load_(dword(?:x\d)?|[a-z]+)", line):
        return _AMD_LOADS.get(found.group(1), 2)
    return 0


def _read_nvidia(compiled, warps: int) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    warp_registers = -(-numbers["REG"] * 32 // 256) * 256  # given out 256 at a time
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], 65536 // (warp_registers * warps)


def _read_amd(compiled, warps: int) -> tuple[int, int, int]:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))

    registers = number("vgpr_count")
    # Scalar registers spill into lanes of vector registers: memory is touched only where there is a private segment.
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    waves = min(8, 512 // (-(-registers // 8) * 8)) * 4  # of the compute unit's four SIMDs
    return registers, spills, waves // warps


def measure(archs: list[str], quick: bool = False) -> list[Usage]:
    return [
        usage(launch, arch, by_size)
        for arch in archs
        for by_size in [compiled_by_size(arch)]
        for launch in launches(arch, quick)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="the fullest variants only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the compiler that this reports on: unset it")
    found = measure(options.arch, options.quick)
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
        return
    print(
        f"{'arch':7}{'kernel':21}{'regs':>5}{'spills':>7}{'shared':>7}{'warps':>6}{'programs':>9}{'load':>5}  variant"
    )
    for one in found:
        print(
            f"{one.arch:7}{one.kernel:21}{one.registers:5}{one.spills:7}{one.shared:7}{one.warps:6}"
            f"{one.programs:9}{one.widest_load:5}  {one.variant}"
        )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
