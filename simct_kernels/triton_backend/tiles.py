"""The tile configurations: one table, by architecture.

A program works on a tile of ROWS rows (units, where it counts candidates) by BLOCK columns. The rule behind the entries:
a thread takes 16 columns of one row, in 16-byte reads of contiguous ones, so that a row's scalars are held once and at 48 to
64 registers eight programs of 128 threads or more fit on a multiprocessor: some load while others compute. AMD's CDNA has
waves of 64 threads, 4 of which make 256, with 8 columns each; with half the rows nothing spills there.

The indexed products' rows are those that the k ids of a row name ("pick"; "pick_one" for k = 1), or entries with the same
id ("weight_gradient"), and their columns are H: 16 rows are in flight before the first is needed, as are the 4,096
elements of a tile, 32 to a thread with its float32 sum; H of 2,304 to 8,192 in blocks of 1,024 leaves few idle. A unit
of "small" is a row, which wants all of its scores in registers: a narrower row is padded to a power of two, and as many
units share the tile as fill it. Chosen by the ahead-of-time report. Of the tiles that
`bench.gpu`'s step "sweep" tried on an H100 for what reads logits, only four a program, where they lie in order, was faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Tile:
    rows: int
    block: int
    warps: int
    each: int = 1  # tiles that a program takes at most, one after the other


_NVIDIA = {
    "logsumexp": Tile(1, 4096, 8, each=16),
    "forward": Tile(1, 2048, 4, each=4),
    "forward_scattered": Tile(1, 2048, 4),
    "gradient": Tile(1, 2048, 4, each=4),
    "gradient_scattered": Tile(1, 2048, 4),
    "softmax": Tile(1, 2048, 8),
    "pick": Tile(16, 256, 4),
    "pick_one": Tile(1, 1024, 4),
    "weight_gradient": Tile(4, 1024, 4),
    "small": Tile(1, 4096, 8),
}
_AMD = {
    "logsumexp": Tile(1, 2048, 4, each=16),
    "forward": Tile(1, 2048, 4, each=16),
    "forward_scattered": Tile(1, 2048, 4),
    "gradient": Tile(2, 1024, 4),
    "gradient_scattered": Tile(2, 1024, 4),
    "softmax": Tile(1, 2048, 4),
    "pick": Tile(16, 256, 4),
    "pick_one": Tile(1, 1024, 2),
    "weight_gradient": Tile(4, 1024, 4),
    "small": Tile(1, 4096, 4),
}
TILES = {80: _NVIDIA, 90: _NVIDIA, 100: _NVIDIA, "gfx942": _AMD}


UNITS = 32  # units of one program of the small kernels, whose data is a number or two a unit and split,
SPLITS = 16  # and splits that it reads at a time
# Entries of one program's run of equal ids in an indexed product's weight gradient: longer runs are cut.
SEGMENT = 128
# Rows are split between programs until there are this many for each multiprocessor, some four times what it holds at once, so
# that it makes little what the last of them leave idle; and at least so that none takes more tiles than its entry says.
_PROGRAMS = 32


def tile(kernel: str, device: torch.device) -> Tile:
    """Architectures that the table lacks take the newest older NVIDIA entry, or AMD's."""
    return TILES[_architecture(device)][kernel]


def splits(rows: int, columns: int, shape: Tile, device: torch.device) -> tuple[int, int]:
    """Over how many programs each row is split, and how many tiles each of them takes."""
    tiles = triton.cdiv(columns, shape.block)
    wanted = _PROGRAMS * _multiprocessors(device) // triton.cdiv(rows, shape.rows)
    each = min(shape.each, triton.cdiv(tiles, max(1, min(wanted, tiles))))
    return triton.cdiv(tiles, each), each


def threads(shape: Tile, device: torch.device) -> int:
    return shape.warps * (64 if _architecture(device) == "gfx942" else 32)


@cache
def _architecture(device: torch.device) -> int | str:
    if device.type != "cuda":
        return 90  # the interpreter
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in (80, 90, 100) if known <= 10 * major + minor), default=80)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
