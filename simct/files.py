"""Files that are there whole or not at all."""

import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replaced(path: str | Path, **options) -> Iterator[TextIO]:
    """A text file (UTF-8) to write, renamed into its place at the end: a run that dies leaves the old file, or the new one.

    A file that was there keeps its mode, and a symbolic link stays one: what it points to is replaced. What is no ordinary file
    (`/dev/stdout`, `/dev/null`, a pipe) is written to where it is.
    """
    place = _followed(path)
    if not is_ordinary(path):
        sys.stdout.flush()  # a stream of ours goes on where it stands
        with open(os.dup(place) if isinstance(place, int) else place, "w", encoding="utf-8", **options) as target:
            yield target
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", **options) as target:
            if place.exists():
                beside.chmod(stat.S_IMODE(place.stat().st_mode))
            yield target
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, **options) -> None:
    with replaced(path, errors="surrogatepass") as target:
        json.dump(content, target, **{"indent": 1, "default": str, **options})
        target.write("\n")


def check_file(path: str | Path) -> None:
    """ValueError unless the file could be written; its folder is made if it is not there."""
    try:
        place = _followed(path)
        if isinstance(place, int):
            os.fstat(place)
            return
        if place.is_dir():
            raise IsADirectoryError("it is a folder")
        if place.is_block_device():
            raise PermissionError("it is a disk")
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError("it may not be written to")
        if is_ordinary(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            probe = place.with_name(f".{place.name}.{os.getpid()}")
            try:
                probe.write_bytes(b"x" * 4096)  # a full disk still makes empty files
            finally:
                probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"output {str(path)!r} cannot be written: {error}") from error


def is_ordinary(path: str | Path) -> bool:
    """Whether writing there makes or replaces a file; False for a device, a pipe or an open stream."""
    place = _followed(path)
    return not isinstance(place, int) and (not place.exists() or place.is_file())


def _followed(path: str | Path) -> Path | int:
    """Where the path's last symbolic link leads, or the number of an open stream of this process: a link there names the file
    behind it, whose shared position a second opening would not know. OSError for links that lead in a circle."""
    place = Path(path)
    for _ in range(40):
        place = Path(os.path.realpath(place.parent)) / place.name
        folder = place.parent
        if place.name.isdecimal() and str(folder) in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            return int(place.name)
        if not place.is_symlink() or folder.parts[1:2] == ("proc",):
            return place
        place = folder / place.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
