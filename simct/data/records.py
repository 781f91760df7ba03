"""Records to train on, evaluate on or answer: from JSONL, from Parquet, from a folder of either, or from the hub.

A record has a `prompt` (a string, or messages that end with the user's turn) or `messages` (a whole conversation; its last
assistant turn, if it ends with one, is the off-policy answer), and may have any of these strings:
    answer: the right result, for grading;
    completion: the off-policy answer to `prompt`;
    teacher_context: text that only the teacher sees;
    teacher: the name of the teacher that scores the record.
Other columns are kept. A row that does not fit is named by its file and line (JSONL) or its row, counted from 0 (Parquet, hub).
"""

import json
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from simct.data.prompts import Prompt, _short, prompt_of

ON_BAD_ROW = ("fail", "skip")
JSONL, PARQUET = (".jsonl", ".json", ".ndjson"), (".parquet",)
TEXTS = ("answer", "completion", "teacher_context", "teacher")
COLUMNS = ("prompt", "messages", *TEXTS)  # what is read to check a row

Record = dict[str, Any]
Report = Callable[[str], None]


def load_records(
    source: str | Path,
    *,
    split: str = "train",
    streaming: bool = False,
    on_bad_row: str = "fail",
    report: Report | None = None,
):
    """The checked records of a file, a folder or a data set of the hub (`name` or `name:config`).

    Args:
        source: a `.parquet` file; any other file is read as JSON lines. Of a folder, the files of `split` are read, told by their
            names as `datasets` does (all of them where no name speaks of a split).
        split: of a folder or a hub data set; there also a slice, "train[:1000]". A file is one split, whatever its name.
        streaming: read and check rows when they are asked for. Of several files each is then a source of its own: its bad rows
            are reported at its end, and it is an error that it has no other.
        on_bad_row: "fail", or "skip": leave bad rows out, count them and report the first few.
        report: called with that text; a warning if not given.

    Returns:
        JSONL: a list of dictionaries, each with its `prompt`, all in memory. Parquet and hub: a `datasets.Dataset`, mapped from
        disk (`rows` reads it fast). Streaming: a `datasets.IterableDataset`, whose files are its shards.

    Raises ValueError, also while a stream is read: nothing can be read there, a bad row and on_bad_row="fail", no good row at all.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row is {on_bad_row!r}: expected one of {', '.join(ON_BAD_ROW)}")
    files = local_files(source, split)
    bad = BadRows(str(source), on_bad_row, report)
    if streaming:
        return _stream(source, split, files, bad)
    if files is not None and not _is_parquet(files[0]):
        return bad.checked(row for file in files for row in read_jsonl(file))
    if files is None:
        dataset, place = _hub(source, split), lambda i: f"{source}, row {i}"
    else:
        dataset, place = _parquet(source, files)
    _check_columns(source, dataset.column_names)
    numbered = enumerate(rows(dataset, [name for name in COLUMNS if name in dataset.column_names]))
    good = [row.number for row in bad.good((Row(lambda i=i: place(i), r, None, i) for i, r in numbered))]
    return dataset if len(good) == len(dataset) else dataset.select(good)


def read_prompts(path: str | Path) -> list[Record]:
    """The records of a JSONL file, each with a checked `prompt`; other columns are kept.

    Raises:
        ValueError: the file is missing or holds no record; a line is not a JSON object, or has no usable `prompt` or `messages`
            (named with its line number).
    """
    return BadRows(str(path), "fail", None, check=prompt_of).checked(read_jsonl(Path(path)))


def reference_answer(record: Record) -> str | None:
    """The off-policy answer of a record: `completion`, or the last assistant turn of `messages`; None where there is none.
    ValueError if it is not a string."""
    if record.get("completion") is not None:
        return _text(record, "completion")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return None
    if messages[-1].get("role") != "assistant":
        return None
    if not isinstance(messages[-1].get("content"), str):
        raise ValueError(f"field 'messages', the last message is {_short(messages[-1])}: expected a string 'content'")
    return messages[-1]["content"]


def check_record(record: Record) -> Prompt:
    """The record's prompt, once every field that the package reads has been checked. ValueError names the field."""
    prompt = prompt_of(record)
    reference_answer(record)
    for name in TEXTS:
        _text(record, name)
    return prompt


def rows(records: Iterable[Record], columns: list[str] | None = None) -> Iterator[Record]:
    """The records one by one; those of a `datasets.Dataset` by blocks of columns (row by row it would be slow)."""
    if not hasattr(records, "select_columns") or not hasattr(records, "__len__"):
        yield from records
        return
    dataset = records.with_format(None)
    for block in (dataset if columns is None else dataset.select_columns(columns)).iter(batch_size=1000):
        for values in zip(*block.values(), strict=True):
            yield dict(zip(block, values, strict=True))


