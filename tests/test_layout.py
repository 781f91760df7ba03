"""The house: which room may import which. The import graph is read, not run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room imports from its own floor (itself only) and from those below it.
FLOORS = [
    {"simct.commands"},
    {"simct.demo"},
    {"simct.inspection"},
    {"simct.training"},
    {"simct.teachers"},
    {"simct.data", "simct.models", "simct.rollouts"},
    {"simct.pairing"},
    {"simct.client"},
    {"simct.console", "simct.files"},
    {"simct.secrets"},
    {"simct_kernels"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "simct_kernels" else ".".join(parts[:2])


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Every module of ours that a file imports, also inside of functions, with its line."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*package.split(".")[: len(package.split(".")) - node.level + 1], base]))
            for alias in node.names:
                inner = ROOT / base.replace(".", "/") / alias.name
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.append((f"{base}.{alias.name}" if is_module else base, node.lineno))
    return [
        (name, line)
        for name, line in found
        if name.split(".")[0] in ("simct", "simct_kernels", "bench", "tests", "examples")
    ]


FILES = sorted(path for package in ("simct", "simct_kernels") for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "simct":  # the public names, lazily, of every room
        return
    own = room_of(module)
    assert own in FLOOR, f"{path}: a room without a floor"
    for name, line in imports_of(path):
        other = room_of(name)
        assert other in FLOOR, f"{path}:{line} imports {name}"
        assert other == own or FLOOR[own] < FLOOR[other], f"{path}:{line}: {own} imports {other}"


def test_no_file_is_longer_than_four_hundred_lines():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
