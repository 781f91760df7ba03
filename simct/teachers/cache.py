"""Scores of a served teacher on this machine's disk (`ScoreCache`): one small file for each response.

A run's own samples are new at every step; what is asked for twice are answers from the data, held-out answers, and the steps that
a resumed run does again.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from simct.files import write_json
from simct.teachers.formats import Scores

SAME_MODEL = 0.1  # nats: what precision and batching change of a token's log-probability is less, on average


class ScoreCache:
    """Scores of one model. Files appear whole or not at all, and several processes may share the folder; when they take more than
    `limit_gb`, those that were not read or written for the longest time go.

    Args:
        folder: made if it is not there; the model has a folder of its own in it.
        identity: what the server says of its model (name, path).
        fingerprint: log-probabilities [n] that it gives to a text that never changes.
        limit_gb: in 10^9 bytes.
    Raises:
        ValueError: the folder cannot be written, or what is in it has another fingerprint: other weights under the same name.
    """

    def __init__(
        self, folder: str | os.PathLike, identity: Sequence[str], fingerprint: np.ndarray, limit_gb: float = 10.0
    ) -> None:
        if not limit_gb > 0:
            raise ValueError(f"cache_gb is {limit_gb}: expected a number above 0")
        name = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()[:16]
        self.folder, self.limit = Path(folder) / name, int(limit_gb * 1e9)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check(list(identity), fingerprint)
        except OSError as error:
            raise ValueError(f"cache_dir {str(folder)!r} cannot be used: {error}") from error
        self._size = sum(size for _, size, _ in self._files())

    def get(self, prompt: Sequence[int], response: Sequence[int], k: int) -> Scores | None:
        path = self._path(prompt, response, k)
        try:
            columns = load_file(path)
            scores = Scores(columns["topk_ids"], columns["topk_logprobs"], columns["token_logprobs"])
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError):  # damaged: asked for again, and written over
            return None
        if scores.topk_ids.shape != (len(response), k):
            return None
        with suppress(OSError):
            os.utime(path)
        return scores

    def put(self, prompt: Sequence[int], response: Sequence[int], k: int, scores: Scores) -> None:
        """OSError if the disk is full or gone."""
        path = self._path(prompt, response, k)
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(vars(scores), beside)
            size = beside.stat().st_size
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        self._size += size
        if self._size > self.limit:
            self._evict()

    def _check(self, identity: list[str], fingerprint: np.ndarray) -> None:
        path = self.folder / "model.json"
        if not path.exists():
            write_json(path, {"model": identity, "fingerprint": [float(value) for value in fingerprint]})
            return
        try:
            known = np.array(json.loads(path.read_text("utf-8"))["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"cache file {str(path)!r} cannot be read: {error}") from error
        if not same_model(known, fingerprint):
            raise ValueError(
                f"cache_dir holds scores of other weights under the name {identity[0]!r} ({self.folder}): remove them, or expected "
                "another cache_dir"
            )

    def _path(self, prompt: Sequence[int], response: Sequence[int], k: int) -> Path:
        key = hashlib.sha256(json.dumps([k, list(map(int, prompt)), list(map(int, response))]).encode()).hexdigest()
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path), as far as other processes leave them there."""
        found = []
        for path in self.folder.glob("??/*.safetensors"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _evict(self) -> None:
        files = sorted(self._files())
        self._size = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._size <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            self._size -= size


def same_model(fingerprint: np.ndarray, other: np.ndarray) -> bool:
    """Whether two rows of log-probabilities of one text are one model's, up to precision."""
    return fingerprint.shape == other.shape and bool(np.abs(fingerprint - other).mean() < SAME_MODEL)