class Row:
    """One row as it was read: its place (a text, or a function that gives it), and the record or what is wrong with it."""

    def __init__(self, place, record: Record | None, problem: str | None = None, number: int = -1) -> None:
        self.place, self.record, self.problem, self.number = place, record, problem, number


class BadRows:
    """What happens to rows that are no records. One rule for all sources: the first one ends the reading, or it is left out,
    counted, and reported at the end with the first few."""

    SHOWN = 3

    def __init__(self, source: str, on_bad_row: str, report: Report | None, check=check_record) -> None:
        self.source, self.on_bad_row, self.report, self.check = source, on_bad_row, report, check

    def checked(self, found: Iterable[Row]) -> list[Record]:
        return [row.record for row in self.good(found)]

    def good(self, found: Iterable[Row], source: str | None = None, may_be_empty: bool = False) -> Iterator[Row]:
        """The good rows, records with their `prompt`, of one source (of which there may be others: then this one may be empty)."""
        source = self.source if source is None else source
        kept, count, first = 0, 0, []
        for row in found:
            problem = row.problem
            if problem is None:
                try:
                    row.record = {**row.record, "prompt": self.check(row.record)}
                except ValueError as error:
                    problem = str(error)
            if problem is None:
                kept += 1
                yield row
                continue
            count += 1
            if len(first) < self.SHOWN:
                place = row.place if isinstance(row.place, str) else row.place()
                first.append(f"{place}: {problem}")
            if self.on_bad_row == "fail":
                raise ValueError(first[0])
        if not kept and count:
            raise ValueError(f"data {source!r} has only bad rows, {count} of them, the first: {first[0]}")
        if not kept and not may_be_empty:
            raise ValueError(f"data file {source!r} is empty: expected at least one line with a prompt or messages")
        if count:
            more = f"; and {count - len(first)} more" if count > len(first) else ""
            text = f"{count} of {kept + count} rows of {source} left out: {'; '.join(first)}{more}"
            (self.report or _warn)(text)


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
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start} of the line)"
            except json.JSONDecodeError as error:
                problem = f"not JSON ({error})"
            except RecursionError:
                problem = "not JSON (nested too deeply)"
            if problem is None and not isinstance(record, dict):
                problem = f"expected a JSON object, got {type(record).__name__}"
            yield Row(f"{path}, line {number}", record, problem)


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, read block by block. ValueError if it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for block in file.iter_batches(batch_size=1000):
                for record in block.to_pylist():
                    yield Row(f"{path}, row {number}", record)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {str(path)!r} cannot be read as Parquet: {error}") from error


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
    if len({_is_parquet(file) for file in files}) > 1:
        raise ValueError(f"data folder {str(path)!r} holds both JSONL and Parquet files: expected one of the two")
    return files


def _stream(source, split: str, files: list[Path] | None, bad: BadRows):
    from datasets import IterableDataset

    if files is None:
        stream = _hub(source, split, streaming=True)
        return IterableDataset.from_generator(_stream_hub, gen_kwargs={"stream": stream, "bad": bad})
    shards = {"files": list(map(str, files)), "bad": bad, "total": len(files)}
    return IterableDataset.from_generator(_stream_files, gen_kwargs=shards)


def _stream_files(files: list[str], bad: BadRows, total: int) -> Iterator[Record]:
    """`files`: all of them, or the part that a worker was given."""
    for file in files:
        found = (read_parquet if _is_parquet(file) else read_jsonl)(Path(file))
        for row in bad.good(found, file, may_be_empty=total > 1):
            yield row.record


def _stream_hub(stream, bad: BadRows) -> Iterator[Record]:
    for row in bad.good(Row(f"{bad.source}, row {i}", record, None) for i, record in enumerate(stream)):
        yield row.record


def _hub(source, split: str, streaming: bool = False):
    from datasets import load_dataset

    name, _, config = str(source).partition(":")
    try:
        return load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:  # no such name, configuration or split, no network, a file that is broken ...
        raise ValueError(
            f"data {str(source)!r} is neither a file nor a folder here, and cannot be loaded as a data set of the hub "
            f"(split {split!r}): {error}"
        ) from error


def _parquet(source, files: list[Path]):
    """The files as one `datasets.Dataset`, and from the number of a row in it to its file and the row there."""
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

    def place(number: int) -> str:
        which = bisect_right(ends, number)
        return f"{filled[which][0]}, row {number - (ends[which - 1] if which else 0)}"

    return dataset, place


def _check_columns(source, columns: list[str]) -> None:
    if "prompt" not in columns and "messages" not in columns:
        raise ValueError(
            f"data {str(source)!r}: expected a column 'prompt' or 'messages', found only {sorted(columns)}"
        )


def _text(record: Record, name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {name!r} is {_short(value)}: expected a string")
    return value


def _suffix(file) -> str:
    return Path(str(file)).suffix.lower()


def _is_parquet(file) -> bool:
    return _suffix(file) in PARQUET


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
