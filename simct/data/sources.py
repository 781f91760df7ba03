"""Where rows come from: JSONL and Parquet files, folders of either, the hub; and what is wrong with a row before it is a record.

`datasets` reads tables. JSON lines are read here: it would make one table of them, in which a prompt cannot be text in one line and
messages in the next, and of a bad line it does not say which.
"""

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from simct.console import error_line

JSONL, PARQUET = (".jsonl", ".json", ".ndjson"), (".parquet",)
_BLOCK = 1000  # rows of a table at a time
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Record = dict[str, Any]


class Row:
    """One row as it was read: where, and the record or what is wrong with it."""

    def __init__(
        self, file: str, number: int, word: str, record: Record | None, problem: str | None = None, index: int = -1
    ) -> None:
        self.file, self.number, self.word = file, number, word
        self.record, self.problem, self.index = record, problem, index

    @property
    def place(self) -> str:
        return f"{self.file}, {self.word} {self.number}"


class Places:
    """Where the records of a data set were read, by their numbers in it."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.files: list[str] = []
        self._file, self._number = array("i"), array("q")

    def add(self, row: Row) -> None:
        if self.files[-1:] != [row.file]:
            self.files.append(row.file)
        self._file.append(len(self.files) - 1)
        self._number.append(row.number)

    def __call__(self, number: int) -> str:
        return f"{self.files[self._file[number]]}, {self.word} {self._number[number]}"

    def part(self, start: int, stop: int) -> "Places":
        found = Places(self.word)
        found.files, found._file, found._number = self.files, self._file[start:stop], self._number[start:stop]
        return found


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, blank lines left out. ValueError if there is no such file."""
    if not path.is_file():
        raise ValueError(
            f"data file {str(path)!r} does not exist: expected a JSONL file with a prompt or messages on every line"
        )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = problem = None
            try:
                text = line.decode("utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
                if _SURROGATE.search(text):
                    json.dumps(record, ensure_ascii=False).encode("utf-8")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start} of the line)"
            except UnicodeEncodeError as error:
                problem = f"half a character ({error.object[error.start]!r}, a lone surrogate)"
            except json.JSONDecodeError as error:
                problem = f"not JSON ({error})"
            except ValueError as error:  # more digits than Python reads
                problem = f"a number that cannot be read ({error})"
            except RecursionError:
                problem = "not JSON (nested too deeply)"
            if problem is None and not isinstance(record, dict):
                problem = f"expected a JSON object, got {type(record).__name__}"
            yield Row(str(path), number, "line", record, problem)


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, read block by block. ValueError if it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            tables = (pyarrow.Table.from_batches([block]) for block in file.iter_batches(batch_size=_BLOCK))
            for number, record, problem in table_rows(tables):
                yield Row(str(path), number, "row", record, problem)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {str(path)!r} cannot be read as Parquet: {error}") from error


def table_rows(tables: Iterator, columns: list[str] | None = None) -> Iterator[tuple[int, Record | None, str | None]]:
    """The rows of Arrow tables one after another: number, record (of some columns or all), and what is wrong with it. A table may
    hold text that is not UTF-8; nothing looks at it until it is read."""
    first = 0
    for table in tables:
        chosen = table if columns is None else table.select(columns)
        try:
            table.validate(full=True)
            yield from ((first + i, record, None) for i, record in enumerate(chosen.to_pylist()))
        except ValueError:  # ArrowInvalid: somewhere in the block
            for i in range(len(table)):
                problem = _not_text(table.slice(i, 1))
                yield first + i, None if problem else chosen.slice(i, 1).to_pylist()[0], problem
        first += len(table)


def _not_text(row) -> str | None:
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            column.to_pylist()
        except ValueError as error:
            return f"field {name!r} is not UTF-8 ({error})"
    return None


def dataset_rows(dataset, columns: list[str] | None = None) -> Iterator[tuple[int, Record | None, str | None]]:
    """`table_rows` of a `datasets.Dataset`, or of an iterable one: row by row they would be slow."""
    return table_rows(dataset.with_format("arrow").iter(batch_size=_BLOCK), columns)


def local_files(source: str | Path, split: str) -> list[Path] | None:
    """The data files that `source` names, all JSONL or all Parquet; None if it can only be the name of a hub data set."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        name = str(source)
        if path.suffix in JSONL + PARQUET or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(
                f"data file {name!r} does not exist: expected a JSONL file with a prompt or messages on every line, a "
                "Parquet file, a folder of either, or a hub data set"
            )
        return None
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except (EmptyDatasetError, FileNotFoundError):
        found = {}
    splits = {
        str(name): kept
        for name, files in found.items()
        if (kept := [f for f in files if _suffix(f) in JSONL + PARQUET])
    }
    if not splits:
        raise ValueError(f"data folder {str(path)!r} holds no data: expected {', '.join(JSONL + PARQUET)} files")
    if split not in splits:
        raise ValueError(f"data folder {str(path)!r} has no split {split!r}: expected one of {', '.join(splits)}")
    files = sorted(map(Path, splits[split]))
    if len({is_parquet(file) for file in files}) > 1:
        raise ValueError(f"data folder {str(path)!r} holds both JSONL and Parquet files: expected one of the two")
    return files


def from_hub(source, split: str, streaming: bool = False):
    from datasets import load_dataset

    name, _, config = str(source).partition(":")
    try:
        return load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:  # no such name, configuration or split, no network, a file that is broken ...
        raise ValueError(
            f"data {str(source)!r} is neither a file nor a folder here, and cannot be loaded as a data set of the hub "
            f"(split {split!r}): {error_line(error)}"
        ) from error


def from_parquet(source, files: list[Path]):
    """The files as one `datasets.Dataset`, and from the number of a row in it to its file and the number there."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    counts = []
    for file in files:
        try:
            counts.append(pyarrow.parquet.read_metadata(file).num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"data file {str(file)!r} cannot be read as Parquet: {error}") from error
    filled = [(file, count) for file, count in zip(files, counts, strict=True) if count]
    if not filled:
        raise ValueError(f"data file {str(source)!r} is empty: expected at least one row with a prompt or messages")
    try:
        dataset = Dataset.from_parquet([str(file) for file, _ in filled])
    except (DatasetGenerationError, pyarrow.ArrowException, OSError) as error:  # files whose columns differ, say
        raise ValueError(f"data {str(source)!r} cannot be read as Parquet: {error.__cause__ or error}") from error
    ends = list(accumulate(count for _, count in filled))

    def place(number: int) -> tuple[str, int]:
        which = bisect_right(ends, number)
        return str(filled[which][0]), number - (ends[which - 1] if which else 0)

    return dataset, place


def _suffix(file) -> str:
    return Path(str(file)).suffix.lower()


def is_parquet(file) -> bool:
    return _suffix(file) in PARQUET
