"""Random byte vocabularies, texts cut by both at random, and everything that the losses on byte prefixes read."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, PrefixTables, bpm_loss, escd_loss
from simct_kernels.reference.prefix import bpm_losses, escd_losses

from .cases import Problem, make_shared

LETTERS = [bytes([b]) for b in b"ab01\xff"]
LOSSES = {"bpm": bpm_loss, "escd": escd_loss}
BOTH = pytest.mark.parametrize("name", LOSSES)
ENDS = (3, 5)  # the end of turn of student and teacher: special tokens


@dataclass(frozen=True)
class PrefixProblem(Problem):
    """What `bpm_loss` and `escd_loss` read, and the bytes that the tables were built of."""

    student_bytes: tuple[bytes | None, ...]
    teacher_bytes: tuple[bytes | None, ...]
    routes: dict[int, int]
    lengths: tuple[int, ...]  # student rows of each response
    tables: PrefixTables

    def bpm(self) -> tuple:
        return *self.sides(), self.tables

    def escd(self) -> tuple:
        return *self.sides(), self.tables, self.lengths

    def sides(self) -> tuple:
        return self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head, self.units

    def reference(self, loss: str, temperature: float = 1.0) -> Tensor:
        """[G] by the oracle."""
        student = self.student_head.logits(self.student_hidden)
        teacher = self.teacher_head.logits(self.teacher_hidden)
        given = (student, teacher, self.units, self.student_bytes, self.teacher_bytes, self.routes)
        if loss == "bpm":
            return bpm_losses(*given, temperature)
        return escd_losses(*given, self.lengths, temperature)


def vocabulary(
    rng: random.Random, size: int, longest: int, end: int, more: tuple[bytes, ...] = ()
) -> list[bytes | None]:
    """Every letter, nested random strings, some bytes spelled twice, two special tokens, and a row that stands for nothing."""
    pieces = [*LETTERS, *more]
    while len(pieces) < size - 3:
        stem = rng.choice(pieces)  # what is made of another token nests
        pieces.append((stem + rng.choice(LETTERS))[-longest:])
    rng.shuffle(pieces)
    pieces.insert(end, None)
    return [*pieces[: size - 2], None, None]


def cut(rng: random.Random, text: bytes, pieces: list[bytes | None]) -> list[int]:
    """One of the ways in which these tokens spell the text."""
    ids, at = [], 0
    while at < len(text):
        fitting = [i for i, piece in enumerate(pieces) if piece and text.startswith(piece, at)]
        ids.append(rng.choices(fitting, [len(pieces[i]) ** 2 for i in fitting])[0])
        at += len(pieces[ids[-1]])
    return ids


def units_of(
    student: list[list[int]], teacher: list[list[int]], student_bytes, teacher_bytes, merge: float = 0.0, rng=None
) -> AlignedUnits:
    """The minimal units of some responses, packed; `merge`: the share of bounds inside a response that is left out."""
    columns, offsets = [], [0, 0]
    for responses in zip(student, teacher, strict=True):
        bounds = []
        for ids, pieces in zip(responses, (student_bytes, teacher_bytes), strict=True):
            lengths = torch.tensor([len(pieces[i] or b"?") for i in ids])
            bounds.append({0: 0} | {end: k + 1 for k, end in enumerate(lengths.cumsum(0).tolist())})
        common = sorted(bounds[0].keys() & bounds[1].keys())
        if rng is not None:
            common = [b for b in common if b in (common[0], *common[-2:]) or rng.random() >= merge]
        for begin, end in zip(common, common[1:], strict=False):
            for side in (0, 1):
                columns += [offsets[side] + bounds[side][begin], bounds[side][end] - bounds[side][begin]]
        offsets = [offset + len(ids) for offset, ids in zip(offsets, responses, strict=True)]
    packed = [torch.tensor([i for ids in side for i in ids], dtype=torch.int64) for side in (student, teacher)]
    return AlignedUnits(*torch.tensor(columns, dtype=torch.int64).reshape(-1, 4).T.contiguous(), *packed)


def prefix_problem(
    seed: int = 0,
    *,
    student_size: int = 31,
    teacher_size: int = 37,
    student_longest: int = 3,
    teacher_longest: int = 4,
    responses: int = 3,
    merge: float = 0.0,
    dropped: float = 0.2,  # share of the units that are not supervised
    softcap: float | None = None,
    scale: float = 1.0,
    bias: bool = True,
) -> PrefixProblem:
    rng = random.Random(seed)
    student_bytes = vocabulary(rng, student_size, student_longest, ENDS[0])
    teacher_bytes = vocabulary(
        rng, teacher_size, teacher_longest, ENDS[1], more=(b"z", b"za", b"az", b"1z")
    )  # z has no home
    student, teacher = [], []
    for number in range(responses):
        text = b"".join(rng.choices(LETTERS, k=rng.randrange(3, 16)))
        ended = number % 2  # the others were cut short
        student.append(cut(rng, text, student_bytes) + [ENDS[0]] * ended)
        teacher.append(cut(rng, text, teacher_bytes) + [ENDS[1]] * ended)
    units = units_of(student, teacher, student_bytes, teacher_bytes, merge, rng)
    kept = [g for g in range(len(units)) if rng.random() >= dropped]
    units = units.select(torch.tensor(kept, dtype=torch.int64))
    routes = {ENDS[1]: ENDS[0]}

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, needs_grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(needs_grad)

    def head(size: int, width: int, scale: float, needs_grad: bool) -> LMHead:
        made = normal(size, needs_grad=needs_grad) if bias else None
        return LMHead(normal(size, width, needs_grad=needs_grad), made, softcap, scale)

    return PrefixProblem(
        normal(len(units.student_tokens), 13, needs_grad=True),
        head(student_size, 13, scale, True),
        normal(len(units.teacher_tokens), 11),
        head(teacher_size, 11, 1 / scale, False),
        units,
        make_shared(3, student_size, teacher_size),
        tuple(student_bytes),
        tuple(teacher_bytes),
        routes,
        tuple(map(len, student)),
        PrefixTables.build(student_bytes, teacher_bytes, special_routes=routes),
    )


def without_units(problem: PrefixProblem) -> PrefixProblem:
    return dataclasses.replace(problem, units=problem.units.select(torch.zeros(0, dtype=torch.int64)))


def run(name: str, problem: PrefixProblem, **options):
    return LOSSES[name](*getattr(problem, name)(), **options)
