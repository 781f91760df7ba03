"""How many kernels Triton compiled, and for how long: each new specialisation of a kernel makes its first call wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Compilations:
    """Counts from now on. What comes from Triton's cache on disk is not counted."""

    kernels: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    before: Callable | None = None  # who listened till now, and still does

    def __post_init__(self) -> None:
        try:
            from triton import knobs

            self.before, knobs.compilation.listener = knobs.compilation.listener, self._note
        except (ImportError, AttributeError):  # nothing is counted then
            pass

    def _note(self, *, src, metadata, metadata_group, times, cache_hit: bool) -> None:
        if self.before is not None:
            self.before(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)
        if not cache_hit:
            self.kernels[getattr(src, "name", "?")] += 1
            self.seconds += times.total / 1e6

    def take(self) -> dict[str, object]:
        """What was counted since the last time, as columns of a row."""
        if not self.kernels:
            return {}
        names = ", ".join(f"{count} {name}" for name, count in self.kernels.most_common())
        found = {"compiled": self.kernels.total(), "compile_seconds": self.seconds, "compiled_kernels": names}
        self.kernels, self.seconds = Counter(), 0.0
        return found
