"""A file of work done, part by part, so that a killed command goes on where it was and ends with the same bytes."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """JSON lines: what the work is, then one line for each finished part, in order.

    `work` is anything JSON that says what is being done, inputs and options; a file of other work is not gone on with.

    Raises ValueError: the file holds other work, or cannot be written.
    """

    def __init__(self, path: str | Path, work: dict[str, Any]) -> None:
        self.path, self.parts = Path(path), []
        work = json.loads(json.dumps(work))
        length = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = list(self._whole_lines()) if self.path.is_file() else []
            if found:
                (before, _), *done = found
                if before != work:
                    raise ValueError(
                        f"{self.path} is from an unfinished run that differs ({_differences(before, work)}): "
                        "repeat its options, or remove the file"
                    )
                length = found[-1][1]
                self.parts = [part for part, _ in done]
            self._file = self.path.open("r+b" if found else "wb")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from error
        self._file.truncate(length)
        self._file.seek(length)
        if not found:
            self._write(work)
        elif self.parts:
            warnings.warn(f"{self.path}: going on after {len(self.parts)} finished parts", stacklevel=3)

    def add(self, part: Any) -> None:
        """A finished part, on the disk when this returns."""
        self._write(part)
        self.parts.append(part)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink()

    def _write(self, content: Any) -> None:
        self._file.write(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _whole_lines(self) -> Iterator[tuple[Any, int]]:
        """What was written to its end, each with the position after it; a line that was not is work not done."""
        position = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            position += len(line)
            try:
                content = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            yield content, position


def _differences(before: Any, now: dict[str, Any]) -> str:
    if not isinstance(before, dict):
        return "it is no journal"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {before.get(name)!r}, now {now.get(name)!r}" for name in names)
